"""The paper's nine language and commonsense tasks, through lm-eval's own task files.

Its settings are here and import nothing heavy: `--help` must be quick.
"""

from dataclasses import dataclass
from pathlib import Path

from evals.command_line import EvaluationError, ModelOptions, check_at_least
from evals.harness.tasks import TASKS


@dataclass(frozen=True)
class HarnessSettings(ModelOptions):
    """Runs the paper's nine tasks through lm-eval (`pip install -e '.[evals]'`), zero-shot, and writes its table.

    Writes OUTPUT/harness.json and .md: the paper's columns in the paper's order, with standard errors.
    """

    output: Path
    """Folder for harness.json and harness.md."""
    data: Path | None = None
    """Folder with TASK.jsonl for every task, rows as in the task's data set on the hub; nothing is then loaded from
    the network. By default the hub's data sets."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks to run, by lm-eval's names."""
    limit: int | None = None
    """At most so many documents of each task; for a trial, its numbers are not comparable."""
    max_length: int = 4_096
    """Most tokens of a prompt and of a window of wikitext; the paper trains at 4,096."""
    batch: int = 8
    """Requests read side by side."""
    piece: int = 512
    """Tokens of each request read at a time; bounds the memory, results do not depend on it."""

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise EvaluationError(f"--tasks {' '.join(unknown) or 'is empty'}; give some of {' '.join(TASKS)}")
        check_at_least(1, self, "limit", "max_length", "batch", "piece")
