"""What a quickstart run reached: `python -m evals.summary --run RUN` writes RUN/summary.json and prints it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError, parse_settings, run_command


@dataclass(frozen=True)
class SummarySettings:
    """Gathers what the quickstart's steps wrote into one small file, and says what to do next.

    Every number is read from a step's own file. A step that has not run is an error, never an empty cell.
    """

    run: Path
    """Run folder of launch/quickstart.sh."""


def summarise(run: Path) -> dict[str, Any]:
    """The numbers of a finished quickstart, written to RUN/summary.json.

    Raises:
        EvaluationError: A step's file is missing or damaged.
    """
    from evals.report import write_json

    manifest = _read(run / "shards" / "manifest.json")
    records = [json.loads(line) for line in _text(run / "metrics.jsonl").splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    heldout = [record["loss"] for record in records if record["kind"] == "heldout"]
    if not heldout:
        raise EvaluationError(f"{run}/metrics.jsonl has no held-out loss yet; let the training finish")
    niah = _read(run / "eval" / "niah.json")
    summary = {
        "variant": niah["model"]["variant"],
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "unigram_entropy": manifest["unigram_entropy"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "heldout_loss": heldout[-1],
        "heldout_loss_long": _read(run / "eval" / "position_perplexity.json")["loss"],
        "niah": niah["accuracy_by_length"]["niah_single_1"],
        "niah_chance": "a 7-digit number; guessing is 0",
        "export_max_abs_error": _read(run / "hf" / "proof.json")["max_abs_error"],
        "seconds": _seconds(run / "seconds.txt"),
    }
    write_json(run / "summary.json", summary)
    return summary


def describe(run: Path, summary: dict[str, Any]) -> str:
    """The last block of the quickstart."""
    lengths = ", ".join(f"{int(length):,}: {accuracy:.0%}" for length, accuracy in summary["niah"].items())
    gain = summary["unigram_entropy"] - summary["heldout_loss"]
    return f"""
  unigram entropy   {summary["unigram_entropy"]:.3f} nats a token (what counting words alone reaches)
  held-out loss     {summary["heldout_loss"]:.3f} nats a token, {gain:.3f} below, after {summary["tokens"]:,} tokens
  S-NIAH accuracy   {lengths}  (tokens: accuracy; a model this small and this young is expected near 0)
  export            largest difference of a logit {summary["export_max_abs_error"]:.1e}
  seconds           {", ".join(f"{name} {seconds}" for name, seconds in summary["seconds"].items())}

  {run}/config.toml              every setting of the run
  {run}/metrics.jsonl            one line for each step and evaluation
  {run}/checkpoints/             to go on training
  {run}/eval/                    niah.png, niah.json, position_perplexity.png, ...
  {run}/hf/                      the Hugging Face model, proof.json beside it
  {run}/summary.json             this block as JSON

What next?
  Train longer:       bash launch/torchrun.sh --config quickstart --run-dir runs/longer \\
                          --data.path {run}/shards --train.steps 3000
  Another variant:    bash launch/quickstart.sh --variant mag
  Use the export:     .venv/bin/python -c "from transformers import pipeline; \\
                          print(pipeline('text-generation', '{run}/hf', trust_remote_code=True)('def read(')[0])"
"""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EvaluationError(f"{path} is missing; run the step that writes it (bash launch/quickstart.sh)") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as fault:
        raise EvaluationError(f"{path} is not JSON ({fault}); delete it and run its step again") from None


def _seconds(path: Path) -> dict[str, int]:
    """Seconds by step: a step that ran in parts, or again, counts in sum."""
    seconds: dict[str, int] = {}
    for line in _text(path).splitlines():
        name, value = line.split()
        seconds[name] = seconds.get(name, 0) + int(value)
    return seconds


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(SummarySettings, "python -m evals.summary")
    print(describe(settings.run, summarise(settings.run)))


if __name__ == "__main__":
    run_command(main)
