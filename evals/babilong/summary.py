"""From raw results to the report: accuracy by task and length with intervals, costs, table and plot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evals.babilong import PAPER_TASKS, BabilongSettings
from evals.babilong.texts import StoryResult, Texts
from evals.models import EvalModel
from evals.report import (
    bytes_text,
    markdown_table,
    settings_of,
    table,
    wilson_interval,
    write_bytes,
    write_figure,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def summarise(records: Sequence[StoryResult]) -> dict[str, Any]:
    """Every number of the report that comes from the results.

    Args:
        records: Results of one model on the same texts; at least one.

    Returns:
        `cells`, one a task and length; and `by_length` with the mean over the paper's five tasks, None where one of
        them is missing.
    """
    lengths = sorted({record.length for record in records})
    tasks = sorted({record.task for record in records}, key=lambda task: int(task[2:]))
    cells = [
        {"task": task, "length": length, **_accuracy(own)}
        for length in lengths
        for task in tasks
        if (own := [record for record in records if (record.task, record.length) == (task, length)])
    ]
    by_length = []
    for length in lengths:
        found = {cell["task"]: cell["accuracy"] for cell in cells if cell["length"] == length}
        whole = all(task in found for task in PAPER_TASKS)
        mean = sum(found[task] for task in PAPER_TASKS) / len(PAPER_TASKS) if whole else None
        own = [record for record in records if record.length == length]
        by_length.append({"length": length, "mean_qa1_to_qa5": mean, "n": len(own), **_costs(own)})
    return {"tasks": tasks, "cells": cells, "by_length": by_length}


def write_report(
    model: EvalModel, settings: BabilongSettings, texts: Texts, records: Sequence[StoryResult]
) -> dict[str, Any]:
    """Writes babilong.json, .md and .png, and returns what the JSON holds."""
    report = {
        "score": "BABILong: labels of the answer's first sentence, without the question's, are the target's",
        **summarise(records),
        **asdict(next(iter(texts.identities.values()))),
        "stories_sha256": {task: identity.stories_sha256 for task, identity in texts.identities.items()},
        "background_tokens": texts.background.tokens,
        "trained_length": model.trained_length,
        "checkpoint": model.checkpoint,
        "model": model.config.to_dict(),
        "device": model.device.type,
        "settings": settings_of(settings),
    }
    write_json(settings.output / "babilong.json", report)
    write_bytes(settings.output / "babilong.md", _markdown(report).encode())
    write_figure(settings.output / "babilong.png", _plot(report))
    return report


def report_table(report: Mapping[str, Any]) -> str:
    """A line for each length: accuracy by task, their mean, and what it cost."""
    header, *rows = _lines(report)
    return table(header, rows)


def _lines(report: Mapping[str, Any]) -> Iterable[list[str]]:
    yield ["length", *report["tasks"], "mean qa1-5", "n", "prefill tok/s", "decode ms/tok", "peak memory"]
    cells = {(cell["task"], cell["length"]): cell["accuracy"] for cell in report["cells"]}
    for row in report["by_length"]:
        yield [
            f"{row['length']:,}",
            *(_share(cells.get((task, row["length"]))) for task in report["tasks"]),
            *(_share(row["mean_qa1_to_qa5"]), str(row["n"])),
            *(f"{row['prefill_tokens_per_second']:,.0f}", f"{row['decode_ms_per_token']:.1f}"),
            bytes_text(row["peak_bytes"]),
        ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _markdown(report: Mapping[str, Any]) -> str:
    header, *rows = _lines(report)
    title = f"# BABILong ({report['model']['variant']})"
    facts = f"Lengths in tokens of: {report['length_tokenizer']}. Checkpoint `{report['checkpoint']}`."
    return "\n\n".join((title, facts, markdown_table(header, rows))) + "\n"


def _plot(report: Mapping[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for task in report["tasks"]:
        own = [cell for cell in report["cells"] if cell["task"] == task]
        axes.plot([cell["length"] for cell in own], [cell["accuracy"] for cell in own], marker="o", ms=3, label=task)
    means = [row for row in report["by_length"] if row["mean_qa1_to_qa5"] is not None]
    values = [row["mean_qa1_to_qa5"] for row in means]
    axes.plot([row["length"] for row in means], values, color="black", linewidth=2, marker="o", label="mean qa1-5")
    axes.set_xscale("symlog", linthresh=1000)  # 0 tokens are a length, too
    title = f"BABILong ({report['model']['variant']})"
    axes.set(xlabel="length (tokens)", ylabel="accuracy", ylim=(-0.03, 1.03), title=title)
    if report["trained_length"] is not None:
        axes.axvline(report["trained_length"], color="black", linestyle="--", label="trained length")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _accuracy(records: Sequence[StoryResult]) -> dict[str, Any]:
    n, hits = len(records), sum(record.correct for record in records)
    return {"accuracy": hits / n, "n": n, "interval": list(wilson_interval(hits, n))}


def _costs(records: Sequence[StoryResult]) -> dict[str, Any]:
    """Speed and memory of one length. Each record has its batch's time, so it stands for a share of it."""
    seconds = sum(record.prefill_seconds / record.batch for record in records)
    return {
        "prompt_tokens": max(record.prompt_tokens for record in records),
        "prefill_tokens_per_second": sum(record.prompt_tokens for record in records) / seconds,
        "decode_ms_per_token": sum(record.decode_ms_per_token for record in records) / len(records),
        "peak_bytes": max(record.peak_bytes for record in records),
        "state_bytes_per_sample": max(record.state_bytes_per_sample for record in records),
    }
