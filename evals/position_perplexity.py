"""Loss by position: `python -m evals.position_perplexity --checkpoint RUN --data SHARDS --output DIR`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.command_line import EvaluationError, ModelOptions, check_at_least, parse_settings, run_command

if TYPE_CHECKING:
    from evals.models import EvalModel


@dataclass(frozen=True)
class PositionPerplexitySettings(ModelOptions):
    """Measures held-out loss and perplexity by position: whether a longer past helps, and beyond the trained length.

    Rows are streamed from a fresh state, in constant memory whatever their length, to 2 million tokens and beyond.
    Writes OUTPUT/position_perplexity.json and .png.
    """

    output: Path
    """Folder for position_perplexity.json and .png."""
    data: Path | None = None
    """Folder with heldout.bin and heldout.idx, from `python -m tokenization.encode`: its documents, joined and cut."""
    text: tuple[Path, ...] = ()
    """In place of --data: text files, or folders of .txt files; each that is long enough is a row of its own."""
    tokens: int = 131_072
    """Predict about this many tokens, whole rows; fewer when there are fewer."""
    length: int = 4_096
    """Tokens of a row."""
    batch: int = 8
    """Rows read side by side."""
    piece: int = 512
    """Tokens of each row read at a time; bounds the memory, results do not depend on it."""
    memory_off: bool = False
    """Never write the memory: what the model does without one. What is read of it is its learned beginning."""

    def __post_init__(self) -> None:
        if (self.data is None) == (not self.text):
            raise EvaluationError("give either --data, a folder of shards, or --text, files or folders of long texts")
        check_at_least(1, self, "tokens", "length", "batch", "piece")


def evaluate(model: "EvalModel", settings: PositionPerplexitySettings) -> dict[str, Any]:
    """Measures and writes the report.

    Returns:
        What position_perplexity.json holds.

    Raises:
        EvaluationError: The shards are missing, too short, or not of this model's tokenizer; a memory is to be off and
            there is none.
    """
    from evals.measure import PeakMemory
    from evals.niah.controls import controlled
    from evals.niah.samples import MAIN
    from evals.position_loss import bucket_intervals, row_losses, stretch_ends, summarise
    from evals.report import loss_plot, settings_of, write_figure, write_json
    from evals.tokens import heldout_rows, text_rows

    most = max(settings.tokens // settings.length, 1)
    if settings.data is None:
        rows = text_rows(settings.text, model, most, settings.length)
    else:
        rows = heldout_rows(settings.data, model, most, settings.length)
    ends = stretch_ends(settings.length, model.trained_length)
    peak = PeakMemory(model.device)
    if settings.memory_off and not any(mixer.memory for mixer in model.config.mixers):
        raise EvaluationError(f"--memory-off: variant {model.config.variant} has no memory; leave it out")
    with controlled(model, "memory_off" if settings.memory_off else MAIN) as changed:
        sums = row_losses(changed, rows, settings.batch, settings.piece, ends)
    summary = summarise(sums.sum(0), ends, len(rows), model.trained_length)
    buckets = summary["buckets"]
    for bucket, interval in zip(buckets, bucket_intervals(sums, ends, [b["last"] for b in buckets]), strict=True):
        bucket["interval"] = interval
    report = {
        **summary,
        "rows": len(rows),
        "length": settings.length,
        "source": "text" if settings.text else "joined",
        "peak_bytes": peak.bytes(),
        **model.facts(),
        "settings": settings_of(settings),
    }
    write_json(settings.output / "position_perplexity.json", report)
    plot = loss_plot(f"Loss by position ({model.config.variant})", {"": buckets}, model.trained_length)
    write_figure(settings.output / "position_perplexity.png", plot)
    return report


def report_table(report: dict[str, Any]) -> str:
    """A line for each bucket of positions."""
    from evals.report import table

    rows = [
        [
            f"{b['first']:,}-{b['last']:,}",
            f"{b['tokens']:,}",
            f"{b['loss']:.4f}",
            "" if b["perplexity"] is None else f"{b['perplexity']:.2f}",
        ]
        for b in report["buckets"]
    ]
    return table(("tokens read", "predicted", "loss (nats)", "perplexity"), rows)


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(PositionPerplexitySettings, "python -m evals.position_perplexity")
    report = evaluate(settings.load(), settings)
    print(report_table(report))
    print(f"loss {report['loss']:.4f} nats/token over {report['tokens']:,} tokens")
    print(f"{settings.output / 'position_perplexity.json'}, .png", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
