"""Token ids of long texts: they lie in a file and are read a piece at a time, or are put together from pieces' ids."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from evals.command_line import EvaluationError


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


Encode = Callable[[Sequence[str]], list[list[int]]]


def encoder(processor: Any, before: str) -> Encode:
    """Encodes texts as they stand behind `before`, whose ids are left out but for a blank at its end.

    Alone a text would begin with sentencepiece's dummy prefix, whatever stands before it.

    Args:
        processor: The `sentencepiece.SentencePieceProcessor`.
        before: Such as ". ", between sentences.

    Raises:
        EvaluationError: When it is called, if the tokenizer joins a text with what stands before it.
    """
    head = before.rstrip(" ")
    ids = processor.encode(head)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        both = [processor.encode(before + text) for text in texts]
        if any(whole[: len(ids)] != ids for whole in both):
            raise EvaluationError("the tokenizer joins the end of a text with the next one; they cannot be spliced")
        return [whole[len(ids) :] for whole in both]

    return encode
