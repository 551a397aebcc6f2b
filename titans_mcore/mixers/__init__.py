"""The token mixers, a file each: torch only, whole or split as Parts decides. A file put here is a mixer more."""

from importlib import import_module
from pkgutil import iter_modules

from .parts import Parts
from .spec import MIXERS, MixerSpec, register

# An exported folder has them all in one file, and nothing to find.
for _file in iter_modules(globals().get("__path__", [])):
    import_module(f".{_file.name}", __name__)

__all__ = ["MIXERS", "MixerSpec", "Parts", "register"]
