"""From results to the page: gather, tabulate, plot, write."""

from collections.abc import Sequence
from typing import Any

from evals.command_line import EvaluationError
from evals.paper.plots import all_plots
from evals.paper.published import TITANS
from evals.paper.results import ModelResults, places, read_results
from evals.paper.settings import PaperSettings
from evals.paper.table import Table
from evals.paper.tables import all_tables
from evals.report import write_bytes, write_figure, write_json

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
    write_json(settings.output / "paper.json", {"models": _sources(models), "tables": _json(tables)})
    write_bytes(settings.output / "paper.md", _page(tables, set(plots), models).encode())
    for key, figure in plots.items():
        write_figure(settings.output / f"{key}.png", figure)
    return tables


def _json(tables: Sequence[Table]) -> dict[str, Any]:
    return {table.key: table.to_json() for table in tables}


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
    parts += [f"**{name}** has results of different weights; compare its cells with care." for name in _mixed(models)]
    for table in tables:
        parts.append(table.markdown())
        if table.key in plots:
            parts.append(f"![{table.title}]({table.key}.png)")
    return "\n\n".join(parts) + "\n"


def _mixed(models: Sequence[ModelResults]) -> list[str]:
    return [source["name"] for source in _sources(models) if len(source["weights"]) > 1]
