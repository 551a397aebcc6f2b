"""Proof that an exported folder computes what the trained model computes: fixed prompts, logits from both sides.

Each prompt is read whole, in pieces, and continued token by token. `proof.json` keeps the errors, logits of both sides
and the checksum of every file, so that `python -m titans_mcore.hf.verify` can repeat the comparison anywhere.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.hf.folder import ProofFailed
from titans_mcore.weights import file_sha256

FORMAT = 2
TOLERANCE = 1e-5
"""Of the largest logit, or of 1: products of other shapes round otherwise."""
READINGS = ("whole", "pieces", "decoded")
FOLLOWING = 8  # tokens decoded behind each prompt
_SHOWN, _PLACES = 32, 4  # logits that proof.json holds: so many of the vocabulary, at so many tokens of each reading
_LONGEST = 1_024


@dataclass(frozen=True)
class Question:
    """What both sides are asked."""

    prompts: list[list[int]]
    """Token ids."""
    followers: list[list[int]]
    """Tokens decoded behind each prompt: the native model's greedy ones."""
    cut: int
    """Tokens of a piece."""
    text: str
    """What generate() continues."""
    new_tokens: int
    """Tokens to generate."""
    device: str = "cpu"
    """Where the exported model computes."""


@dataclass(frozen=True)
class Answer:
    """What the exported model says."""

    logits: dict[str, Tensor]
    """`whole.I`, `pieces.I` and `decoded.I` for prompt I, (T, V)."""
    generated: list[list[int]]
    """What generate() puts behind each prompt, greedily."""
    continuation: str
    """What generate() writes behind the text, greedily."""
    transformers: str
    """The version that loaded the folder."""


@dataclass(frozen=True)
class Proof:
    """What came out of comparing both sides."""

    max_abs_error: float
    """Largest difference of a logit: sequences read whole, in pieces and token by token."""
    continuation: str
    """What generate() of the exported model writes after the text, greedily."""
    content: dict[str, Any]
    """What proof.json holds."""


def prove(
    folder: Path,
    config: TitansConfig,
    native: Mapping[str, Tensor],
    *,
    bos_id: int,
    eos_id: int,
    text: str,
    new_tokens: int,
) -> Proof:
    """Compares an exported folder, loaded in a process without this package, with the native model.

    Args:
        folder: The exported folder, complete but for its proof and its README.
        config: Of the native model.
        native: Its whole weights, fp32.
        bos_id: First token of every prompt.
        eos_id: Token that is not generated.
        text: What generate() continues.
        new_tokens: Tokens to generate.

    Raises:
        ProofFailed: A logit differs by more than TOLERANCE allows, generate() chooses other tokens, or the folder could
            not be loaded.
    """
    prompts, cut = fixed_prompts(config, bos_id), config.chunk_size + 3
    expected = native_logits(config, native, prompts, cut, eos_id)
    followers = [choices(expected[f"decoded.{index}"], eos_id) for index in range(len(prompts))]
    question = Question(prompts, followers, cut, text, new_tokens)
    answer = ask_exported(folder, question)
    errors = {name: float((answer.logits[name] - expected[name]).abs().max()) for name in expected}
    allowed = TOLERANCE * largest(expected.values())
    # A comparison that holds for not-a-number too.
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if not errors[worst] <= allowed:
        raise ProofFailed(
            f"the exported model differs from the trained one by {errors[worst]:.3g} in a logit ({worst}); "
            f"at most {allowed:.3g} is allowed"
        )
    for index, generated in enumerate(answer.generated):
        if not same_choices(expected[f"decoded.{index}"], followers[index], generated, 2 * allowed):
            raise ProofFailed(
                f"generate() of the exported model continues prompt {index} with {generated}, "
                f"the trained model with {followers[index]}"
            )
    return Proof(errors[worst], answer.continuation, _content(folder, question, answer, expected, errors, eos_id))


def fixed_prompts(config: TitansConfig, bos_id: int) -> list[list[int]]:
    """Token ids that are the same for every model of these settings: one token, an open chunk, past a segment."""
    span = max(config.chunk_size, *(mixer.reach(config) or config.window for mixer in config.mixers))
    generator = torch.Generator().manual_seed(0)
    lengths = (1, config.chunk_size + 1, min(2 * span + config.chunk_size + 3, _LONGEST))
    draws = [torch.randint(config.vocab_size, (length - 1,), generator=generator) for length in lengths]
    return [[bos_id, *draw.tolist()] for draw in draws]


