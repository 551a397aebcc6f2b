"""Proof that an exported folder computes what the model computed that it was made of.

The folder is loaded in a process that cannot import this package and given an example. `proof.json` keeps the example,
outputs and the checksum of every file, so that `python -m titans_mcore.hf.verify` can repeat the comparison anywhere.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.hf.folder import ProofFailed
from titans_mcore.io import sha256_of

FORMAT = 3
TOLERANCE = 1e-5
"""Of the largest output, or of 1: products of other shapes round otherwise."""
_SHOWN = 4_096  # numbers that proof.json holds of an output, spread over it
_LONGEST = 1_024


class Comparison(NamedTuple):
    """What came out of comparing outputs.

    Attributes:
        max_abs_error: The largest difference.
        allowed: The largest that is allowed.
        compared: Numbers compared.
    """

    max_abs_error: float
    allowed: float
    compared: int


def prove(folder: Path, auto_class: str, example: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> float:
    """Compares what a folder computes with what its model computed, and writes its proof.json.

    Args:
        folder: Complete but for its proof and its README.
        auto_class: Of transformers, which loads it.
        example: What its forward takes, small.
        outputs: What the model gave for it, by name.

    Returns:
        The largest difference.

    Raises:
        ProofFailed: They differ by more than TOLERANCE allows, or the folder could not be loaded.
    """
    largest = max(1.0, *(float(value.abs().max()) for value in outputs.values()))
    found = compare(outputs_of(folder, auto_class, example), outputs, TOLERANCE * largest)
    proof = {
        "format": FORMAT,
        "auto_class": auto_class,
        "max_abs_error": found.max_abs_error,
        "tolerance_of_largest_output": TOLERANCE,
        "largest_output": largest,
        "compared": found.compared,
        "inputs": {name: value.tolist() for name, value in example.items()},
        "outputs": {name: shown(value).tolist() for name, value in outputs.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "files": files_of(folder),
    }
    (folder / "proof.json").write_text(json.dumps(proof) + "\n", encoding="utf-8")
    return found.max_abs_error


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float) -> Comparison:
    """Compares outputs by name.

    Raises:
        ProofFailed: One differs by more than is allowed; the message names it.
    """
    errors = {name: float((found[name] - value).abs().max()) for name, value in expected.items()}
    for name, error in errors.items():
        if not error <= allowed:  # holds for not-a-number too
            raise ProofFailed(
                f"the exported model differs from the trained one by {error:.3g} in {name}; "
                f"at most {allowed:.3g} is allowed"
            )
    return Comparison(max(errors.values()), allowed, sum(value.numel() for value in expected.values()))


def shown(output: Tensor) -> Tensor:
    """The numbers of an output that proof.json holds, (n,): all of a small one, of others some, spread evenly."""
    numbers = output.flatten()
    return numbers[torch.linspace(0, len(numbers) - 1, min(_SHOWN, len(numbers)), dtype=torch.float64).long()]


def outputs_of(folder: Path, auto_class: str, example: Mapping[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """Every tensor that a folder's model gives, in a process that cannot import this package (probe.py).

    Raises:
        ProofFailed: The process failed; the message ends with the last line it wrote.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({name: value.contiguous() for name, value in example.items()}, inputs)
        # A module cache of its own: transformers may take code that an earlier folder of this name left in it.
        environment = {**os.environ, "HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        script, words = Path(__file__).with_name("probe.py"), (folder.resolve(), auto_class, inputs, outputs, device)
        result = subprocess.run(
            [sys.executable, "-P", script, *words], cwd=scratch, env=environment, capture_output=True, text=True
        )
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ProofFailed(f"the exported folder could not be loaded and run: {last}")
        return load_file(outputs)


def fixed_prompt(config: TitansConfig, bos_id: int) -> list[int]:
    """Token ids that are the same for every model of these settings: past a segment, to within an open chunk."""
    span = max(config.chunk_size, *(mixer.reach(config) or config.window for mixer in config.mixers))
    length = min(2 * span + config.chunk_size + 3, _LONGEST)
    draw = torch.randint(config.vocab_size, (length - 1,), generator=torch.Generator().manual_seed(0))
    return [bos_id, *draw.tolist()]


def native_logits(config: TitansConfig, weights: Mapping[str, Tensor], prompt: list[int]) -> Tensor:
    """Logits (T, V) of the model as it is trained, one process, on the CPU."""
    # Imported at use: exporting without a proof needs no Megatron.
    from titans_mcore.parallel import start, stop, transformer_config  # isort: skip - it quietens Megatron's import
    from megatron.core import parallel_state

    from titans_mcore.model import TitansModel
    from titans_mcore.weights import load_into

    own = not parallel_state.model_parallel_is_initialized()
    if own:
        start(1, seed=0)
    try:
        model = TitansModel(config, transformer_config(config)).eval()
        load_into(model, weights)
        with torch.inference_mode():
            return model(torch.tensor([prompt]))[0]
    finally:
        if own:
            stop()


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
