"""Several models' needles on one plot: `python -m evals.niah.comparison --results NAME=FILE ... --output FOLDER`."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError, parse_settings, run_command
from evals.niah.samples import MAIN
from evals.niah.templates import by_name
from evals.report import accuracy_plot, markdown_table, wilson_interval, write_bytes, write_figure

Rows = list[dict[str, Any]]
_MOST_IN_TITLE = 4


@dataclass(frozen=True)
class ComparisonSettings:
    """Puts results of evals.niah beside each other: OUTPUT/accuracy.png and OUTPUT/accuracy.md."""

    results: tuple[str, ...]
    """NAME=FILE each: what the model is called, and its niah.jsonl."""
    output: Path
    """Folder to write to."""
    trained_length: int | None = None
    """Tokens of a training row, marked on the plot."""


def rows_of(name: str, lines: Iterable[str]) -> Rows:
    """A row for each control, task and length of a model's results.

    Args:
        name: The model; a control's rows have it with the control behind a comma.
        lines: JSON records of evals.niah.
    """
    groups: dict[tuple[str, str, int], Rows] = defaultdict(list)
    for line in lines:
        record = json.loads(line)
        groups[record["control"], record["task"], record["length"]].append(record)
    found = sorted(groups.items(), key=lambda group: (group[0][0] != MAIN, group[0]))
    return [_row(name, *group, own) for group, own in found]


def _row(name: str, control: str, task: str, length: int, records: Rows) -> dict[str, Any]:
    hits = sum(record["substring"] for record in records)
    return {
        "model": name if control == MAIN else f"{name}, {control}",
        "task": by_name(task).column,
        "length": length,
        "n": len(records),
        "accuracy": hits / len(records),
        "interval": wilson_interval(hits, len(records)),
        "leading": sum(map(_leading, records)) / len(records),
        "nats_per_token": sum(r["value_loss"] for r in records) / sum(r["value_tokens"] for r in records),
    }


def _leading(record: dict[str, Any]) -> int:
    """Characters of the value, or the first of several, with which the answer's first number (or uuid) begins."""
    first = re.search("[0-9a-f]{4,}[0-9a-f-]*" if "-" in record["value"] else "[0-9]+", record["answer"])
    pairs = zip(record["value"], first[0] if first else "", strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _read(results: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for entry in results:
        name, _, file = entry.partition("=")
        if not name or not Path(file).is_file():
            raise EvaluationError(f"--results {entry}: write NAME=FILE with the niah.jsonl of an evaluation")
        yield from rows_of(name, Path(file).read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(ComparisonSettings, "python -m evals.niah.comparison")
    rows = list(_read(settings.results))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines: dict[str, list[tuple[int, float, tuple[float, float]]]] = {}
    for row in rows:
        model, *control = row["model"].split(", ")
        name = ", ".join([f"{model} {row['task']}" if len(tasks) > 1 else model, *control])
        lines.setdefault(name, []).append((row["length"], row["accuracy"], row["interval"]))
    header = ("model", "task", "length", "n", "accuracy", "95 % interval", "right from the first", "nats a token")
    cells = [
        [
            *(row["model"], row["task"], f"{row['length']:,}", str(row["n"]), f"{row['accuracy']:.3f}"),
            *(f"{row['interval'][0]:.2f}-{row['interval'][1]:.2f}", f"{row['leading']:.2f}"),
            f"{row['nats_per_token']:.3f}",
        ]
        for row in rows
    ]
    write_bytes(settings.output / "accuracy.md", (markdown_table(header, cells) + "\n").encode())
    title = ", ".join(tasks) if len(tasks) <= _MOST_IN_TITLE else "Needles found"
    plot = accuracy_plot(title, lines, settings.trained_length)
    write_figure(settings.output / "accuracy.png", plot)
    print(f"{settings.output}: accuracy.md, accuracy.png")


if __name__ == "__main__":
    run_command(main)
