"""From results to the page: gather, tabulate, plot, write.

In plots the paper's lines are dashed and ours solid; what was not run is not drawn.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evals.command_line import EvaluationError
from evals.paper import PaperSettings, published
from evals.paper.published import TITANS
from evals.paper.results import ModelResults, places, read_results
from evals.paper.tables import (
    MEASURES,
    OURS,
    PAPER,
    Number,
    Table,
    all_tables,
    babilong_means,
    efficiency_points,
    niah_accuracy,
    perplexity_by_position,
)
from evals.report import write_bytes, write_figure, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Mapping[int, Number]
_INTRODUCTION = (
    f"Rows marked `paper` are the numbers of {TITANS} or of the paper that a table names; rows marked `ours` were "
    "measured here. An empty cell was not run."
)


def write_tables(settings: PaperSettings) -> list[Table]:
    """Writes paper.md, paper.json and a plot for each table that has results of ours.

    Raises:
        EvaluationError: A folder is missing, a file is damaged, or no model has any result.
    """
    models = [read_results(name, folder, settings.output) for name, folder in settings.folders.items()]
    if not any(model.reports for model in models):
        pairs = settings.folders.items()
        looked = [str(place) for name, folder in pairs for place in places(name, folder, settings.output)]
        raise EvaluationError(f"no results in {', '.join(looked)}; run an evaluation, or add --run")
    tables = all_tables(models)
    plots = all_plots({table.key: table for table in tables}, models)
    write_json(
        settings.output / "paper.json",
        {"models": _sources(models), "tables": {table.key: table.to_json() for table in tables}},
    )
    write_bytes(settings.output / "paper.md", _page(tables, set(plots), models).encode())
    for key, figure in plots.items():
        write_figure(settings.output / f"{key}.png", figure)
    return tables


def _sources(models: Sequence[ModelResults]) -> list[dict[str, Any]]:
    """Where every model's results come from."""
    return [
        {
            "name": model.name,
            "variant": model.config.get("variant"),
            "model": dict(model.config),
            "checkpoints": {kind: report.get("checkpoint") for kind, report in model.reports.items()},
            "weights": sorted(
                {str(r["checkpoint_sha256"]) for r in model.reports.values() if "checkpoint_sha256" in r}
            ),
        }
        for model in models
    ]


def _page(tables: Sequence[Table], plots: set[str], models: Sequence[ModelResults]) -> str:
    parts = ["# Titans: the paper's tables", _INTRODUCTION]
    mixed = [source["name"] for source in _sources(models) if len(source["weights"]) > 1]
    parts += [f"**{name}** has results of different weights; compare its cells with care." for name in mixed]
    for table in tables:
        parts.append(table.markdown())
        if table.key in plots:
            parts.append(f"![{table.title}]({table.key}.png)")
    return "\n\n".join(parts) + "\n"


def all_plots(tables: Mapping[str, Table], models: Sequence[ModelResults]) -> dict[str, "Figure"]:
    """Plots by their tables' keys; none where nothing of ours is in it."""
    by_position = {model.name: perplexity_by_position(model) for model in models}
    points = efficiency_points(models)
    panels = {
        title: {label: lines.get(measure, {}) for label, lines in points.items()}
        for measure, (title, _) in MEASURES.items()
    }
    plots = {
        **{key: _bars(table, [len(table.columns) - 1]) for key, table in tables.items() if key.startswith("language")},
        **{key: _needles(key, tables[key], models) for key in published.NIAH},
        "babilong": _lengths(tables["babilong"].title, {"accuracy (%)": _babilong_lines(models)}),
        "ablation": _bars(tables["ablation"], [0, 1]),
        "efficiency": _lengths("Efficiency against length", panels),
        "depth": _lengths("Perplexity by position", {"perplexity": by_position}, "tokens read"),
    }
    ours = {key: [row.cells for row in table.rows if row.source == OURS] for key, table in tables.items()}
    return {key: plots[key] for key, rows in ours.items() if any(cell is not None for cells in rows for cell in cells)}


def _figure(panels: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.2 * panels, 4), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _bars(table: Table, columns: Sequence[int]) -> "Figure":
    """A panel for each column, a bar for each line that has it."""
    figure, panels = _figure(len(columns))
    for axes, column in zip(panels, columns, strict=True):
        rows = [row for row in table.rows if row.cells[column] is not None]
        colours = ["tab:gray" if row.source == PAPER else "tab:blue" for row in rows]
        errors = [(row.errors[column] if row.errors else None) or 0.0 for row in rows]
        labels = [f"{row.label} ({row.source})" for row in rows]
        axes.barh(range(len(rows)), [row.cells[column] or 0.0 for row in rows], xerr=errors, color=colours)
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(table.columns[column])
    figure.suptitle(table.title)
    return figure


def _needles(key: str, table: Table, models: Sequence[ModelResults]) -> "Figure":
    figure, panels = _figure(len(published.NIAH_TASKS))
    block = published.NIAH[key]
    for axes, (task, short) in zip(panels, published.NIAH_TASKS.items(), strict=True):
        for label, cells in block.rows.items():
            points = {n: cell for (name, n), cell in zip(block.columns, cells, strict=True) if name == task}
            _line(axes, f"{label} (paper)", points, "--")
        for model in models:
            shares = {length: 100 * share for (name, length), share in niah_accuracy(model).items() if name == task}
            _line(axes, model.name, shares, "-")
        _finish(axes, "length (tokens)", f"S-NIAH-{short}, accuracy (%)")
    figure.suptitle(table.title)
    return figure


def _lengths(title: str, panels: Mapping[str, Mapping[str, Points]], x: str = "length (tokens)") -> "Figure":
    figure, axes = _figure(len(panels))
    for one, (label, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            _line(one, name, points, "-")
        _finish(one, x, label)
    figure.suptitle(title)
    return figure


def _babilong_lines(models: Sequence[ModelResults]) -> dict[str, Points]:
    lines: dict[str, Points] = {}
    for model in models:
        simulated = model.reports.get("babilong", {}).get("simulated")
        means = babilong_means(model).items()
        name = f"{model.name} (simulated)" if simulated else model.name
        lines[name] = {length: None if mean is None else 100 * mean for length, mean in means}
    return lines


def _line(axes: "Axes", label: str, points: Points, style: str) -> None:
    there = sorted((length, value) for length, value in points.items() if value is not None)
    if there:
        axes.plot(*zip(*there, strict=True), style, marker="o", markersize=3, label=label)


def _finish(axes: "Axes", x: str, y: str) -> None:
    axes.set_xscale("symlog", base=2, linthresh=128)  # BABILong has a length of 0
    axes.set(xlabel=x, ylabel=y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
