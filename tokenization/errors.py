"""How every command of this room ends: a result, one sentence the user can act on, or a short line after Ctrl-C."""

import errno
import os
import sys
from collections.abc import Callable

EXIT_FAULT = 2
EXIT_INTERRUPTED = 130

# Faults of the machine or of its rights that a user can mend; any other OSError is a bug and keeps its traceback.
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or give another --output",
    errno.EDQUOT: "the disk quota is used up; free some space or give another --output",
    errno.EFBIG: "the file would be larger than this system allows; give another --output",
    errno.EROFS: "the file system is read-only; give another --output",
    errno.EACCES: "permission denied; check the rights of the path",
    errno.EPERM: "permission denied; check the rights of the path",
}


class TokenizationError(Exception):
    """A fault the user can mend. Its message is one sentence: the thing, what came, and what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Runs a command line and ends the process with its status.

    Args:
        main: The command; raises TokenizationError for what the user can mend.

    Raises:
        SystemExit: Always; 0 when `main` returned, 2 after a fault, 130 after Ctrl-C.
    """
    try:
        main()
    except TokenizationError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(EXIT_FAULT)
    except OSError as fault:
        if fault.errno not in _REMEDIES:
            raise
        place = f"{os.fspath(fault.filename)!s}: " if fault.filename else ""
        print(f"error: {place}{_REMEDIES[fault.errno]}", file=sys.stderr)
        sys.exit(EXIT_FAULT)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left, run the same command again", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)
