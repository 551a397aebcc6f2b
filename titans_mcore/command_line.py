"""How a command begins and ends: settings from flags, a sentence for a fault, a short line after Ctrl-C."""

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

EXIT_FAILED, EXIT_FAULT, EXIT_INTERRUPTED = 1, 2, 130

Settings = TypeVar("Settings")

_LONGEST_NAME = 255  # bytes of a file's name
_LONGEST_SHOWN = 200  # letters of a path in a message
_GO_ON = "run the same command again: it goes on where it stopped"

# Faults of the machine or of its rights that a user can mend; any other OSError is a bug and keeps its traceback.
_REMEDIES = {
    errno.ENOSPC: f"the disk is full; free some space and {_GO_ON}",
    errno.EDQUOT: f"the disk quota is used up; free some space and {_GO_ON}",
    errno.EFBIG: f"the file would be larger than this system allows; raise the limit (ulimit -f) and {_GO_ON}",
    errno.EROFS: "the file system is read-only; give another folder to write to",
    errno.ENAMETOOLONG: "the name is too long for this file system; give a shorter one",
    errno.ENOTDIR: "a file stands where a folder would have to be; give another path",
    errno.EISDIR: "a folder stands where a file would have to be; give another path",
    errno.EACCES: "permission denied; check the rights of the path",
    errno.EPERM: "permission denied; check the rights of the path",
}


class CommandError(Exception):
    """A fault the user can mend. Its message is one sentence: the thing, what came, and what to do.

    Attributes:
        status: That a command ends with.
    """

    status = EXIT_FAULT


def remedy_of(fault: OSError) -> str | None:
    """A sentence for a fault of the machine or of its rights that a user can mend; None for any other."""
    if fault.errno not in _REMEDIES:
        return None
    name = os.fsdecode(fault.filename) if isinstance(fault.filename, str | bytes | os.PathLike) else ""
    place = f"{name if len(name) < _LONGEST_SHOWN else name[:_LONGEST_SHOWN] + '...'}: " if name else ""
    return f"{place}{_REMEDIES[fault.errno]}"


def try_output(path: Path, option: str, *, folder: bool) -> None:
    """Writes a little where a command will write at its end, and takes it away again.

    Args:
        path: What it will write; need not be there yet.
        option: How the path was given, for the message.
        folder: Whether it is a folder.

    Raises:
        CommandError: It cannot be written.
    """
    try:
        if path.exists() and path.is_dir() != folder:
            raise CommandError(f"{option} {path}: is a {'file; give a folder' if folder else 'folder; give a file'}")
        for part in path.parts:  # where nothing is there yet, nothing else looks at a name
            if len(os.fsencode(part)) > _LONGEST_NAME:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        place = path.absolute() if folder else path.absolute().parent
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise CommandError(f"{option} {path}: {place} is a file; give another path")
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
    except OSError as fault:
        shown = str(path) if len(str(path)) < _LONGEST_SHOWN else f"{str(path)[:_LONGEST_SHOWN]}..."
        reason = _REMEDIES.get(fault.errno or 0, f"cannot be written ({fault.strerror or fault}); give another")
        raise CommandError(f"{option} {shown}: {reason}") from fault


def parse_settings(
    kind: type[Settings], program: str, arguments: Sequence[str] | None = None, *, folder: bool = True
) -> Settings:
    """The settings of a command line. Where they have an --output, it is tried before anything is worked out.

    Args:
        kind: Frozen dataclass with a docstring under every field.
        program: How the command is called, for `--help`.
        arguments: Words of the command line; None takes the process's own.
        folder: Whether its --output is a folder.

    Raises:
        CommandError: The output cannot be written.
    """
    import tyro

    settings = tyro.cli(kind, args=arguments, prog=program, config=(tyro.conf.FlagCreatePairsOff,))
    for name, is_folder in (("output", folder), ("json", False)):
        if isinstance(path := getattr(settings, name, None), Path):
            try_output(path, f"--{name}", folder=is_folder)
    return settings


def run_command(main: Callable[[], None]) -> None:
    """Runs a command line and ends the process with its status.

    Args:
        main: The command; raises CommandError for what the user can mend. Best it imports torch, not its module: how
            threads wait is read when torch is loaded.

    Raises:
        SystemExit: Always; 0 when `main` returned, the fault's status after one, 130 after Ctrl-C.
    """
    # Streaming is thousands of small operations. Where another process takes a core, threads that spin while they wait
    # for each other make it several times slower; asleep they cost nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        main()
    except CommandError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(fault.status)
    except BrokenPipeError:
        # The reader of the output (`| head`) has enough; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as fault:
        if (sentence := remedy_of(fault)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(EXIT_FAULT)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # behind ^C, or a line that is still being written over
        print(f"interrupted; nothing half-written counts, {_GO_ON}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)
