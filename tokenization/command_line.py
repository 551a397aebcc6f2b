"""How a command begins and ends: settings from flags, a sentence for a fault, a short line after Ctrl-C."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

EXIT_FAULT = 2
EXIT_INTERRUPTED = 130

Settings = TypeVar("Settings")

_GO_ON = "run the same command again: it goes on where it stopped"

# Faults of the machine or of its rights that a user can mend; any other OSError is a bug and keeps its traceback.
_REMEDIES = {
    errno.ENOSPC: f"the disk is full; free some space and {_GO_ON}",
    errno.EDQUOT: f"the disk quota is used up; free some space and {_GO_ON}",
    errno.EFBIG: f"the file would be larger than this system allows; raise the limit (ulimit -f) and {_GO_ON}",
    errno.EROFS: "the file system is read-only; give another --output",
    errno.EACCES: "permission denied; check the rights of the path",
    errno.EPERM: "permission denied; check the rights of the path",
}


class CommandError(Exception):
    """A fault the user can mend. Its message is one sentence: the thing, what came, and what to do."""


class TokenizationError(CommandError):
    """Of text, tokenizer or shards."""


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
        main: The command; raises CommandError for what the user can mend.

    Raises:
        SystemExit: Always; 0 when `main` returned, 2 after a fault, 130 after Ctrl-C.
    """
    try:
        main()
    except CommandError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(EXIT_FAULT)
    except BrokenPipeError:
        # The reader of the output (`| head`) has enough; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as fault:
        if fault.errno not in _REMEDIES:
            raise
        place = f"{os.fspath(fault.filename)!s}: " if fault.filename else ""
        print(f"error: {place}{_REMEDIES[fault.errno]}", file=sys.stderr)
        sys.exit(EXIT_FAULT)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # behind ^C, or a line that is still being written over
        print(f"interrupted; nothing half-written counts, {_GO_ON}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)
