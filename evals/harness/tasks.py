"""The paper's columns as lm-eval's tasks and metrics, and lm-eval's task files pointed at local data."""

import json
from dataclasses import dataclass
from pathlib import Path

from evals.command_line import EvaluationError


@dataclass(frozen=True)
class Column:
    """One column of the paper's table."""

    title: str
    """Its heading."""
    task: str
    """lm-eval's name of the task."""
    metric: str
    """lm-eval's name of the metric."""
    accuracy: bool = True
    """A share, given in percent and part of the average; else a perplexity."""


TASKS = {
    "wikitext": ("test", "wikitext/wikitext.yaml"),
    "lambada_openai": ("test", "lambada/lambada_openai.yaml"),
    "piqa": ("validation", "piqa/piqa.yaml"),
    "hellaswag": ("validation", "hellaswag/hellaswag.yaml"),
    "winogrande": ("validation", "winogrande/default.yaml"),
    "arc_easy": ("test", "arc/arc_easy.yaml"),
    "arc_challenge": ("test", "arc/arc_challenge.yaml"),
    "social_iqa": ("validation", "siqa/siqa.yaml"),
    "boolq": ("validation", "super_glue/boolq/default.yaml"),
}
"""Which part of its data set a task is evaluated on, and lm-eval's task file, below its folder `tasks`."""
COLUMNS = (
    Column("Wiki ppl", "wikitext", "word_perplexity", accuracy=False),
    Column("LMB ppl", "lambada_openai", "perplexity", accuracy=False),
    Column("LMB", "lambada_openai", "acc"),
    Column("PIQA", "piqa", "acc"),
    Column("Hella", "hellaswag", "acc_norm"),
    Column("Wino", "winogrande", "acc"),
    Column("ARC-e", "arc_easy", "acc"),
    Column("ARC-c", "arc_challenge", "acc_norm"),
    Column("SIQA", "social_iqa", "acc"),
    Column("BoolQ", "boolq", "acc"),
)


def check_local_data(data: Path, tasks: tuple[str, ...]) -> None:
    """Looks whether every task has its file.

    Raises:
        EvaluationError: A file is missing, or its first line is not a JSON object.
    """
    for task in tasks:
        file = data / f"{task}.jsonl"
        if not file.is_file():
            raise EvaluationError(
                f"--data {data}: {file.name} is missing; write the {TASKS[task][0]} split of {task} there, a JSON "
                "object a line, or leave the task out with --tasks"
            )
        with file.open(encoding="utf-8") as lines:
            first = lines.readline()
        try:
            whole = isinstance(json.loads(first), dict)
        except ValueError:
            whole = False
        if not whole:
            raise EvaluationError(f"{file}: its first line is not a JSON object; give one row of the data set a line")


def write_task_files(folder: Path, data: Path, tasks: tuple[str, ...], official: Path) -> None:
    """Writes a task file for each task that is the official one, except for where its data lie.

    Args:
        folder: For the task files, and below it for what `datasets` makes of the data.
        data: Has TASK.jsonl for every task.
        tasks: lm-eval's names.
        official: lm-eval's folder `tasks`.
    """
    for name in tasks:
        split, file = TASKS[name]
        content = {
            "include": str(official / file),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str((data / f"{name}.jsonl").resolve())},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            f"{split}_split": split,
        }
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")
