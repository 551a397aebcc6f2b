"""A run's settings as files: TOML, read with sentences for what is wrong in it.

The resolved tree is written to `RUN/config.toml`, from which resuming, evaluation and export read it back.
"""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import tomli_w

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import TEXTS
from titans_mcore.config import with_memory_heads
from tokenization.io import write_file_atomically

CONFIG_FILE = "config.toml"
SECTIONS: dict[str, Any] = {section.name: section.default_factory for section in fields(RunConfig)}
"""The dataclass of each section, which is also what makes its default."""


def write_run_config(config: RunConfig, run_dir: Path) -> None:
    """Writes RUN/config.toml: the whole old file or the whole new one is there at any moment."""
    write_file_atomically(run_dir / CONFIG_FILE, tomli_w.dumps(asdict(config)).encode())


def load_run_config(run_dir: Path) -> RunConfig:
    """The configuration of a run folder, as it was resolved.

    Raises:
        ValueError: It is not there, or holds something illegal.
    """
    file = Path(run_dir) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no {CONFIG_FILE}")
    tree = read_toml(file)
    if isinstance(tree.get("model"), dict):
        tree["model"] = with_memory_heads(tree["model"])
    return build(tree, str(file))


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file as nested dictionaries.

    Raises:
        ValueError: It is not there or not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no configuration at {file}: there is no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read the configuration {file}: {error}") from error


def build(tree: dict[str, Any], source: str) -> RunConfig:
    """A configuration from nested dictionaries; what they leave out has its default.

    Raises:
        ValueError: A key is unknown (the nearest known one is suggested), a value has another type, or is illegal.
    """
    for section, values in tree.items():
        if section not in SECTIONS:
            raise ValueError(unknown_setting(section, source))
        if not isinstance(values, dict):
            raise ValueError(
                f"{section} in {source} is {values!r}; it is a section: write [{section}] above its settings"
            )
    return RunConfig(**{name: _section(name, kind, tree.get(name, {}), source) for name, kind in SECTIONS.items()})


def setting_names() -> dict[str, Any]:
    """Every setting by its dotted name, with its type."""
    return {f"{section}.{f.name}": f.type for section, kind in SECTIONS.items() for f in fields(kind)}


def unknown_setting(name: str, source: str, known: Iterable[str] | None = None) -> str:
    """The sentence for a setting that does not exist, with the nearest one that does."""
    known = list(known) if known is not None else [*setting_names(), *SECTIONS]
    same_key = [setting for setting in known if setting.rpartition(".")[2] == name.rpartition(".")[2].lstrip("-")]
    near = same_key or difflib.get_close_matches(name, known, 1, 0.5)
    return f"unknown setting {name} in {source}" + (f"; did you mean {near[0]}?" if near else "")


def _section(section: str, kind: Any, values: dict[str, Any], source: str) -> Any:
    types = {f.name: f.type for f in fields(kind)}
    for name in values:
        if name not in types:
            raise ValueError(unknown_setting(f"{section}.{name}", source))
    return kind(**{name: _typed(f"{section}.{name}", value, types[name], source) for name, value in values.items()})


def _typed(name: str, value: Any, kind: Any, source: str) -> Any:
    if kind == TEXTS:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{name} in {source} is {value!r}; it must be a list of texts in quotes")
        return tuple(value)
    kind = kind if isinstance(kind, type) else str  # the other settings are a choice of words
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} in {source} is {value!r}; it must be {_KIND_NAMES[kind]}")
    return value


_KIND_NAMES = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
