"""Processes that hold memories together, played by threads of one process."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from titans_mcore.memory import WholeMatrices
from titans_mcore.parallel.memory_shard import TPShard, split_axis

from .streams import Stream


class Meeting:
    """Adds what `count` threads bring, and keeps a record of it.

    Args:
        count: Threads.
        in_place: Leave the sum in the argument, as an all-reduce does; else poison the argument.

    Attributes:
        elements: Of each sum so far its number of elements.
    """

    def __init__(self, count: int, *, in_place: bool = False) -> None:
        self.count, self.in_place, self.elements = count, in_place, list[int]()
        self._brought: list[Tensor] = [torch.empty(0)] * count
        self._barrier = threading.Barrier(count, timeout=60.0)

    def add(self, index: int, x: Tensor) -> Tensor:
        """The sum over the threads, in the same order for all."""
        assert x.is_contiguous()
        assert not x.requires_grad
        self._brought[index] = x
        self._barrier.wait()
        total = torch.stack(self._brought).sum(0)
        if index == 0:
            self.elements.append(x.numel())
        self._barrier.wait()
        return x.copy_(total) if self.in_place else (x.fill_(torch.nan), total)[1]

    def run(self, work: Callable[[TPShard], Any]) -> list[Any]:
        """What `work` returns for each of the shards."""

        def one(index: int) -> Any:
            try:
                return work(TPShard(index, self.count, lambda x: self.add(index, x)))
            except BaseException:
                self._barrier.abort()  # the others would wait for this one
                raise

        with ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(one, range(self.count)))


def part(matrices: Sequence[Tensor], shard: WholeMatrices) -> list[Tensor]:
    """Of matrices (..., d_in, d_out) those parts that a process holds."""
    if not isinstance(shard, TPShard):
        return list(matrices)
    axes = [split_axis(layer, len(matrices)) - 3 for layer in range(len(matrices))]
    return [x.chunk(shard.count, axis)[shard.index] for x, axis in zip(matrices, axes, strict=True)]


def part_of(stream: Stream, shard: WholeMatrices) -> Stream:
    """A copy of a stream with a process's parts of the weights."""

    def copy(x: Any) -> Any:
        return [copy(y) for y in x] if isinstance(x, list) else x.detach().clone()

    names = ("queries", "keys", "values", "theta", "eta", "alpha")
    copies = {name: copy(getattr(stream, name)) for name in names}
    norm = {name: copy(x) for name, x in stream.norm.items()}
    return replace(stream, **copies, weights=copy(part(stream.weights, shard)), norm=norm)
