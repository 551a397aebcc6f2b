"""Opening sources: local files as they are, hub files through fsspec with every read retried."""

import io
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from tokenization.command_line import TokenizationError

ATTEMPTS = 10
LONGEST_WAIT_SECONDS = 60.0
_BUFFER_BYTES = 1 << 20
_Result = TypeVar("_Result")


def is_remote(path: str) -> bool:
    """Says whether a path is an address such as hf://datasets/..."""
    return "://" in path


def open_source(path: str) -> BinaryIO:
    """Opens a source for reading in binary; a read of a remote one is repeated until it succeeds or hope is lost."""
    if not is_remote(path):
        return open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(path), _BUFFER_BYTES))


def with_retries(what: str, action: Callable[[], _Result]) -> _Result:
    """Repeats an action on the network with doubling waits: 1, 2, 4, ... 60 seconds, ten attempts.

    Args:
        what: Names it in the error.
        action: Called without arguments.

    Returns:
        What the action returns.

    Raises:
        TokenizationError: Not one attempt succeeded, or what was asked for does not exist.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, PermissionError) as fault:
            raise TokenizationError(f"{what}: {_first_line(fault)}; check its name and your rights to it") from fault
        except Exception as fault:
            if not _may_pass(fault):
                raise
            if attempt == ATTEMPTS - 1:
                raise TokenizationError(
                    f"{what}: cannot be read after {ATTEMPTS} attempts ({_first_line(fault)}); "
                    "check the network and run the same command again: it goes on where it stopped"
                ) from fault
        time.sleep(min(2.0**attempt, LONGEST_WAIT_SECONDS))
    raise AssertionError("unreachable")


def _may_pass(fault: Exception) -> bool:
    """Network clients raise OSError, or classes of their own that are called so."""
    modules = {kind.__module__.partition(".")[0] for kind in type(fault).__mro__}
    return isinstance(fault, OSError) or not modules.isdisjoint({"httpx", "httpcore", "requests", "aiohttp", "urllib3"})


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


class _RemoteFile(io.RawIOBase):
    """A file behind an address; after a failed read it is opened anew at the same position."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._position = 0
        self._file: Any = None
        self._size = int(with_retries(path, lambda: self._opened().size))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = with_retries(self._path, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._forget()
        super().close()

    def _read(self, count: int) -> bytes:
        count = min(count, self._size - self._position)
        if count <= 0:
            return b""
        try:
            file = self._opened()
            file.seek(self._position)
            data = bytes(file.read(count))
        except BaseException:
            self._forget()
            raise
        if not data:
            self._forget()
            raise ConnectionError(f"ended at byte {self._position:,} of {self._size:,}")
        return data

    def _opened(self) -> Any:
        if self._file is None:
            import fsspec

            self._file = fsspec.open(self._path, "rb").open()
        return self._file

    def _forget(self) -> None:
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            file.close()
