"""The paper's tables, filled with what was found out about models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from evals.harness.tasks import COLUMNS
from evals.paper import published
from evals.paper.results import ModelResults
from evals.report import markdown_table
from titans_mcore.mixers.lmm import Lmm

PAPER, OURS = "paper", "ours"
Number = float | None


@dataclass(frozen=True)
class Row:
    """One line."""

    label: str
    """Which model."""
    source: str
    """PAPER or OURS."""
    cells: tuple[Number, ...]
    """One a column; None was not run."""
    errors: tuple[Number, ...] = ()
    """Standard errors, where there are any; one a column."""


@dataclass(frozen=True)
class Table:
    """One of the paper's tables."""

    key: str
    """Short name, of its plot's file too."""
    title: str
    """Heading."""
    columns: tuple[str, ...]
    """Headings of the cells."""
    rows: tuple[Row, ...]
    """Lines."""
    notes: tuple[str, ...] = ()
    """What a reader has to know, below it."""
    digits: int = 2
    """Behind the point."""

    def markdown(self) -> str:
        """The table under its heading."""
        lines = [
            [row.label, row.source, *map(self._text, row.cells, row.errors or (None,) * len(row.cells))]
            for row in self.rows
        ]
        parts = [f"## {self.title}", markdown_table(("model", "source", *self.columns), lines)]
        return "\n\n".join([*parts, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Every cell, by its column's heading."""
        rows = [
            {
                "model": row.label,
                "source": row.source,
                "cells": dict(zip(self.columns, row.cells, strict=True)),
                "stderr": dict(zip(self.columns, row.errors, strict=True)) if row.errors else {},
            }
            for row in self.rows
        ]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}

    def _text(self, cell: Number, error: Number) -> str:
        if cell is None:
            return ""
        return f"{cell:,.{self.digits}f}" + ("" if error is None else f" ± {error:,.{self.digits}f}")


def paper_rows(numbers: Mapping[str, tuple[float, ...]]) -> list[Row]:
    """The paper's own lines."""
    return [Row(label, PAPER, cells) for label, cells in numbers.items()]


def interleave(published: Sequence[Row], ours: Sequence[tuple[str, Row]]) -> tuple[Row, ...]:
    """Our lines, each with the paper's name of what it is, below the paper's line of that name; the rest at the end."""
    rows: list[Row] = []
    for row in published:
        rows += [row, *(own for name, own in ours if name == row.label)]
    labels = {row.label for row in published}
    return (*rows, *(own for name, own in ours if name not in labels))


Models = Sequence[ModelResults]
FIGURE = "The paper shows this as a figure, without numbers."


def all_tables(models: Models) -> list[Table]:
    """Every table, in the paper's order."""
    return [
        *(language(size, models) for size in published.LANGUAGE),
        *(niah(key, models) for key in published.NIAH),
        babilong(models),
        ablation(models),
        efficiency(models),
        depth(models),
    ]


def language(size: str, models: Models) -> Table:
    """Perplexities and accuracies of the nine tasks, of models of one size."""
    block, rows = published.LANGUAGE[size], []
    for model in models:
        if size_of(model.config) != size:
            continue
        report = model.reports.get("harness", {})
        found = {column["title"]: column for column in report.get("columns", ())}
        cells = [*(found.get(column.title, {}) for column in COLUMNS), report.get("average", {})]
        values, errors = (tuple(cell.get(name) for cell in cells) for name in ("value", "stderr"))
        rows.append((model.variant, Row(model.name, OURS, values, errors)))
    notes = [f"The papers' models: {block.at}, {block.source}. Ours: zero-shot, ± one standard error."]
    notes += wrong_averages(block.rows)
    limits = {model.name: model.reports.get("harness", {}).get("settings", {}).get("limit") for model in models}
    notes += [f"{name}: the first {limit} documents of each task alone." for name, limit in limits.items() if limit]
    return Table(
        f"language_{size.lower()}",
        f"Language modelling and common sense, {size}",
        (*(column.title for column in COLUMNS), "avg"),
        interleave(paper_rows(block.rows), rows),
        tuple(notes),
    )


def size_of(config: Mapping[str, Any]) -> str:
    """Which of the published sizes a model's settings are of; the usual one where none."""
    for size, block in published.LANGUAGE.items():
        if all(config.get(name) == value for name, value in block.shape.items()):
            return size
    return published.USUAL_SIZE


def wrong_averages(rows: published.Rows) -> list[str]:
    """A note for each printed average that is not that of its row, rounding aside."""
    accuracies = [place for place, column in enumerate(COLUMNS) if column.accuracy]
    means = {label: fmean(row[place] for place in accuracies) for label, row in rows.items()}
    return [
        f"{label}: avg is {row[-1]} as printed; the mean of its row is {means[label]:.2f}."
        for label, row in rows.items()
        if abs(row[-1] - means[label]) > 0.02
    ]


def niah(key: str, models: Models) -> Table:
    """Accuracy of the three needle tasks at a paper's lengths."""
    block, rows, notes = published.NIAH[key], [], []
    for model in models:
        found = niah_accuracy(model)
        cells = tuple(_percent(found.get(cell)) for cell in block.columns)
        rows.append((model.variant, Row(model.name, OURS, cells)))
        notes += _niah_notes(model)
    return Table(
        key,
        f"S-NIAH, to {max(length for _, length in block.columns) // 1024}K",
        tuple(f"{published.NIAH_TASKS[task]} {length // 1024}K" for task, length in block.columns),
        interleave(paper_rows(block.rows), rows),
        (f"RULER's substring score, percent. The papers' models: {block.at}, {block.source}.", *notes),
        digits=1,
    )


def niah_accuracy(model: ModelResults) -> dict[tuple[str, int], float]:
    """Shares by task and length, controls left out."""
    report = model.reports.get("niah", {})
    return {
        (row.get("task", report.get("task")), row["length"]): row["accuracy"]
        for row in report.get("by_length", ())
        if not row.get("control") or row["control"] == "none"
    }


def _niah_notes(model: ModelResults) -> list[str]:
    report = model.reports.get("niah")
    if report is None:
        return []
    samples = sorted({row["n"] for row in report["by_length"]})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    stacks = {row["label"] for row in report.get("haystacks", {}).values()} or {report.get("haystack", "unknown")}
    return [f"{model.name}: {count} samples a cell, haystacks: {', '.join(sorted(stacks))}."]


def babilong(models: Models) -> Table:
    """Mean accuracy over qa1 to qa5 by length."""
    means = {model.name: babilong_means(model) for model in models}
    lengths = sorted({length for found in means.values() for length in found})
    rows, notes = [], []
    for model in models:
        report = model.reports.get("babilong", {})
        label = f"{model.name} (simulated)" if report.get("simulated") else model.name
        rows.append(Row(label, OURS, tuple(_percent(means[model.name].get(length)) for length in lengths)))
        if report:
            notes.append(f"{label}: stories {report['stories']}, background {report['background']}.")
    columns = tuple(_length(length) for length in lengths)
    title = "BABILong, mean accuracy of qa1 to qa5"
    return Table("babilong", title, columns, tuple(rows), (FIGURE, *notes), digits=1)


def babilong_means(model: ModelResults) -> dict[int, Number]:
    """Shares by length; None where one of the five tasks is missing."""
    return {row["length"]: row["mean_qa1_to_qa5"] for row in model.reports.get("babilong", {}).get("by_length", ())}


def ablation(models: Models) -> Table:
    """What each part of the memory is worth."""
    rows = []
    for model in models:
        part = ablated(model.config)
        if part is not None:
            rows.append((part, Row(model.name, OURS, (_mean_perplexity(model), _mean_needles(model)))))
    return Table(
        "ablation",
        "Ablation of the neural memory",
        ("ppl", "long context"),
        interleave(paper_rows(published.ABLATION), rows),
        (
            f"The paper's models: {published.ABLATION_AT}. ppl: mean of wikitext and LAMBADA; long context: mean of "
            "the twelve S-NIAH cells.",
        ),
    )


def ablated(config: Mapping[str, Any]) -> str | None:
    """Which line of the ablation a model is; None for one that is none of them."""
    if config.get("variant") != Lmm.name:
        return None
    left_out = {
        "linear memory": config.get("memory_depth") == 1,
        "no convolution": config.get("conv_kernel") == 1,
        "no momentum": config.get("memory_momentum") is False,
        "no weight decay": config.get("memory_forgetting") is False,
        "no persistent tokens": config.get("persistent_tokens") == 0,
    }
    found = [part for part, out in left_out.items() if out]
    return None if len(found) > 1 else [*found, "LMM"][0]


def _mean_perplexity(model: ModelResults) -> Number:
    columns = model.reports.get("harness", {}).get("columns", ())
    values = [column["value"] for column in columns if not column["accuracy"]]
    return fmean(values) if len(values) == 2 and None not in values else None


def _mean_needles(model: ModelResults) -> Number:
    found = niah_accuracy(model)
    cells = [found.get((task, length)) for task in published.NIAH_TASKS for length in published.NIAH_LENGTHS]
    shares = [cell for cell in cells if cell is not None]
    return 100 * fmean(shares) if len(shares) == len(cells) else None


MEASURES = {
    "prefill_tokens_per_second": ("prefill tokens/s", 1.0),
    "decode_ms": ("decode ms/token", 1.0),
    "peak_bytes": ("peak MB", 1e-6),
}


def efficiency(models: Models) -> Table:
    """Speed and memory against length."""
    points = efficiency_points(models)
    lengths = sorted({length for lines in points.values() for line in lines.values() for length in line})
    rows = tuple(
        Row(f"{label}, {MEASURES[measure][0]}", OURS, tuple(line.get(length) for length in lengths))
        for label, lines in points.items()
        for measure, line in lines.items()
    )
    columns = tuple(_length(length, 1024) for length in lengths)
    return Table("efficiency", "Efficiency against length", columns, rows, (FIGURE,), digits=1)


def efficiency_points(models: Models) -> dict[str, dict[str, dict[int, Number]]]:
    """By model and measure, numbers by length; what was not run is None."""
    points: dict[str, dict[str, dict[int, Number]]] = {}
    for model in models:
        for row in model.reports.get("context", {}).get("rows", ()):
            label = model.name if row["model"] == model.name else f"{model.name} ({row['model']})"
            for measure, (_, scale) in MEASURES.items():
                value = row.get(measure)
                number = value * scale if isinstance(value, int | float) else None
                points.setdefault(label, {}).setdefault(measure, {})[row["length"]] = number
    return points


def depth(models: Models) -> Table:
    """Perplexity by position for memories of different depth."""
    chosen = sorted(
        (model for model in models if model.mixer is not None and model.mixer.memory),
        key=lambda model: (model.config["variant"], model.config.get("memory_depth", 0)),
    )
    curves = {model.name: perplexity_by_position(model) for model in chosen}
    ends = sorted({end for curve in curves.values() for end in curve if end >= 128})
    rows = tuple(
        Row(
            f"{model.name}: {model.variant}, L_M = {model.config.get('memory_depth')}",
            OURS,
            tuple(curves[model.name].get(end) for end in ends),
        )
        for model in chosen
    )
    columns = tuple(f"to {end:,}" for end in ends)
    notes = (FIGURE, "Perplexity of the tokens from half of a column's position to it.")
    return Table("depth", "Effect of the memory's depth", columns, rows, notes)


def perplexity_by_position(model: ModelResults) -> dict[int, Number]:
    """Perplexity of whole buckets, by their ends."""
    buckets = model.reports.get("position_perplexity", {}).get("buckets", ())
    return {b["last"]: b["perplexity"] for b in buckets if 2 * (b["first"] - 1) == b["last"]}


def _percent(share: Number) -> Number:
    return None if share is None else 100 * share


def _length(length: int, thousand: int = 1000) -> str:
    for unit, size in (("M", thousand**2), ("K", thousand)):
        if length >= size:
            return f"{length / size:g}{unit}"
    return f"{length}"
