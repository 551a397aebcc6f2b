"""Reading an exported folder, with a sentence for whatever may be wrong with it."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from titans_mcore.config import TitansConfig, with_memory_heads
from titans_mcore.hf.errors import ExportError
from titans_mcore.tensor_files import read_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
SENTENCEPIECE = "tokenizer.model"


def read_config(folder: Path) -> TitansConfig:
    """The settings of the model in an exported folder.

    Raises:
        ExportError: There is no such folder, it holds another model, or its settings do not fit.
    """
    from titans_mcore.hf.configuration_titans import TitansHFConfig

    if not folder.is_dir():
        raise ExportError(f"no exported model at {folder}: there is no such folder")
    settings = _json(folder / CONFIG)
    if settings.get("model_type") != TitansHFConfig.model_type:
        raise ExportError(
            f"{folder / CONFIG} is of model type {settings.get('model_type')!r}; name a folder that was exported here"
        )
    try:
        return TitansHFConfig.from_dict(with_memory_heads(settings)).to_titans()
    except (TypeError, ValueError) as error:
        raise ExportError(f"{folder / CONFIG}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, in order.

    Raises:
        ExportError: One is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ExportError(f"{folder} has no {SINGLE} (nor {INDEX}); copy or export the folder again")
    names = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
    for name in names:
        if not (folder / name).is_file():
            raise ExportError(f"{folder / name} is missing, which {INDEX} names; copy or export the folder again")
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of an exported folder by name; their values come from the disk when they are used.

    Raises:
        ExportError: A file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            tensors |= read_tensors(file, "weights")[0]
        except ValueError as error:
            raise ExportError(f"{error}; copy or export the folder again") from error
    return tensors


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{file} is missing; copy or export the folder again") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} cannot be read ({error}); copy or export the folder again") from error
    if not isinstance(content, dict):
        raise ExportError(f"{file} holds no settings; copy or export the folder again")
    return content
