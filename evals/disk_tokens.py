"""Token ids that lie in a file: texts of millions of tokens are read a piece at a time, and nothing of them is kept."""

import os
from dataclasses import dataclass
from typing import IO, Any

import numpy as np


@dataclass(frozen=True)
class DiskTokens:
    """A stretch of token ids. A slice of it is one, too, and `np.asarray` reads it.

    It reads with pread: pages of a memory map would count as this process's memory, as many as were ever read.
    """

    file: IO[bytes]
    """Open for reading; it must stay so."""
    start: int
    """First id, counted from the beginning of the file."""
    stop: int
    """Id behind the last."""
    dtype: Any = np.int32
    """How an id is stored."""

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> "DiskTokens":
        first, last, step = part.indices(len(self))
        assert step == 1
        return DiskTokens(self.file, self.start + first, self.start + max(first, last), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        size = np.dtype(self.dtype).itemsize
        data = bytearray(len(self) * size)
        filled = 0
        while filled < len(data):  # one call reads at most 2 GB
            read = os.preadv(self.file.fileno(), [memoryview(data)[filled:]], self.start * size + filled)
            if not read:
                raise ValueError(f"{self.file.name}: ends before token {self.stop:,}; it was cut while it was read")
            filled += read
        return np.frombuffer(data, self.dtype).astype(dtype or self.dtype, copy=False)
