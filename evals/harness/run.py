"""The evaluation: a model, the tasks with their data, lm-eval, and the report."""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError
from evals.harness import HarnessSettings
from evals.harness.summary import summarise, write_report
from evals.harness.tasks import check_local_data, write_task_files
from tokenization.io import hash_files

_ROLLING = "wikitext"  # its windows bring their own start token


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
    identity, language_model = _language_model(settings)
    with _tasks(settings) as manager:
        groups = [[t for t in settings.tasks if t == _ROLLING], [t for t in settings.tasks if t != _ROLLING]]
        results = [_run(language_model, group, manager, settings) for group in groups if group]
    samples = {task: rows for result in results for task, rows in result["samples"].items()}
    versions = {task: number for result in results for task, number in result["versions"].items()}
    return write_report({**summarise(samples), **identity}, settings, versions)


def _check_package() -> None:
    try:
        import lm_eval
    except ImportError:
        raise EvaluationError("lm-eval is not installed; install it with `pip install -e '.[evals]'`") from None
    version = tuple(map(int, re.findall(r"\d+", lm_eval.__version__)[:3]))
    if version < (0, 4, 13):
        raise EvaluationError(f"lm-eval {lm_eval.__version__} is too old; install 0.4.13 or later")


def _run(language_model: Any, tasks: Sequence[str], manager: Any, settings: HarnessSettings) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    # transformers' tokenizer puts a start token in front of every text. lm-eval puts one in front of a window, too, and
    # would take the tokenizer's for text to be predicted.
    language_model.add_bos_token = tasks[0] != _ROLLING
    try:
        return simple_evaluate(
            language_model,
            tasks=list(tasks),
            num_fewshot=0,
            limit=settings.limit,
            bootstrap_iters=0,  # standard errors come from the documents' own results, see summary.py
            task_manager=manager,
        )
    except EvaluationError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
    ) as error:  # data missing, or not as they should be
        source = "the hub" if settings.data is None else f"--data {settings.data}"
        remedy = "give local files with --data" if settings.data is None else "compare its rows with the hub's"
        fault = " ".join(f"{type(error).__name__}: {error}".split())
        raise EvaluationError(f"{source}: cannot evaluate {' '.join(tasks)} ({fault}); {remedy}") from error


@contextmanager
def _tasks(settings: HarnessSettings) -> Iterator[Any]:
    from lm_eval import tasks

    if settings.data is None:
        yield tasks.TaskManager()
        return
    with tempfile.TemporaryDirectory() as folder:
        write_task_files(Path(folder), settings.data, settings.tasks, Path(tasks.__file__).parent)
        yield tasks.TaskManager(include_path=folder, include_defaults=False)


def _language_model(settings: HarnessSettings) -> tuple[dict[str, Any], Any]:
    """What identifies the model, and the model as lm-eval sees it."""
    exported = (settings.checkpoint / "config.json").is_file()
    if settings.model == "hf" or (settings.model == "auto" and exported):
        return _exported_model(settings, exported)
    from evals.harness.language_model import NativeLM
    from evals.models import load_model

    model = load_model(settings.checkpoint, settings.tokenizer, verify=not settings.no_verify)
    return {"backend": "native", **model.facts()}, NativeLM(model, settings.max_length, settings.batch, settings.piece)


def _exported_model(settings: HarnessSettings, exported: bool) -> tuple[dict[str, Any], Any]:
    if not exported:
        raise EvaluationError(
            f"--checkpoint {settings.checkpoint}: no config.json, so it is not an exported folder; export the run with "
            "`python -m titans_mcore.hf.convert` or give --model native"
        )
    import torch
    from lm_eval.models.huggingface import HFLM

    from evals.harness.language_model import WholeAnswers
    from evals.models import open_exported

    class ExportedLM(WholeAnswers, HFLM):
        """lm-eval's own."""

    folder = str(settings.checkpoint)
    network, tokenizer = open_exported(settings.checkpoint, verify=not settings.no_verify)
    model = ExportedLM(
        pretrained=network.to("cuda" if torch.cuda.is_available() else "cpu").eval(),
        tokenizer=tokenizer,
        max_length=settings.max_length,
        batch_size=settings.batch,
    )
    identity = {
        "backend": "hf",
        "checkpoint": folder,
        "checkpoint_sha256": hash_files(settings.checkpoint.glob("*.safetensors")),
        "tokenizer_sha256": hash_files([settings.checkpoint / "tokenizer.json"]),
        "trained_length": None,
        "model": {
            name: value for name, value in model.config.to_dict().items() if isinstance(value, str | int | float | bool)
        },
    }
    return identity, model
