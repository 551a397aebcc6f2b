"""What the commands of evals share; they begin and end as all of the project do."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from titans_mcore.command_line import EXIT_FAULT, EXIT_INTERRUPTED, CommandError, parse_settings, run_command

if TYPE_CHECKING:
    from evals.models import EvalModel

__all__ = ["EXIT_FAULT", "EXIT_INTERRUPTED", "parse_settings", "run_command"]


class EvaluationError(CommandError):
    """Of a model, its data or what is asked of both."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model is evaluated."""

    checkpoint: Path
    """Run folder (its newest checkpoint is taken), one checkpoint folder, or an exported Hugging Face folder."""
    no_verify: bool = field(default=False, kw_only=True)
    """Do not compare the weights' files with the checksums that were noted when they were written."""
    tokenizer: Path | None = field(default=None, kw_only=True)
    """Tokenizer file; by default RUN/tokenizer/tokenizer.model, or the exported folder's own."""

    def load(self, *, spread: bool = False) -> "EvalModel":
        """The model, see `evals.models.load_model`; from here on the process gives back what it frees.

        Raises:
            EvaluationError: As there.
        """
        from evals.measure import return_large_blocks
        from evals.models import load_model

        return_large_blocks()
        return load_model(self.checkpoint, self.tokenizer, spread=spread, verify=not self.no_verify)


# What nothing here is made for; a number beyond is a slip, and would take memory until something dies.
_MOST = {
    "lengths": 16_777_216,
    "length": 16_777_216,
    "max_length": 1_048_576,
    "max_new_tokens": 1_048_576,
    "decode_tokens": 1_048_576,
    "piece": 1_048_576,
    "batch": 65_536,
    "depths": 10_001,
    "threads": 4_096,
    "tokens": 1_000_000_000_000,
}
_MOST_OTHERS = 100_000_000


def check_at_least(least: int, settings: object, *names: str) -> None:
    """Refuses settings that are smaller, or larger than anything here is made for.

    Args:
        least: What each has to be; of a list the smallest number counts, and None is nothing that was asked for.
        settings: A dataclass.
        names: Of its fields.

    Raises:
        EvaluationError: Names the first one.
    """
    for name in names:
        value, most = getattr(settings, name), _MOST.get(name, _MOST_OTHERS)
        if value is not None and (max(value, default=most) if isinstance(value, tuple) else value) > most:
            raise EvaluationError(f"--{name.replace('_', '-')} is {value}; give at most {most:,}")
        if value is not None and (min(value, default=least) if isinstance(value, tuple) else value) < least:
            raise EvaluationError(f"--{name.replace('_', '-')} is {value}; give at least {least}")


def check_named_once(settings: object, *names: str) -> None:
    """Refuses lists, fields of a dataclass, that are empty or hold something twice.

    Raises:
        EvaluationError: Names the first one.
    """
    for name in names:
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            words = " ".join([f"--{name}", *map(str, values)])
            raise EvaluationError(f"{words} is empty or names one twice; name each once")


def say(text: str) -> None:
    """A line for the user, beside the results."""
    print(text, file=sys.stderr, flush=True)


def python_path() -> str:
    """PYTHONPATH of a process that finds this package wherever this one found it."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))


def run_module(
    module: str, *words: object, environment: Mapping[str, str] | None = None, held: tuple[int, ...] = ()
) -> int:
    """Runs a command of this project, which it says, and returns its status; what it prints goes to stderr.

    Args:
        module: Of the command.
        words: Behind it.
        environment: Variables that it has besides this process's.
        held: Descriptors that it shall hold, too.
    """
    command = ["-m", module, *map(str, words)]
    say(f"$ python {shlex.join(command)}")
    variables = {**os.environ, "PYTHONPATH": python_path(), **(environment or {})}
    return subprocess.run([sys.executable, *command], env=variables, stdout=sys.stderr, pass_fds=held).returncode
