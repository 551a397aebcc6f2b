"""MemoryState: all that a memory carries through time, as a value of constant size."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor


class TensorTree:
    """A dataclass of tensors, lists of tensors and further trees that is moved, indexed and detached as one value."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same tree with every tensor replaced by function(tensor)."""
        values = {field.name: _map(getattr(self, field.name), function) for field in fields(self)}  # type: ignore[arg-type]
        return type(self)(**values)

    def detach(self) -> Self:
        """The same values, cut from the graph that made them (truncated back-propagation through time)."""
        return self.map(Tensor.detach)

    def select(self, rows: Tensor) -> Self:
        """The rows (a vector of batch indices, repeats allowed) of every tensor: reorders or expands beams."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Every tensor through Tensor.to; a mask goes to another device, not to another dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(*args, **kwargs)
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        return self.map(move)

    def bytes(self) -> int:
        """Bytes that the tensors hold, a tensor that appears twice counted once."""
        seen: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        self.map(count)
        return sum(seen.values())


@dataclass
class OpenChunk(TensorTree):
    """A chunk that the sequence has not filled yet: where it began and its tokens so far, fewer than the chunk size.

    Rows that have begun their chunks at different tokens hold different numbers of them, at the front.

    Attributes:
        weights: Weights at the chunk's start, L of (B, H, d_in, d_out).
        momentum: Momentum at the chunk's start, like weights.
        tokens: Keys and values (B, t, H, D), theta, eta and alpha (B, t, H, L); alpha by channel is L of
            (B, t, H, d_in).
        real: Which of the tokens are there, (B, t) bool; None if all are.
    """

    weights: list[Tensor]
    momentum: list[Tensor]
    tokens: list[Tensor]
    real: Tensor | None = None


@dataclass
class MemoryState(TensorTree):
    """The memory after its last token.

    Attributes:
        weights: L of (B, H, d_in, d_out), float32 (float64 when the memory ran in float64).
        momentum: Like weights; the paper's S, past surprise.
        open_chunk: Present when the last token did not fill its chunk; the next piece goes on inside it.
    """

    weights: list[Tensor]
    momentum: list[Tensor]
    open_chunk: OpenChunk | None = None

    def closed(self) -> "MemoryState":
        """The same, its open chunk ended where it stands: the next token begins another."""
        return MemoryState(self.weights, self.momentum)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, TensorTree):
        return value.map(function)
    if isinstance(value, list):
        return [_map(item, function) for item in value]
    return value