def native_logits(
    config: TitansConfig, weights: Mapping[str, Tensor], prompts: list[list[int]], cut: int, eos_id: int | None = None
) -> dict[str, Tensor]:
    """Logits (T, V) of the model as it is trained, one process, on the CPU.

    `whole.I` and `pieces.I` are those of prompt I; with an eos_id, `decoded.I` are those from which FOLLOWING tokens
    behind it are chosen, greedily and without that token.
    """
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
                if eos_id is None:
                    continue
                decoded = [pieces[-1][-1:]]
                while len(decoded) < FOLLOWING:
                    out, states = model.stream(torch.tensor([choices(decoded[-1], eos_id)]), states)
                    decoded.append(out[0])
                logits[f"decoded.{index}"] = torch.cat(decoded)
    finally:
        if own:
            stop()
    return logits


def choices(logits: Tensor, eos_id: int) -> list[int]:
    """The most likely tokens by logits (T, V), the end token left out."""
    return logits.index_fill(1, torch.tensor(eos_id), -torch.inf).argmax(-1).tolist()


def same_choices(logits: Tensor, ours: list[int], theirs: list[int], tie: float) -> bool:
    """Whether two greedy continuations are equal up to a token that was chosen among equals.

    Args:
        logits: Those from which `ours` were chosen, (T, V) or a part of the vocabulary with both.
        ours: Tokens.
        theirs: Tokens.
        tie: Difference of logits that counts as none.
    """
    for row, our, their in zip(logits, ours, theirs, strict=True):
        if our != their:
            return abs(float(row[our] - row[their])) <= tie
    return True


def largest(logits: Any) -> float:
    """The largest size of a logit, at least 1: what a tolerance is a share of."""
    return max(1.0, *(float(value.abs().max()) for value in logits))


def ask_exported(folder: Path, question: Question) -> Answer:
    """What an exported folder computes, in a process that cannot import this package.

    Raises:
        ProofFailed: The process failed; the message ends with the last line it wrote.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request_file, answers = Path(scratch, "request.json"), Path(scratch, "answers.safetensors")
        request_file.write_text(json.dumps(asdict(question)), encoding="utf-8")
        run_probe(Path(scratch), folder, request_file, answers)
        with safe_open(answers, "pt") as file:
            words = file.metadata()
            logits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Answer(logits, json.loads(words["generated"]), words["continuation"], words["transformers"])


def run_probe(scratch: Path, folder: Path, *words: Path | str) -> None:
    """Runs probe.py on an exported folder, in a process that cannot import this package.

    Args:
        scratch: An empty folder for what the process needs.
        folder: The exported folder.
        *words: What else the probe takes.

    Raises:
        ProofFailed: The process failed; the message ends with the last line it wrote.
    """
    # A module cache of its own: transformers may take code that an earlier folder of this name left in it.
    environment = {**os.environ, "HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-P", Path(__file__).with_name("probe.py"), folder.resolve(), *words],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ProofFailed(f"the exported folder could not be loaded and run: {last}")


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }


def places_of(tokens: int) -> list[int]:
    """Tokens of a reading whose logits proof.json holds: spread over it, the first and the last among them."""
    return torch.linspace(0, tokens - 1, _PLACES).long().unique().tolist()


def _content(
    folder: Path,
    question: Question,
    answer: Answer,
    expected: Mapping[str, Tensor],
    errors: Mapping[str, float],
    eos_id: int,
) -> dict[str, Any]:
    shown = torch.linspace(0, expected["whole.0"].shape[-1] - 1, _SHOWN).long().unique()

    def kept(logits: Mapping[str, Tensor], name: str) -> list[list[float]]:
        return logits[name][places_of(len(logits[name]))][:, shown].tolist()

    return {
        "format": FORMAT,
        "tolerance_of_largest_logit": TOLERANCE,
        "max_abs_error": max(errors.values()),
        **{
            f"{reading}_max_abs_error": max(error for name, error in errors.items() if name.startswith(reading))
            for reading in READINGS
        },
        "largest_logit": largest(expected.values()),
        "piece_tokens": question.cut,
        "end_token": eos_id,
        "compared_logits": sum(value.numel() for value in expected.values()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": answer.transformers,
        },
        "vocabulary_ids": shown.tolist(),
        "prompts": [
            {
                "tokens": prompt,
                "native_greedy": followers,
                "exported_greedy": generated,
                "native_logits": {reading: kept(expected, f"{reading}.{index}") for reading in READINGS},
                "exported_logits": {reading: kept(answer.logits, f"{reading}.{index}") for reading in READINGS},
            }
            for index, (prompt, followers, generated) in enumerate(
                zip(question.prompts, question.followers, answer.generated, strict=True)
            )
        ],
        "continuation": {"text": question.text, "new_tokens": question.new_tokens, "greedy": answer.continuation},
        "files": files_of(folder),
    }
