"""Folders of models that transformers has trained: weights, code and a proof, for transformers alone.

`save_alone(model, folder, example)` writes one. AutoModelForTimeSeriesPrediction, AutoModelForSequenceClassification,
AutoModelForCausalLM or AutoModel loads it with trust_remote_code where this package is not installed.
"""

import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from titans_mcore.hf.card import short_card
from titans_mcore.hf.flatten import flatten_code
from titans_mcore.hf.folder import ExportError, ProofFailed, check_output, staged_folder
from titans_mcore.hf.modeling_titans import TitansBackbone, TitansForCausalLM
from titans_mcore.hf.proof import FORMAT, TOLERANCE, files_of, largest, run_probe
from titans_mcore.hf.tasks_titans import TitansForSequenceClassification, TitansForTimeSeriesPrediction

_AUTO_CLASSES: dict[type, str] = {
    TitansBackbone: "AutoModel",
    TitansForCausalLM: "AutoModelForCausalLM",
    TitansForTimeSeriesPrediction: "AutoModelForTimeSeriesPrediction",
    TitansForSequenceClassification: "AutoModelForSequenceClassification",
}


def save_alone(
    model: Any,
    output: Path | str,
    example: Mapping[str, Tensor],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
) -> float:
    """Writes a folder that appears whole, once what it computes in a process without this package was compared.

    Args:
        model: A TitansBackbone, TitansForCausalLM, TitansForTimeSeriesPrediction or TitansForSequenceClassification;
            left in eval mode.
        output: The folder; an earlier one is replaced.
        example: What the model's forward takes, small: proof.json holds it, and what the model answered.
        tokenizer: Saved beside it.
        overwrite: Replace whatever folder is there.

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
    check_output(output, overwrite=overwrite, inputs=[])
    module, auto = kind.__module__.rpartition(".")[2], _AUTO_CLASSES[kind]
    model.config.auto_map = {
        "AutoConfig": f"configuration_titans.{kind.config_class.__name__}",
        auto: f"{module}.{kind.__name__}",
    }
    with torch.inference_mode():
        answer = {name: value for name, value in model.eval()(**example).items() if isinstance(value, Tensor)}
    with staged_folder(output) as staging:
        model.save_pretrained(staging)
        for file in staging.glob("*.safetensors"):
            file.chmod((staging / "config.json").stat().st_mode)  # safetensors writes for the owner alone
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        for name, source in flatten_code(entries=(module, "configuration_titans")).items():
            (staging / name).write_text(source, encoding="utf-8")
        card = short_card(model.config.to_titans(), model.num_parameters(), auto, example)
        (staging / "README.md").write_text(card, encoding="utf-8")
        error, _, _ = _difference(staging, auto, example, answer, TOLERANCE)
        proof = {
            "format": FORMAT,
            "auto_class": auto,
            "max_abs_error": error,
            "tolerance_of_largest_output": TOLERANCE,
            "inputs": {name: value.tolist() for name, value in example.items()},
            "outputs": {name: value.tolist() for name, value in answer.items()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "files": files_of(staging),
        }
        (staging / "proof.json").write_text(json.dumps(proof) + "\n", encoding="utf-8")
    return error


def repeat_proof(folder: Path, proof: Mapping[str, Any], tolerance: float) -> tuple[float, int, float]:
    """Compares what a folder computes with what its proof.json says.

    Returns:
        The largest difference, how many numbers were compared, and the difference that is allowed.

    Raises:
        ProofFailed: It differs by more than this share of the largest output, or could not be loaded.
    """
    example, answer = (
        {name: torch.tensor(value) for name, value in proof[side].items()} for side in ("inputs", "outputs")
    )
    return _difference(folder, proof["auto_class"], example, answer, tolerance)


def _difference(
    folder: Path, auto: str, example: Mapping[str, Tensor], answer: Mapping[str, Tensor], tolerance: float
) -> tuple[float, int, float]:
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({name: value.contiguous() for name, value in example.items()}, inputs)
        run_probe(Path(scratch), folder, auto, inputs, outputs)
        found = load_file(outputs)
    errors = {name: float((found[name] - value).abs().max()) for name, value in answer.items()}
    allowed = tolerance * largest(answer.values())
    for name, error in errors.items():
        if not error <= allowed:  # holds for not-a-number too
            raise ProofFailed(f"the folder's model differs by {error:.3g} in {name}; at most {allowed:.3g} is allowed")
    return max(errors.values()), sum(value.numel() for value in answer.values()), allowed
