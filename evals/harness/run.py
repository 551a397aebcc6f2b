"""The evaluation: a model, the tasks with their data, lm-eval, and the report."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError
from evals.harness import HarnessSettings
from evals.harness.summary import summarise, write_report
from evals.harness.tasks import check_local_data, write_task_files


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
    _check_package()
    from evals.harness.language_model import NativeLM

    model = settings.load()
    language_model = NativeLM(model, settings.max_length, settings.batch, settings.piece)
    with _tasks(settings) as manager:
        result = _run(language_model, manager, settings)
    return write_report({**summarise(result["samples"]), **model.facts()}, settings, result["versions"])


def _check_package() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is not installed; install it with `pip install -e '.[evals]'`")


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
