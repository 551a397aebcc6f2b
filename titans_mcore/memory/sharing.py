"""Memories whose matrices several processes hold together."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """This process's part of memories whose matrices several processes hold together.

    Attributes:
        index: Which of the parts.
        count: Parts.
        add: The sum over all parts, equal bit for bit everywhere; not differentiable; may overwrite its argument.
    """

    index: int
    count: int
    add: Callable[[Tensor], Tensor]


def split_axis(layer: int, depth: int) -> int:
    """Axis of (H, d_in, d_out) along which matrix `layer` of `depth` is cut: 1 for its rows, 2 for its columns."""
    return 1 if (depth - layer) % 2 else 2
