"""What can be wrong with a folder of weights, in a sentence, before they are loaded."""

import json
from pathlib import Path

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_weight_files(folder: Path) -> None:
    """Whether every file of weights is there, and as long as it says itself.

    Raises:
        OSError: One is not, or weights are there as pickle alone; the message names it.
    """
    if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in (_SINGLE, _INDEX)):
        raise OSError(_no_safetensors(folder))
    for file in named_files(folder):
        if not file.is_file():
            raise OSError(f"{file} is missing, which {_INDEX} names; copy the folder again")
        told = _told_length(file)
        if not told or told != file.stat().st_size:
            raise OSError(
                f"{file} is damaged: it has {file.stat().st_size} bytes"
                + (f" instead of {told}" if told else " and no header")
                + "; copy the folder again"
            )


def _no_safetensors(folder: Path) -> str:
    """What to do with a folder that has no weights that can be read."""
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled:
        return (
            f"{folder} holds its weights as pickle ({pickled[0]}), which may run code when it is opened; "
            f"have save_pretrained write them as {_SINGLE}"
        )
    return f"{folder} has no {_SINGLE} (nor {_INDEX}); copy or export the folder again"


def named_files(folder: Path) -> list[Path]:
    """Weight files of a folder; none where there is nothing to check."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    try:
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except FileNotFoundError:
        return []  # transformers says what it looked for
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise OSError(f"{folder / _INDEX} is damaged ({error!r}); copy the folder again") from error
    return [folder / name for name in sorted(set(names))]


def _told_length(file: Path) -> int:
    """Bytes that a safetensors file should have by its own header; 0 where the header cannot be read."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return 0
        try:
            header = json.loads(stream.read(length))
            return 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__")
        except (ValueError, KeyError, TypeError, AttributeError):
            return 0
