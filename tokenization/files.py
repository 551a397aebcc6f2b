"""Files and folders that appear whole or not at all: a temporary name beside the target, fsync, rename."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenization.errors import TokenizationError


def write_file_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a crash at any moment leaves the old one or the new one, never a part.

    Args:
        path: Target; missing parent folders are made.
        data: Its whole content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        sync(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync(path.parent)


@contextmanager
def staged_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """Gives a temporary folder that takes the target's name when the block ends well, and is removed otherwise.

    What killed processes left beside the target is removed first; a lock that ends with its process tells the dead
    from the living.

    Args:
        target: Folder to make; missing parents are made.
        replace: Whether a folder of that name is replaced. Without it only an empty one is.

    Yields:
        The temporary folder.

    Raises:
        TokenizationError: A folder of that name with something in it appeared meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent):  # between making a folder and locking it, nobody else may take it for dead
        _remove_stale(target)
        staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        lock = _lock(staging)
    try:
        yield staging
        os.chmod(staging, 0o777 & ~_umask())
        for path in staging.iterdir():
            sync(path)
        sync(staging)
        _move(staging, target, replace)
        sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _move(staging: Path, target: Path, replace: bool) -> None:
    if replace and target.exists():
        old = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        os.rename(target, old)
        os.rename(staging, target)
        shutil.rmtree(old)
        return
    try:
        os.rename(staging, target)
    except OSError as fault:
        if target.exists():
            raise TokenizationError(
                f"{target}: another process made it meanwhile; compare, or choose another"
            ) from fault
        raise


def _prefix(target: Path) -> str:
    return f"{target.name}.partial-"


def _remove_stale(target: Path) -> None:
    for path in target.parent.iterdir():
        if path.is_dir() and path.name.startswith(_prefix(target)):
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Locks a folder for this process; None when it is taken or its file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: then nothing is ever taken for dead either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
