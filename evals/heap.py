"""Makes the memory of a long evaluation stay what it was at its beginning."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK_BYTES = 4 * 2**20


def return_large_blocks() -> None:
    """Has large tensors mapped each on its own and given back when they are freed; without glibc nothing happens.

    By default glibc raises the size from which it maps blocks, up to 32 MB, as soon as one of that size is freed.
    Logits of a piece are that large: they then lie in the heap between smaller blocks, which keep their places from
    being joined, and the peak goes on growing by one of them now and then, for tens of thousands of tokens.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
