"""How every evaluation begins and ends: as the commands of tokenization do, with threads that sleep while they wait."""

import os
from collections.abc import Callable

import tokenization.command_line
from tokenization.command_line import EXIT_FAULT, EXIT_INTERRUPTED, CommandError, parse_settings

__all__ = ["EXIT_FAULT", "EXIT_INTERRUPTED", "EvaluationError", "check_at_least", "parse_settings", "run_command"]


class EvaluationError(CommandError):
    """Of a model, its data or what is asked of both."""


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
        value, most = getattr(settings, name), _MOST.get(name.rpartition("growth_")[2], _MOST_OTHERS)
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
            raise EvaluationError(f"--{name} {' '.join(map(str, values))} is empty or names one twice; name each once")


def run_command(main: Callable[[], None]) -> None:
    """Runs a command line and ends the process with its status.

    Args:
        main: The command; it imports torch, not its module: the threads' way of waiting is read when torch is loaded.

    Raises:
        SystemExit: Always; see `tokenization.command_line.run_command`.
    """
    # Streaming is thousands of small operations. Where another process takes a core, threads that spin while they wait
    # for each other make it several times slower; asleep they cost nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    tokenization.command_line.run_command(main)
