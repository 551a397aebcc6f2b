"""The evaluation: a model, the tasks with their data, lm-eval, and the paper's table with standard errors."""

import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evals.command_line import EvaluationError
from evals.harness import HarnessSettings
from evals.harness.tasks import COLUMNS, Column, check_local_data, write_task_files
from evals.report import markdown_table, plus_minus, settings_of, table, write_bytes, write_json


def evaluate(settings: HarnessSettings) -> dict[str, Any]:
    """Runs the tasks and writes the report.

    Returns:
        What harness.json holds.

    Raises:
        EvaluationError: lm-eval is not installed, data or model cannot be loaded, or likelihoods are not finite.
    """
    if settings.data is not None:
        check_local_data(settings.data, settings.tasks)
        # Read when these packages are imported: a local folder must not wait for a network.
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is not installed; install it with `pip install -e '.[evals]'`")
    from evals.harness.language_model import NativeLM

    model = settings.load()
    language_model = NativeLM(model, settings.max_length, settings.batch, settings.piece)
    with _tasks(settings) as manager:
        result = _run(language_model, manager, settings)
    return write_report({**summarise(result["samples"]), **model.facts()}, settings, result["versions"])


def _run(language_model: Any, manager: Any, settings: HarnessSettings) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    try:
        return simple_evaluate(
            language_model,
            tasks=list(settings.tasks),
            num_fewshot=0,
            limit=settings.limit,
            bootstrap_iters=0,  # standard errors come from the documents' own results, see summary.py
            task_manager=manager,
        )
    except EvaluationError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:  # data missing, or not as they should be
        source = "the hub" if settings.data is None else f"--data {settings.data}"
        remedy = "give local files with --data" if settings.data is None else "compare its rows with the hub's"
        fault = " ".join(f"{type(error).__name__}: {error}".split())
        raise EvaluationError(f"{source}: cannot evaluate {' '.join(settings.tasks)} ({fault}); {remedy}") from error


@contextmanager
def _tasks(settings: HarnessSettings) -> Iterator[Any]:
    from lm_eval import tasks

    if settings.data is None:
        yield tasks.TaskManager()
        return
    with tempfile.TemporaryDirectory() as folder:
        write_task_files(Path(folder), settings.data, settings.tasks, Path(tasks.__file__).parent)
        yield tasks.TaskManager(include_path=folder, include_defaults=False)


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
    table_text = markdown_table(
        [title for title, _, _ in cells], [[plus_minus(value, error) for _, value, error in cells]]
    )
    write_bytes(settings.output / "harness.md", (table_text + "\n").encode())
    return report


def report_table(report: Mapping[str, Any]) -> str:
    """A line for each of the paper's columns."""
    rows = [[title, *(plus_minus(cell, None) for cell in cells)] for title, *cells in _cells(report)]
    return table(("column", "value", "standard error"), rows)


def _cells(report: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    columns = [(column["title"], column["value"], column["stderr"]) for column in report["columns"]]
    return [*columns, ("avg", report["average"]["value"], report["average"]["stderr"])]
