"""Repeats an exported folder's proof, on any machine: `python -m titans_mcore.hf.verify FOLDER`.

Every file must be the one that was exported, and the model must compute the logits that the trained model computed when
the folder was made; those are in its proof.json. Nothing but the folder is needed.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from titans_mcore.hf.exported import PROOF
from titans_mcore.hf.folder import ExportError, ProofFailed
from titans_mcore.hf.proof import FORMAT, READINGS, Answer, Question, ask_exported, places_of, same_choices
from titans_mcore.hf.save import repeat_proof
from titans_mcore.weights import file_sha256

EXIT_FAILED, EXIT_MISTAKE = 1, 2


@dataclass(frozen=True)
class VerifySettings:
    """Repeats the proof of an exported folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The exported folder."""
    device: str = "cpu"
    """Where the model computes, such as cpu or cuda."""
    tolerance: float = 1e-4
    """Difference of a logit that is allowed, as a share of the largest logit; other processors round otherwise."""


@dataclass(frozen=True)
class Comparison:
    """What a repeated proof found."""

    max_abs_error: float
    """Largest difference of a logit from the trained model's."""
    compared: int
    """Logits compared."""
    allowed: float
    """Largest difference allowed."""
    what: str = "logits, read whole, in pieces and token by token,"
    """What was compared."""


def verify(folder: Path, *, device: str = "cpu", tolerance: float = 1e-4) -> Comparison:
    """Repeats the proof of an exported folder; see VerifySettings for the arguments.

    Raises:
        ExportError: There is no proof that can be read.
        ProofFailed: A file is missing or has changed, the folder could not be loaded, or it computes something else.
    """
    proof = _read(folder)
    _check_files(folder, proof["files"])
    if "auto_class" in proof:  # no language model
        error, compared, allowed = repeat_proof(folder, proof, tolerance)
        return Comparison(error, compared, allowed, "numbers")
    prompts, continuation = proof["prompts"], proof["continuation"]
    question = Question(
        [prompt["tokens"] for prompt in prompts],
        [prompt["native_greedy"] for prompt in prompts],
        proof["piece_tokens"],
        continuation["text"],
        continuation["new_tokens"],
        device,
    )
    answer = ask_exported(folder, question)
    return _compare(proof, question, answer, tolerance)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / PROOF
    try:
        proof = json.loads(file.read_text(encoding="utf-8"))
        written = proof["format"]
    except FileNotFoundError as error:
        raise ExportError(f"{file} is missing; export the folder with its proof") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{file} cannot be read ({error!r}); copy or export the folder again") from error
    if written != FORMAT:
        raise ExportError(f"{file} has format {written}; this version reads format {FORMAT}, export the folder again")
    return proof


def _check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, known in files.items():
        file = folder / name
        if not file.is_file():
            raise ProofFailed(f"{file} is missing; copy or export the folder again")
        if file.stat().st_size != known["bytes"] or file_sha256(file) != known["sha256"]:
            raise ProofFailed(f"{file} is not the file that was exported; copy or export the folder again")


def _compare(proof: dict[str, Any], question: Question, answer: Answer, tolerance: float) -> Comparison:
    shown, error, compared = torch.tensor(proof["vocabulary_ids"]), 0.0, 0
    allowed = tolerance * proof["largest_logit"]
    for index, prompt in enumerate(proof["prompts"]):
        for reading in READINGS:
            theirs = answer.logits[f"{reading}.{index}"]
            ours = torch.tensor(prompt["native_logits"][reading])
            difference = float((theirs[places_of(len(theirs))][:, shown] - ours).abs().max())
            if not difference <= allowed:
                raise ProofFailed(
                    f"prompt {index} read {reading} differs from the trained model by {difference:.3g} in a logit; "
                    f"at most {allowed:.3g} is allowed"
                )
            error, compared = max(error, difference), compared + ours.numel()
        _check_generated(index, question, answer, 2 * allowed)
    return Comparison(error, compared, allowed)


def _check_generated(index: int, question: Question, answer: Answer, tie: float) -> None:
    decoded: Tensor = answer.logits[f"decoded.{index}"]
    if not same_choices(decoded, question.followers[index], answer.generated[index], tie):
        raise ProofFailed(
            f"generate() continues prompt {index} with {answer.generated[index]}, "
            f"the trained model with {question.followers[index]}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see `--help`. Returns the exit status."""
    settings = tyro.cli(
        VerifySettings, args=arguments, prog="python -m titans_mcore.hf.verify", config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        verdict = verify(settings.folder, device=settings.device, tolerance=settings.tolerance)
    except ExportError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return EXIT_MISTAKE
    except ProofFailed as fault:
        print(f"error: {fault}", file=sys.stderr)
        return EXIT_FAILED
    print(
        f"verified {settings.folder} on {settings.device}: {verdict.compared:,} {verdict.what} "
        f"differ from the trained model's by at most {verdict.max_abs_error:.3g} "
        f"({verdict.allowed:.3g} is allowed)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
