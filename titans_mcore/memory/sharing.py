"""Memories whose matrices several processes hold together: how they are cut, and what is summed over the parts.

Counted from the last matrix, one is cut by rows, the one before it by columns, the next by rows again. A matrix cut by
rows takes a part of its input and gives a term of a sum; one cut by columns takes all of its input and gives a part of
its output, just the part that the next matrix takes. So two matrices need one sum on the way to the answer, at the
output of the one cut by rows, and an error on its way back needs one at the input of a matrix cut by columns.

Every tensor is then *whole* (equal on all processes), a *part* (channels that no other process has) or *partial* (a
term of a sum over the processes that is still to be taken). At a matrix cut by rows the input is a part and the output
is whole; at one cut by columns the input is whole and the output a part. Gradients at what is whole come out partial,
and stay so while all that follows is linear.

The sums of a scan of one or two matrices: the prediction of a chunk's keys, its gradient on the way back, all reads
of the sequence at once and, at once as well, all gradients at what is whole. Three or four matrices need two more for
a chunk and one more for a group's reads, each way. Small sums keep the bounds: one of lengths and dot products for each
group, for each chunk once the step bound was met, and one of mean squares likewise for the state shell. The backward
pass walks through the chunks again with the sums that the forward pass has kept.

Without a share (None) the functions return what they are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Share:
    """This process's part of memories whose matrices several processes hold together.

    Attributes:
        index: Which of the parts, from 0.
        count: Parts.
        add: The sum of a contiguous tensor over all parts, equal bit for bit everywhere. It need not be differentiable
            and may overwrite its argument.
        spread: What autograd is told of something whole on its way into the part. See `differentiable`.
    """

    index: int
    count: int
    add: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor] = _same

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"index is {self.index}; of {self.count} parts it must be 0 to {self.count - 1}")

    def differentiable(self) -> "Share":
        """The same for autograd: gradients pass `add` as they are and are themselves added behind `spread`."""
        add = self.add
        return replace(self, add=lambda x: _Sum.apply(x, add), spread=lambda x: _Spread.apply(x, add))

    def recorded(self, sums: list[Tensor]) -> "Share":
        """The same, which appends what it adds up to `sums`."""

        def add(x: Tensor) -> Tensor:
            sums.append(self.add(x))
            return sums[-1]

        return replace(self, add=add)

    def replayed(self, sums: Sequence[Tensor]) -> "Share":
        """The same for who goes the way again on which `sums` were recorded: nothing is added twice."""
        left = iter(sums)
        return replace(self, add=lambda _: next(left))

    def add_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums of several tensors of one dtype by a single `add`."""
        whole = self.add(torch.cat([x.flatten() for x in tensors]))
        parts = whole.split([x.numel() for x in tensors])
        return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


class _Sum(torch.autograd.Function):
    """A sum over the parts, from which every process goes on with the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        return add(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor, None]:
        return of_sum, None


class _Spread(torch.autograd.Function):
    """Something whole, with which every process goes on in a way of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.add = add
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, of_spread: Tensor) -> tuple[Tensor, None]:
        return ctx.add(of_spread.clone(memory_format=torch.contiguous_format)), None


def split_axis(layer: int, depth: int) -> int:
    """Axis of (H, d_in, d_out) along which matrix `layer` of `depth` is cut: 1 (rows, its input) or 2 (columns)."""
    return 1 if _by_rows(layer, depth) else 2


def _by_rows(layer: int, depth: int) -> bool:
    return (depth - layer) % 2 == 1


def whole_shape(share: Share | None, layer: int, depth: int, part: torch.Size) -> tuple[int, int]:
    """d_in and d_out of a matrix of which the process holds (..., d_in, d_out)."""
    count = count_of(share)
    return (part[-2] * count, part[-1]) if _by_rows(layer, depth) else (part[-2], part[-1] * count)


def count_of(share: Share | None) -> int:
    """The number of parts."""
    return 1 if share is None else share.count


def spread(share: Share | None, x: Tensor) -> Tensor:
    """Something whole on its way into the process's part; see Share."""
    return x if share is None else share.spread(x)


def of_rows(share: Share | None, layer: int, depth: int, x: Tensor) -> Tensor:
    """Of something whole, (..., d_in), what belongs to the rows that the process holds of a matrix."""
    if share is None or not _by_rows(layer, depth):
        return spread(share, x)
    return share.spread(x).chunk(share.count, -1)[share.index]


def into_input(share: Share | None, layer: int, depth: int, x: Tensor) -> Tensor:
    """What the process's part of a matrix takes of x, the memory's input or what the matrix before has put out."""
    return x if share is None or (layer and _by_rows(layer, depth)) else of_rows(share, layer, depth, x)


def out_of_input(share: Share | None, depth: int, x: Tensor) -> Tensor:
    """A gradient at what the first matrix takes as a partial one at all of it, (..., d)."""
    if share is None or not _by_rows(0, depth):
        return x
    width = x.shape[-1]
    return F.pad(x, (share.index * width, (share.count - 1 - share.index) * width))


def into_output(share: Share | None, layer: int, depth: int, x: Tensor) -> Tensor:
    """An error at a matrix' output on its way back into the process's part of the matrix."""
    return x if share is None or not _by_rows(layer, depth) else share.spread(x)


def sum_at_output(share: Share | None, layer: int, depth: int, x: Tensor) -> Tensor:
    """What is partial at the output of a matrix cut by rows, summed; a part at the output of another."""
    return x if share is None or not _by_rows(layer, depth) else share.add(x)


def sum_at_input(share: Share | None, layer: int, depth: int, x: Tensor) -> Tensor:
    """What is partial at the input of a matrix cut by columns, summed; a part at the input of another."""
    return x if share is None or _by_rows(layer, depth) else share.add(x)


def once(share: Share | None, x: Tensor) -> Tensor:
    """Something whole as a partial one: the first process has it, the others zeros."""
    return x if share is None else _of_first(share, share.spread(x))


def once_at_output(share: Share | None, layer: int, depth: int, x: Tensor) -> Tensor:
    """Something made from a matrix' output, as a partial one: where the matrix is cut by columns it is that already."""
    return once(share, x) if _by_rows(layer, depth) else x


def once_at_input(share: Share | None, layer: int, depth: int, x: Tensor) -> Tensor:
    """Something made from what into_input gave, as a partial one: where the matrix is cut by rows it is already."""
    return x if share is None or _by_rows(layer, depth) else _of_first(share, x)


def _of_first(share: Share, x: Tensor) -> Tensor:
    # Zeros that depend on x: autograd has to go back through the same sums on every process.
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0) if share.index else x


def whole_mean(share: Share | None, mean: Tensor) -> Tensor:
    """A mean over whole matrices from that over the process's parts."""
    return mean if share is None else share.spread(share.add(mean)) / share.count
