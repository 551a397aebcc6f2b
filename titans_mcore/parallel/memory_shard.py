"""Memories whose matrices several processes hold together: how they are cut, and what is summed over the parts.

Counted from the last matrix, one is cut by rows, the one before it by columns, the next by rows again. A matrix cut by
rows takes a part of its input and gives a term of a sum; one cut by columns takes all of its input and gives a part of
its output, just the part that the next matrix takes. So two matrices need one sum on the way to the answer, at the
output of the one cut by rows, and an error on its way back needs one at the input of a matrix cut by columns.

Every tensor is then *whole* (equal on all processes), a *part* (channels that no other process has) or *partial* (a
term of a sum over the processes that is still to be taken). At a matrix cut by rows the input is a part and the output
is whole; at one cut by columns the input is whole and the output a part. Gradients at what is whole come out partial,
and stay so while all that follows is linear.

The sums of a scan of one or two matrices: a chunk's prediction together with the products of its keys, its gradient on
the way back, and a group's reads at once. Three or four matrices need two more for a chunk and one more for a group's
reads, each way. Small ones keep steps held and the state shell. The backward pass goes through a group again, with its
sums.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titans_mcore.memory import WholeMatrices


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class TPShard(WholeMatrices):
    """This process's part of memories whose matrices several processes hold together; see memory.WholeMatrices.

    Attributes:
        index: Which of the parts, from 0.
        count: Parts.
        add: The sum of a contiguous tensor over all parts, equal bit for bit everywhere. It need not be differentiable
            and may overwrite its argument.
        spreading: What autograd is told of something whole on its way into the part; see `differentiable`.
    """

    index: int
    count: int
    add: Callable[[Tensor], Tensor]
    spreading: Callable[[Tensor], Tensor] = _same

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"index is {self.index}; of {self.count} parts it must be 0 to {self.count - 1}")

    @property
    def parts(self) -> int:  # type: ignore[override]
        """See WholeMatrices."""
        return self.count

    def differentiable(self) -> "TPShard":
        """The same for autograd: gradients pass `add` as they are and are themselves added behind `spread`."""
        add = self.add
        return replace(self, add=lambda x: _Sum.apply(x, add), spreading=lambda x: _Spread.apply(x, add))

    def whole_shape(self, layer: int, depth: int, part: torch.Size) -> tuple[int, int]:
        """See WholeMatrices."""
        if by_rows(layer, depth):
            return part[-2] * self.count, part[-1]
        return part[-2], part[-1] * self.count

    def spread(self, x: Tensor) -> Tensor:
        """See WholeMatrices."""
        return self.spreading(x)

    def of_rows(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """See WholeMatrices."""
        whole = self.spread(x)
        return whole.chunk(self.count, -1)[self.index] if by_rows(layer, depth) else whole

    def into_input(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """See WholeMatrices."""
        return x if layer and by_rows(layer, depth) else self.of_rows(layer, depth, x)

    def into_output(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """See WholeMatrices."""
        return self.spread(x) if by_rows(layer, depth) else x

    def sum_at_output(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """See WholeMatrices."""
        return self.add(x) if by_rows(layer, depth) else x

    def sum_at_input(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """See WholeMatrices."""
        return x if by_rows(layer, depth) else self.add(x)

    def sum_of_inputs(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """See WholeMatrices; at a matrix cut by columns the input has been spread, and counts once."""
        return self.add(x if by_rows(layer, depth) else self._of_first(x))

    def sum_of_outputs(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """See WholeMatrices."""
        return x if by_rows(layer, depth) else self.add(x)

    def mean(self, mean: Tensor) -> Tensor:
        """See WholeMatrices."""
        return self.spread(self.add(mean)) / self.count

    def _of_first(self, x: Tensor) -> Tensor:
        # Zeros that depend on x: autograd has to go back through the same sums on every process.
        return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0) if self.index else x


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
    return 1 if by_rows(layer, depth) else 2


def by_rows(layer: int, depth: int) -> bool:
    """Whether a matrix is cut by rows."""
    return (depth - layer) % 2 == 1
