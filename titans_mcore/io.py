"""Files that appear whole or not at all (a temporary name beside the target, fsync, rename), locks, hashes, records.

All rooms write, lock and hash with these.
"""

import fcntl
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from titans_mcore.command_line import CommandError

Kind = TypeVar("Kind")


def bytes_text(size: float) -> str:
    """A size in the unit that keeps it short."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.{0 if size >= 100 or unit == 'B' else 1}f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def seconds_text(seconds: float) -> str:
    """A time in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def write_file_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a crash at any moment leaves the old one or the new one, never a part.

    Args:
        path: Target; missing parent folders are made.
        data: Its whole content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with PartialFile(path) as partial:
        partial.file.write(data)
        partial.commit()


def write_file_once(path: Path, data: bytes) -> bool:
    """Writes a file as `write_file_atomically` does unless there is one already, also when many try at once.

    Returns:
        Whether this call wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with PartialFile(path) as partial:
        partial.file.write(data)
        partial.flush()
        try:
            os.link(partial.path, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if path.exists():
                return False
            partial.commit()
    sync(path.parent)
    return True


class PartialFile:
    """A file under a temporary name until `commit`; what is not committed at the end of the `with` block is removed.

    The name tells the machine and a lock tells whether the writer lives, so that `sweep_partial_files` removes only
    what a killed process left.
    """

    def __init__(self, path: Path) -> None:
        """Opens the temporary file.

        Args:
            path: The name it gets in the end; the folder exists.
        """
        self.final = path
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.partial-{platform.node()}-", dir=path.parent)
        self.path = Path(name)
        try_lock(descriptor)  # on a file system without locks nothing is ever swept either
        self.file = os.fdopen(descriptor, "wb")
        self._open = True

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            with suppress(OSError):  # closing flushes, and a full disk must not hide the first fault
                self.file.close()
            with suppress(FileNotFoundError):
                self.path.unlink()

    def flush(self) -> None:
        """Waits until what was written is on the disk, with the rights of an ordinary file."""
        self.file.flush()
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(self.file.fileno(), 0o666 & ~umask)
        os.fsync(self.file.fileno())

    def commit(self) -> int:
        """Gives the file its name and returns its size in bytes."""
        self.flush()
        size = self.file.tell()
        os.replace(self.path, self.final)
        sync(self.final.parent)
        self._open = False
        self.file.close()
        return size


def commit_file(partial: Path, final: Path) -> None:
    """Gives a file that another writer made and closed its name, once its content is on the disk."""
    sync(partial)
    os.replace(partial, final)
    sync(final.parent)


def sweep_partial_files(folder: Path) -> None:
    """Removes temporary files that killed processes of this machine left in a folder."""
    for path in folder.glob(".*.partial-*"):
        if f".partial-{platform.node()}-" not in path.name:
            continue
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def exclusive(path: Path, refusal: str) -> Iterator[None]:
    """Holds a lock that ends with this process.

    Args:
        path: Lock file; made when missing, never removed (a removed lock file would let two in).
        refusal: The sentence when another process holds it.

    Raises:
        CommandError: Another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not try_lock(descriptor):
            raise CommandError(refusal)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Takes the lock of an open file, which ends with this process; False when another one holds it.

    On a file system without locks everybody gets it: renames still keep every file whole.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def from_json(kind: type[Kind], text: bytes | str, where: str) -> Kind:
    """Builds a dataclass from JSON, every value of its type; fields that it does not know are passed over.

    Args:
        kind: The dataclass.
        text: The JSON.
        where: Names the value in errors.

    Raises:
        ValueError: Something is missing or has another type; says where.
    """
    try:
        return cast(Kind, _adapter(cast(Any, kind)).validate_json(text, strict=True))
    except ValueError as fault:
        first = cast(Any, fault).errors()[0]
        raise ValueError(f"{'.'.join([where, *map(str, first['loc'])])}: {first['msg']}") from None


def read_marker(path: Path, kind: type[Kind]) -> Kind | None:
    """What a marker says, a dataclass in JSON; None while it is not there."""
    try:
        return from_json(kind, path.read_bytes(), path.name)
    except FileNotFoundError:
        return None


@cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter  # here: most commands read no such file

    return TypeAdapter(kind)
