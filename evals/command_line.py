"""How every command of this room begins and ends: settings from flags, a sentence for a fault, a line after Ctrl-C."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

EXIT_FAULT = 2
EXIT_INTERRUPTED = 130

Settings = TypeVar("Settings")


class EvaluationError(Exception):
    """A fault the user can mend. Its message is one sentence: the thing, what came, and what to do."""


def parse_settings(kind: type[Settings], program: str, arguments: Sequence[str] | None = None) -> Settings:
    """The settings of a command line.

    Args:
        kind: Frozen dataclass with a docstring under every field.
        program: How the command is called, for `--help`.
        arguments: Words of the command line; None takes the process's own.
    """
    import tyro

    return tyro.cli(kind, args=arguments, prog=program, config=(tyro.conf.FlagCreatePairsOff,))


def run_command(main: Callable[[], None]) -> None:
    """Runs a command line and ends the process with its status.

    Args:
        main: The command; raises EvaluationError for what the user can mend. It imports torch, not its module: the
            threads' way of waiting is read when torch is loaded.

    Raises:
        SystemExit: Always; 0 when `main` returned, 2 after a fault, 130 after Ctrl-C.
    """
    # Streaming is thousands of small operations. Where another process takes a core, threads that spin while they wait
    # for each other make it several times slower; asleep they cost nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        main()
    except EvaluationError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(EXIT_FAULT)
    except PermissionError as fault:
        print(f"error: {fault.filename}: permission denied; check its rights or give another path", file=sys.stderr)
        sys.exit(EXIT_FAULT)
    except KeyboardInterrupt:
        print("\ninterrupted; finished results are kept, run the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)
