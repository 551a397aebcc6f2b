"""A run's settings as files: presets and TOML, read with sentences for what is wrong in them.

`--config` takes a TOML file, or the name of a preset such as mac_760m, mac_760m_long or quickstart. The paper's models
are a mixer, or several that take turns, at a size, each a row of presets/sizes.toml; every other preset is a file
beside it. The resolved tree is written to `RUN/config.toml`, from which resuming, evaluation and export read it back.
"""

import difflib
import json
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import TEXTS
from titans_mcore.config import with_memory_heads
from titans_mcore.io import write_file_atomically

_PRESETS = Path(__file__).with_name("presets")
_SIZES = _PRESETS / "sizes.toml"
_LONG = "_long"


def read_config(text: str) -> tuple[dict[str, Any], str]:
    """The settings that `--config` asks for, and what messages call them.

    Args:
        text: The name of a preset, or the path of a TOML file.

    Raises:
        ValueError: It is neither, or the file is not TOML.
    """
    if text in preset_names():
        file = _PRESETS / f"{text}.toml"
        return read_toml(file) if file.is_file() else _sized(text), f"the preset {text}"
    file = Path(text)
    if file.exists():
        return read_toml(file), text
    near = difflib.get_close_matches(file.name.removesuffix(".toml"), preset_names(), 3)
    if file.suffix == ".toml":
        hint = f"; did you mean --config {near[0]}?" if near else ""
        raise ValueError(f"no configuration at {text}: there is no such file{hint}")
    known = f"did you mean {' or '.join(near)}?" if near else f"{_SIZES} and the files beside it have them"
    raise ValueError(f"--config {text} is neither a file nor a preset; {known}")


def preset_names() -> list[str]:
    """All presets: a mixer at a size, with or without `_long`, and the files of presets/."""
    table = read_toml(_SIZES)
    sized = [f"{mixer}_{size}{stage}" for mixer in table["mixers"] for size in table["sizes"] for stage in ("", _LONG)]
    return [*sized, *sorted(file.stem for file in _PRESETS.glob("*.toml") if file != _SIZES)]


def _sized(name: str) -> dict[str, Any]:
    """A mixer at a size: the tables that apply laid over one another, the most particular last."""
    table = read_toml(_SIZES)
    mixer, _, size = name.removesuffix(_LONG).rpartition("_")
    layers = [table["all"], table["sizes"][size], table["mixers"][mixer]]
    if name.endswith(_LONG):
        layers += [table["long"], *(layer["long"] for layer in layers if "long" in layer)]
    row = table["mixers"][mixer]
    layers += [{"model": {"variant": row.get("variant", mixer), "ffn_dim": row["ffn_dim"][size]}}]
    layers += [table["names"].get(name, {})]
    tree: dict[str, Any] = {}
    for layer in layers:
        for section in layer.keys() - {"long", "ffn_dim", "variant"}:
            tree[section] = tree.get(section, {}) | layer[section]
    return tree


def systems() -> dict[str, dict[str, Any]]:
    """Every system that the paper compares, by its name, with the model's settings that it does not share.

    They are the rows of the table, and the mixers that have none.
    """
    from titans_mcore.mixers import MIXERS  # here, so that reading a file needs no torch

    rows: dict[str, dict[str, Any]] = {name: {} for name in MIXERS} | read_toml(_SIZES)["mixers"]
    return {name: {"variant": row.get("variant", name), **row.get("model", {})} for name, row in rows.items()}


CONFIG_FILE = "config.toml"
SECTIONS: dict[str, Any] = {section.name: section.default_factory for section in fields(RunConfig)}
"""The dataclass of each section, which is also what makes its default."""


def write_run_config(config: RunConfig, run_dir: Path) -> None:
    """Writes RUN/config.toml: the whole old file or the whole new one is there at any moment."""
    write_file_atomically(run_dir / CONFIG_FILE, tomli_w.dumps(asdict(config)).encode())


def load_run_config(run_dir: Path) -> RunConfig:
    """The configuration of a run folder, as it was resolved: that of its newest checkpoint, which has a checksum.

    RUN/config.toml counts where there is no checkpoint yet; where it says something else than the checkpoint, that is
    printed.

    Raises:
        ValueError: It is not there, or holds something illegal.
    """
    file = Path(run_dir) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no {CONFIG_FILE}")
    noted = _noted_settings(Path(run_dir))
    if noted is None:
        return _built(read_toml(file), str(file))
    config = _built(noted[1], str(noted[0]))
    try:
        there = _built(read_toml(file), str(file))
    except ValueError as error:
        print(f"note: {error}; the settings of {noted[0]} are taken", file=sys.stderr)
        return config
    # Shards may have been moved; that they are the same is known by their fingerprint.
    config = replace(config, data=replace(config.data, path=there.data.path, blend=there.data.blend))
    trained, edited = asdict(config), asdict(there)
    names = [f"{a}.{b}" for a, section in trained.items() for b in section if edited[a][b] != section[b]]
    if names:
        print(
            f"note: {file} is not what {noted[0]} was trained with, whose settings are taken: {', '.join(names)}",
            file=sys.stderr,
        )
    return config


def _noted_settings(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run and the settings in its record; None where there is none."""
    from titans_mcore.weights import MARKER, checkpoints_newest_first, damage  # here, as in systems(): it needs torch

    for folder in checkpoints_newest_first(run_dir):
        if damage(folder) is None:
            settings = json.loads((folder / MARKER).read_text(encoding="utf-8")).get("settings")
            return (folder, settings) if settings else None
    return None


def _built(tree: dict[str, Any], source: str) -> RunConfig:
    if isinstance(tree.get("model"), dict):
        tree["model"] = with_memory_heads(tree["model"])
    return build(tree, source)


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
