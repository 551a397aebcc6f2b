"""From the documents' results to the paper's table, with standard errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from evals.harness import HarnessSettings
from evals.harness.tasks import COLUMNS, Column
from evals.report import markdown_table, settings_of, table, write_bytes, write_json


def summarise(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Values and standard errors of the table's columns.

    Args:
        samples: From lm-eval, for each task that ran its documents, each with its metrics.

    Returns:
        `columns`, one for each of the paper's in its order, value and stderr None where the task did not run; and
        `average` of the accuracies, None unless all eight are there.
    """
    columns = []
    for column in COLUMNS:
        documents = [sample[column.metric] for sample in samples.get(column.task, ())]
        value, stderr = _estimate(column, documents)
        columns.append({**asdict(column), "value": value, "stderr": stderr, "n": len(documents)})
    shares = [column for column in columns if column["accuracy"]]
    average = stderr = None
    if all(share["value"] is not None for share in shares):
        average = sum(share["value"] for share in shares) / len(shares)
        errors = [share["stderr"] for share in shares if share["stderr"] is not None]
        if len(errors) == len(shares):
            stderr = math.sqrt(sum(error**2 for error in errors)) / len(shares)
    return {"columns": columns, "average": {"value": average, "stderr": stderr}}


def _estimate(column: Column, documents: Sequence[Any]) -> tuple[float | None, float | None]:
    """Value and standard error over documents; a perplexity's error is the logarithm's, times the perplexity."""
    if not documents:
        return None, None
    if column.accuracy:
        shares = [100 * float(document) for document in documents]
        n = len(shares)
        return float(np.mean(shares)), float(np.std(shares, ddof=1) / math.sqrt(n)) if n > 1 else None
    weighted = [document if isinstance(document, tuple | list) else (document, 1) for document in documents]
    likelihood, words = np.array(weighted, np.float64).T
    loss = -likelihood.sum() / words.sum()
    if loss > 700:  # exp overflows; JSON has no infinity
        return None, None
    value, n = math.exp(loss), len(documents)
    if n == 1:
        return value, None
    residual = likelihood + loss * words  # of a ratio of sums
    spread = math.sqrt(n / (n - 1) * float(np.square(residual).sum())) / float(words.sum())
    return value, value * spread


def write_report(report: dict[str, Any], settings: HarnessSettings, versions: Mapping[str, Any]) -> dict[str, Any]:
    """Writes harness.json and .md, and returns what the JSON holds."""
    from importlib.metadata import version

    report = {
        **report,
        "few_shot": 0,
        "data": "hub" if settings.data is None else "local",
        "task_versions": dict(versions),
        "lm_eval": version("lm_eval"),
        "settings": settings_of(settings),
    }
    write_json(settings.output / "harness.json", report)
    cells = _cells(report)
    table_text = markdown_table([title for title, _, _ in cells], [[_text(*pair) for _, *pair in cells]])
    write_bytes(settings.output / "harness.md", (table_text + "\n").encode())
    return report


def report_table(report: Mapping[str, Any]) -> str:
    """A line for each of the paper's columns."""
    rows = [[title, *("" if cell is None else f"{cell:.2f}" for cell in cells)] for title, *cells in _cells(report)]
    return table(("column", "value", "standard error"), rows)


def _cells(report: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    columns = [(column["title"], column["value"], column["stderr"]) for column in report["columns"]]
    return [*columns, ("avg", report["average"]["value"], report["average"]["stderr"])]


def _text(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" + (f" ± {stderr:.2f}" if stderr is not None else "")
