"""Reading an exported folder, with a sentence for whatever may be wrong with it.

The code in it is for those who do not have this package. Here it never runs: the package's own classes compute.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from titans_mcore.config import TitansConfig, with_memory_heads
from titans_mcore.hf.files_titans import check_weight_files, named_files
from titans_mcore.hf.folder import ExportError
from titans_mcore.io import sha256_of
from titans_mcore.tensor_files import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from titans_mcore.hf.modeling_titans import TitansForCausalLM

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER = "tokenizer.json"
PROOF = "proof.json"


def read_config(folder: Path) -> TitansConfig:
    """The settings of the model in an exported folder.

    Raises:
        ExportError: There is no such folder, it holds another model, or its settings do not fit.
    """
    from titans_mcore.hf.configuration_titans import TitansHFConfig

    if not folder.is_dir():
        raise ExportError(f"no exported model at {folder}: there is no such folder")
    settings = read_json(folder / CONFIG)
    if settings.get("model_type") != TitansHFConfig.model_type:
        raise ExportError(
            f"{folder / CONFIG} is of model type {settings.get('model_type')!r}; name a folder that was exported here"
        )
    if not {"TitansForCausalLM", "TitansModel"}.issuperset(kinds := settings.get("architectures") or []):
        raise ExportError(f"{folder} holds a {kinds[0]}, no language model; name a folder that convert has written")
    try:
        return TitansHFConfig.from_dict(with_memory_heads(settings)).to_titans()
    except (TypeError, ValueError) as error:
        raise ExportError(f"{folder / CONFIG}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, in order.

    Raises:
        ExportError: One is missing or damaged.
    """
    try:
        check_weight_files(folder)
    except OSError as error:
        raise ExportError(str(error)) from None
    return named_files(folder)


def check_sums(folder: Path) -> None:
    """Compares the files that make the model what it is with the checksums in the folder's proof.json.

    A folder without one, which save_pretrained may have written, is taken as it is, and that is said.

    Raises:
        ExportError: One has changed.
    """
    if not (folder / PROOF).is_file():
        print(f"note: {folder} has no {PROOF}, so its files are not compared with checksums", file=sys.stderr)
        return
    noted = read_json(folder / PROOF).get("files", {})
    for file in (folder / CONFIG, folder / TOKENIZER, *weight_files(folder)):
        if file.name in noted and not (file.is_file() and sha256_of(file) == noted[file.name]["sha256"]):
            raise ExportError(
                f"{file} is not the file that was exported (its sha256 differs from {PROOF}'s); copy or export the "
                "folder again (--no-verify reads it as it is)"
            )


def open_model(folder: Path, *, verify: bool = True) -> "TitansForCausalLM":
    """The model of an exported folder, fp32, by the package's classes.

    Args:
        folder: What `python -m titans_mcore.hf.convert` or save_pretrained wrote.
        verify: See check_sums.

    Raises:
        ExportError: A file is missing, damaged or another's.
    """
    from titans_mcore.hf.configuration_titans import TitansHFConfig
    from titans_mcore.hf.modeling_titans import TitansForCausalLM

    read_config(folder)
    weight_files(folder)
    if verify:
        check_sums(folder)
    config = TitansHFConfig.from_dict(with_memory_heads(read_json(folder / CONFIG)))
    settings: dict[str, Any] = {"config": config, "dtype": torch.float32, "local_files_only": True}
    try:
        return cast("TitansForCausalLM", TitansForCausalLM.from_pretrained(folder, **settings))
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ExportError(f"{folder}: {' '.join(str(error).split())[:300]}") from error


def open_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of an exported folder.

    Raises:
        ExportError: It is missing or damaged.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / TOKENIZER).is_file():
        raise ExportError(f"{folder / TOKENIZER} is missing; copy or export the folder again")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{folder / TOKENIZER} cannot be read ({reason}); copy or export the folder again") from error


def read_weights(folder: Path, *, verify: bool = True) -> dict[str, Tensor]:
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
    if verify:
        check_sums(folder)
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """What one of the folder's JSON files holds.

    Raises:
        ExportError: It is missing or damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{file} is missing; copy or export the folder again") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} cannot be read ({error}); copy or export the folder again") from error
    if not isinstance(content, dict):
        raise ExportError(f"{file} holds no settings; copy or export the folder again")
    return content
