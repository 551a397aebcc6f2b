"""Held-out loss by position: `python -m evals.position_perplexity --checkpoint RUN --data SHARDS --output DIR`."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.command_line import EvaluationError, parse_settings, run_command

if TYPE_CHECKING:
    from evals.models import EvalModel


@dataclass(frozen=True)
class PositionPerplexitySettings:
    """Measures held-out loss and perplexity by position: whether a longer past helps, and beyond the trained length.

    Held-out documents, joined in their order, are cut into rows that are streamed from a fresh state. Writes
    OUTPUT/position_perplexity.json and .png.
    """

    checkpoint: Path
    """Run folder (its newest checkpoint is taken) or one checkpoint folder."""
    data: Path
    """Folder with heldout.bin and heldout.idx, from `python -m tokenization.encode`."""
    output: Path
    """Folder for position_perplexity.json and position_perplexity.png."""
    tokens: int = 131_072
    """Predict about this many tokens, whole rows; fewer when there are fewer."""
    length: int = 4_096
    """Tokens of a row."""
    batch: int = 8
    """Rows read side by side."""
    piece: int = 512
    """Tokens of each row read at a time; bounds the memory, results do not depend on it."""
    tokenizer: Path | None = None
    """Tokenizer file; by default RUN/tokenizer/tokenizer.model."""

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "batch", "piece"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"--{name} is {getattr(self, name)}; give at least 1")


def evaluate(model: "EvalModel", settings: PositionPerplexitySettings) -> dict[str, Any]:
    """Measures and writes the report.

    Returns:
        What position_perplexity.json holds.

    Raises:
        EvaluationError: The shards are missing, too short, or not of this model's tokenizer.
    """
    from evals.position_loss import heldout_rows, loss_by_position, summarise
    from evals.report import loss_plot, write_figure, write_json

    rows = heldout_rows(settings.data, model, max(settings.tokens // settings.length, 1), settings.length)
    losses = loss_by_position(model, rows, settings.batch, settings.piece)
    summary = summarise(losses, len(rows), model.trained_length)
    report = {
        **summary,
        "rows": len(rows),
        "length": settings.length,
        "trained_length": model.trained_length,
        "checkpoint": model.checkpoint,
        "checkpoint_sha256": model.checkpoint_sha256,
        "tokenizer_sha256": model.tokenizer.sha256,
        "model": model.config.to_dict(),
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
        },
    }
    write_json(settings.output / "position_perplexity.json", report)
    ends = [bucket["last"] for bucket in summary["buckets"]]
    plot = loss_plot(
        f"Held-out loss by position ({model.config.variant})",
        ends,
        [bucket["loss"] for bucket in summary["buckets"]],
        model.trained_length,
    )
    write_figure(settings.output / "position_perplexity.png", plot)
    return report


def report_table(report: dict[str, Any]) -> str:
    """A line for each bucket of positions."""
    from evals.report import table

    rows = [
        [f"{b['first']:,}-{b['last']:,}", f"{b['tokens']:,}", f"{b['loss']:.4f}", f"{b['perplexity']:.2f}"]
        for b in report["buckets"]
    ]
    return table(("tokens read", "predicted", "loss (nats)", "perplexity"), rows)


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(PositionPerplexitySettings, "python -m evals.position_perplexity")
    from evals.models import load_model

    report = evaluate(load_model(settings.checkpoint, settings.tokenizer), settings)
    print(report_table(report))
    print(f"held-out loss {report['loss']:.4f} nats/token over {report['tokens']:,} tokens")
    print(f"{settings.output / 'position_perplexity.json'}, position_perplexity.png", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
