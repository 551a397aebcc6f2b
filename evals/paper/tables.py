"""The paper's tables, filled with what other commands found out about models, whose JSON files are read here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.command_line import EvaluationError
from evals.harness.tasks import COLUMNS
from evals.paper import PaperSettings, published
from evals.paper.published import HYBRIDS, TITANS
from evals.report import markdown_table, plus_minus, write_bytes
from titans_mcore.mixers import MIXERS
from titans_mcore.mixers.lmm import Lmm

PAPER, OURS = "paper", "ours"
Number = float | None
_INTRODUCTION = (
    f"Rows marked `paper` are the numbers of {TITANS} or of the paper that a table names; rows marked `ours` were "
    "measured here. An empty cell was not run."
)

KINDS = {"harness": "columns", "niah": "by_length"}
"""Evaluations, whose file is KIND.json, and a field that each has."""


@dataclass(frozen=True)
class ModelResults:
    """One model's results."""

    name: str
    """As the user calls it."""
    reports: Mapping[str, Mapping[str, Any]]
    """By kind; what was not run is missing."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's settings; empty where no result has them."""
        return next((report["model"] for report in self.reports.values() if isinstance(report.get("model"), dict)), {})

    @property
    def variant(self) -> str:
        """The papers' name of the variant; empty when unknown."""
        name = self.config.get("variant", "")
        return MIXERS[name].paper if name in MIXERS else HYBRIDS.get(name, "")


def read_results(name: str, folder: Path) -> ModelResults:
    """All results of a model.

    Raises:
        EvaluationError: The folder is missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise EvaluationError(f"--models {name}={folder}: no such folder")
    found: dict[str, Mapping[str, Any]] = {}
    for kind, field in KINDS.items():
        files = (place / f"{kind}.json" for place in (folder, folder / "eval"))
        if file := next(filter(Path.is_file, files), None):
            found[kind] = _read(file, field)
    return ModelResults(name, found)


def _read(file: Path, field: str) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{file} is not JSON ({error}); delete it and run its evaluation again") from None
    if not isinstance(content, dict) or not isinstance(content.get(field), list):
        raise EvaluationError(f"{file} has no {field!r}; delete it and run its evaluation again")
    return content


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
    """Short name."""
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
        lines = []
        for row in self.rows:
            pairs = zip(row.cells, row.errors or (None,) * len(row.cells), strict=True)
            lines.append([row.label, row.source, *(plus_minus(*pair, self.digits) for pair in pairs)])
        parts = [f"## {self.title}", markdown_table(("model", "source", *self.columns), lines)]
        return "\n\n".join([*parts, *self.notes])


def interleave(papers: published.Rows, ours: Sequence[tuple[str, Row]]) -> tuple[Row, ...]:
    """Our lines, each with the paper's name of what it is, below the paper's line of that name; the rest at the end."""
    rows: list[Row] = []
    for label, cells in papers.items():
        rows += [Row(label, PAPER, cells), *(own for name, own in ours if name == label)]
    return (*rows, *(own for name, own in ours if name not in papers))


Models = Sequence[ModelResults]


def all_tables(models: Models) -> list[Table]:
    """Every table, in the paper's order."""
    return [
        *(language(size, models) for size in published.LANGUAGE),
        *(niah(key, models) for key in published.NIAH),
        ablation(models),
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
    limits = {model.name: model.reports.get("harness", {}).get("settings", {}).get("limit") for model in models}
    notes += [f"{name}: the first {limit} documents of each task alone." for name, limit in limits.items() if limit]
    return Table(
        f"language_{size.lower()}",
        f"Language modelling and common sense, {size}",
        (*(column.title for column in COLUMNS), "avg"),
        interleave(block.rows, rows),
        tuple(notes),
    )


def size_of(config: Mapping[str, Any]) -> str:
    """Which of the published sizes a model's settings are of; the usual one where none."""
    for size, block in published.LANGUAGE.items():
        if all(config.get(name) == value for name, value in block.shape.items()):
            return size
    return published.USUAL_SIZE


def niah(key: str, models: Models) -> Table:
    """Accuracy of the three needle tasks at a paper's lengths."""
    block, rows, notes = published.NIAH[key], [], []
    for model in models:
        found = niah_accuracy(model)
        cells = tuple(map(found.get, block.columns))
        rows.append((model.variant, Row(model.name, OURS, cells)))
        notes += _niah_notes(model)
    return Table(
        key,
        f"S-NIAH, to {max(length for _, length in block.columns) // 1024}K",
        tuple(f"{published.NIAH_TASKS[task]} {length // 1024}K" for task, length in block.columns),
        interleave(block.rows, rows),
        (f"RULER's substring score, percent. The papers' models: {block.at}, {block.source}.", *notes),
        digits=1,
    )


def niah_accuracy(model: ModelResults) -> dict[tuple[str, int], float]:
    """Percent by task and length, controls left out."""
    report = model.reports.get("niah", {})
    return {
        (row.get("task", report.get("task")), row["length"]): 100 * row["accuracy"]
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
        interleave(published.ABLATION, rows),
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
    return fmean(shares) if len(shares) == len(cells) else None


def write_tables(settings: PaperSettings) -> list[Table]:
    """Writes paper.md.

    Raises:
        EvaluationError: A folder is missing, a file is damaged, or no model has any result.
    """
    models = [read_results(name, folder) for name, folder in settings.folders.items()]
    if not any(model.reports for model in models):
        looked = ", ".join(str(folder) for folder in settings.folders.values())
        raise EvaluationError(f"no {' or '.join(f'{kind}.json' for kind in KINDS)} in {looked}; run an evaluation")
    tables = all_tables(models)
    mixed = [model.name for model in models if len({r.get("checkpoint_sha256") for r in model.reports.values()}) > 1]
    parts = ["# Titans: the paper's tables", _INTRODUCTION]
    parts += [f"**{name}** has results of different weights; compare its cells with care." for name in mixed]
    page = "\n\n".join([*parts, *(table.markdown() for table in tables)])
    write_bytes(settings.output / "paper.md", (page + "\n").encode())
    return tables
