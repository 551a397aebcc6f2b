"""Proof that an exported folder computes what the trained model computes: fixed prompts, logits from both sides."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.hf.errors import ProofFailed

FORMAT = 1
TOLERANCE = 1e-5
_SHOWN = 32  # logits of the last token that proof.json holds of each prompt, spread over the vocabulary
_LONGEST = 1_024


@dataclass(frozen=True)
class Proof:
    """What came out of comparing both sides."""

    max_abs_error: float
    """Largest difference of a logit, sequences read whole and in pieces."""
    continuation: str
    """What generate() of the exported model writes after the text, greedily."""
    content: dict[str, Any]
    """What proof.json holds."""


def prove(
    folder: Path, config: TitansConfig, native: Mapping[str, Tensor], *, bos_id: int, text: str, new_tokens: int
) -> Proof:
    """Compares an exported folder, loaded in a process without this package, with the native model.

    Args:
        folder: The exported folder.
        config: Of the native model.
        native: Its whole weights, fp32.
        bos_id: First token of every prompt.
        text: What generate() continues.
        new_tokens: Tokens to generate.

    Raises:
        ProofFailed: A logit differs by more than TOLERANCE, or the folder could not be loaded.
    """
    prompts, cut = fixed_prompts(config, bos_id), config.chunk_size + 3
    exported, continuation = ask_exported(
        folder, {"prompts": prompts, "cut": cut, "text": text, "new_tokens": new_tokens}
    )
    expected = native_logits(config, native, prompts, cut)
    errors = {name: float((exported[name] - expected[name]).abs().max()) for name in expected}
    # A comparison that holds for not-a-number too.
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if not errors[worst] <= TOLERANCE:
        raise ProofFailed(
            f"the exported model differs from the trained one by {errors[worst]:.3g} in a logit ({worst}); "
            f"at most {TOLERANCE:g} is allowed"
        )
    content = _content(prompts, cut, errors, exported, expected)
    content["continuation"] = {"text": text, "greedy": continuation}
    return Proof(errors[worst], continuation, content)


def fixed_prompts(config: TitansConfig, bos_id: int) -> list[list[int]]:
    """Token ids that are the same for every model of these settings: one token, an open chunk, past a segment."""
    span = max(config.chunk_size, config.segment_length if config.variant == "mac" else config.window)
    generator = torch.Generator().manual_seed(0)
    lengths = (1, config.chunk_size + 1, min(2 * span + config.chunk_size + 3, _LONGEST))
    draws = [torch.randint(config.vocab_size, (length - 1,), generator=generator) for length in lengths]
    return [[bos_id, *draw.tolist()] for draw in draws]


def native_logits(
    config: TitansConfig, weights: Mapping[str, Tensor], prompts: list[list[int]], cut: int
) -> dict[str, Tensor]:
    """Logits (T, V) of the model as it is trained, one process, on the CPU: `whole.I` and `pieces.I` for prompt I."""
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
        logits = {}
        with torch.inference_mode():
            for index, prompt in enumerate(prompts):
                tokens, states, pieces = torch.tensor([prompt]), None, []
                logits[f"whole.{index}"] = model(tokens)[0]
                for piece in tokens.split(cut, 1):
                    out, states = model.stream(piece, states)
                    pieces.append(out[0])
                logits[f"pieces.{index}"] = torch.cat(pieces)
    finally:
        if own:
            stop()
    return logits


def ask_exported(folder: Path, request: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Logits and a continuation from an exported folder, in a process that cannot import this package.

    Raises:
        ProofFailed: The process failed; the message ends with the last line it wrote.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request_file, answers = Path(scratch, "request.json"), Path(scratch, "answers.safetensors")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        # A module cache of its own: transformers may take code that an earlier folder of this name left in it.
        environment = {**os.environ, "HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        result = subprocess.run(
            [sys.executable, "-P", Path(__file__).with_name("probe.py"), folder.resolve(), request_file, answers],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ProofFailed(f"the exported folder could not be loaded and run: {last}")
        with safe_open(answers, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["continuation"]  # noqa: SIM118


def _content(
    prompts: list[list[int]],
    cut: int,
    errors: dict[str, float],
    exported: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> dict[str, Any]:
    import transformers

    shown = torch.linspace(0, expected["whole.0"].shape[-1] - 1, _SHOWN).long().unique()
    return {
        "format": FORMAT,
        "tolerance": TOLERANCE,
        "max_abs_error": max(errors.values()),
        "whole_max_abs_error": max(error for name, error in errors.items() if name.startswith("whole")),
        "pieces_max_abs_error": max(error for name, error in errors.items() if name.startswith("pieces")),
        "piece_tokens": cut,
        "compared_logits": sum(value.numel() for value in expected.values()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "vocabulary_ids": shown.tolist(),
        "prompts": [
            {
                "tokens": prompt,
                "native_last_logits": expected[f"whole.{index}"][-1, shown].tolist(),
                "exported_last_logits": exported[f"whole.{index}"][-1, shown].tolist(),
            }
            for index, prompt in enumerate(prompts)
        ],
    }
