"""Memory that a process did not hold before, for tests of what measures it."""

import mmap

import torch
from torch import Tensor


def fresh_memory(size: int) -> Tensor:
    """So many bytes, mapped anew and written to.

    A tensor of torch's may lie in what an earlier test has left free in the heap, and is resident already.
    """
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1)
