"""Folders for transformers alone: weights, code and a proof.

`save_alone(model, folder, example)` writes one of a model that transformers has trained, convert.py those of runs.
AutoModelForTimeSeriesPrediction, AutoModelForSequenceClassification, AutoModelForCausalLM or AutoModel loads it with
trust_remote_code where this package is not installed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_mcore.hf.card import short_card
from titans_mcore.hf.flatten import flatten_code
from titans_mcore.hf.folder import ExportError, check_output, staged_folder
from titans_mcore.hf.modeling_titans import TitansBackbone, TitansForCausalLM, TitansModel
from titans_mcore.hf.proof import prove
from titans_mcore.hf.tasks_titans import TitansForSequenceClassification, TitansForTimeSeriesPrediction

_AUTO_CLASSES: dict[type, dict[str, type]] = {
    TitansBackbone: {"AutoModel": TitansBackbone},
    TitansForCausalLM: {"AutoModelForCausalLM": TitansForCausalLM, "AutoModel": TitansModel},
    TitansForTimeSeriesPrediction: {"AutoModelForTimeSeriesPrediction": TitansForTimeSeriesPrediction},
    TitansForSequenceClassification: {"AutoModelForSequenceClassification": TitansForSequenceClassification},
}
"""What loads a model: the first class as it is, others without its end."""


def save_alone(model: Any, output: Path | str, example: Mapping[str, Tensor], tokenizer: Any = None) -> float:
    """Writes a folder that appears whole, once what it computes in a process without this package was compared.

    Args:
        model: A TitansBackbone, TitansForCausalLM, TitansForTimeSeriesPrediction or TitansForSequenceClassification;
            left in eval mode.
        output: The folder; an earlier one is replaced.
        example: What the model's forward takes, small: proof.json holds it, and what the model answered.
        tokenizer: Saved beside it.

    Returns:
        The largest difference between both sides.

    Raises:
        ExportError: It is another model, or something stands where the folder should go.
        ProofFailed: The folder computes something else; nothing was written then.
    """
    kind, output = type(model), Path(output)
    if kind not in _AUTO_CLASSES:
        known = ", ".join(one.__name__ for one in _AUTO_CLASSES)
        raise ExportError(f"{kind.__name__} is none of {known}; export a trained run with titans_mcore.hf.convert")
    check_output(output, overwrite=False, inputs=[])
    with torch.inference_mode():
        answer = {name: value for name, value in model.eval()(**example).items() if isinstance(value, Tensor)}
    with staged_folder(output) as staging:
        write_model(model, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        error = prove(staging, auto_class(model), example, answer)
        card = short_card(model.config.to_titans(), model.num_parameters(), auto_class(model), example)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return error


def auto_class(model: Any) -> str:
    """The class of transformers that loads a model's folder."""
    return next(iter(_AUTO_CLASSES[type(model)]))


def write_model(model: Any, folder: Path, max_shard_size: str = "5GB") -> None:
    """Writes weights, settings and code."""
    kind = type(model)
    module = kind.__module__.rpartition(".")[2]
    model.config.auto_map = {"AutoConfig": f"configuration_titans.{kind.config_class.__name__}"}
    model.config.auto_map |= {auto: f"{module}.{one.__name__}" for auto, one in _AUTO_CLASSES[kind].items()}
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors writes for the owner alone
    for name, source in flatten_code(entries=(module, "configuration_titans")).items():
        (folder / name).write_text(source, encoding="utf-8")
