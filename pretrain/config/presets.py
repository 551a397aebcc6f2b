"""What `--config` takes: a TOML file, or the name of a preset such as mac_760m, mac_760m_long or quickstart.

The paper's models are a mixer at a size, each a row of presets/sizes.toml; every other preset is a file beside it.
"""

import difflib
from pathlib import Path
from typing import Any

from pretrain.config.files import read_toml

FOLDER = Path(__file__).with_name("presets")
SIZES = FOLDER / "sizes.toml"
_LONG = "_long"


def read_config(text: str) -> tuple[dict[str, Any], str]:
    """The settings that `--config` asks for, and what messages call them.

    Args:
        text: The name of a preset, or the path of a TOML file.

    Raises:
        ValueError: It is neither, or the file is not TOML.
    """
    if text in preset_names():
        file = FOLDER / f"{text}.toml"
        return read_toml(file) if file.is_file() else _sized(text), f"the preset {text}"
    file = Path(text)
    if file.exists():
        return read_toml(file), text
    near = difflib.get_close_matches(file.name.removesuffix(".toml"), preset_names(), 3)
    if file.suffix == ".toml":
        hint = f"; did you mean --config {near[0]}?" if near else ""
        raise ValueError(f"no configuration at {text}: there is no such file{hint}")
    known = f"did you mean {' or '.join(near)}?" if near else f"{SIZES} and the files beside it have them"
    raise ValueError(f"--config {text} is neither a file nor a preset; {known}")


def preset_names() -> list[str]:
    """All presets: a mixer at a size, with or without `_long`, and the files of presets/."""
    table = read_toml(SIZES)
    sized = [f"{mixer}_{size}{stage}" for mixer in table["mixers"] for size in table["sizes"] for stage in ("", _LONG)]
    return [*sized, *sorted(file.stem for file in FOLDER.glob("*.toml") if file != SIZES)]


def _sized(name: str) -> dict[str, Any]:
    """A mixer at a size: the tables that apply laid over one another, the most particular last."""
    table = read_toml(SIZES)
    mixer, _, size = name.removesuffix(_LONG).rpartition("_")
    layers = [table["all"], table["sizes"][size], table["mixers"][mixer]]
    if name.endswith(_LONG):
        layers += [table["long"], *(layer["long"] for layer in layers if "long" in layer)]
    layers += [{"model": {"variant": mixer, "ffn_dim": table["mixers"][mixer]["ffn_dim"][size]}}]
    layers += [table["names"].get(name, {})]
    tree: dict[str, Any] = {}
    for layer in layers:
        for section in layer.keys() - {"long", "ffn_dim"}:
            tree[section] = tree.get(section, {}) | layer[section]
    return tree
