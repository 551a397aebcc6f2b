"""What goes into a memory and what it carries through time: tokens, and a state of constant size."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self, get_args, get_type_hints

import torch
from torch import Tensor


class TensorTree:
    """A dataclass of tensors, lists of tensors and further trees that is moved, indexed and detached as one value."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same tree with every tensor replaced by function(tensor)."""
        values = {field.name: map_tensors(getattr(self, field.name), function) for field in fields(self)}  # type: ignore[arg-type]
        return type(self)(**values)

    def joined(self, other: Self, function: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """The tree of function(tensor, other's tensor), for two trees of one shape."""
        theirs = iter(other.tensors())
        return self.map(lambda tensor: function(tensor, next(theirs)))

    def tensors(self) -> list[Tensor]:
        """Every tensor, in order."""
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(collect)
        return found

    def detach(self) -> Self:
        """The same values, cut from the graph that made them (truncated back-propagation through time)."""
        return self.map(Tensor.detach)

    def carried(self) -> Self:
        """What a training step hands on to the next: detached, and every tensor in memory of its own.

        A state may hold views of parameters, which the step in between changes.
        """
        return self.map(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format))

    def select(self, rows: Tensor) -> Self:
        """The rows (a vector of batch indices, repeats allowed) of every tensor: reorders or expands beams."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Every tensor through Tensor.to; a mask goes to another device, not to another dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(*args, **kwargs)
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        return self.map(move)

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name (`weights.0`, `open_chunk.tokens.2`), for a file."""
        found: dict[str, Tensor] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, TensorTree):
                found |= {f"{field.name}.{name}": tensor for name, tensor in value.state_dict().items()}
            elif isinstance(value, list):
                found |= {f"{field.name}.{index}": tensor for index, tensor in enumerate(value)}
            elif value is not None:
                found[field.name] = value
        return found

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The tree whose state_dict gave these tensors.

        Raises:
            ValueError: A tensor is missing, or there is one too many; the message names it.
        """
        values: dict[str, Any] = {}
        left = set(tensors)
        for name, hint in get_type_hints(cls).items():
            parts = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
            left -= {name, *(f"{name}.{key}" for key in parts)}
            kinds = [
                kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, TensorTree)
            ]
            if name in tensors:
                values[name] = tensors[name]
            elif parts and kinds:
                values[name] = kinds[0].from_state_dict(parts)
            elif parts:
                values[name] = [parts[str(index)] for index in range(len(parts))]
            elif type(None) in get_args(hint):
                values[name] = None
            else:
                raise ValueError(f"{cls.__name__} has no {name} in {', '.join(sorted(tensors)) or 'no tensors'}")
        if left:
            raise ValueError(f"{cls.__name__} does not hold {', '.join(sorted(left))}")
        return cls(**values)

    def bytes(self) -> int:
        """Bytes that the tensors hold, a tensor that appears twice counted once."""
        seen: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        self.map(count)
        return sum(seen.values())


@dataclass
class Tokens(TensorTree):
    """What the tokens of a piece bring to the memory.

    Attributes:
        queries: (B, T, H, D), like keys and values.
        keys: What the memory is read with in its own loss.
        values: What it has to answer.
        theta: Inner learning rates (B, T, H, L), like eta.
        eta: Momentum decays.
        alpha: Forget rates (B, T, H, L); or by channel of the matrices' inputs, L of (B, T, H, d_in).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    theta: Tensor
    eta: Tensor
    alpha: Tensor | list[Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """As for every tree, without looking for the fields: a decoded token costs little more than such calls."""
        by_head = (self.queries, self.keys, self.values, self.theta, self.eta)
        queries, keys, values, theta, eta = [function(x) for x in by_head]
        alpha = function(self.alpha) if isinstance(self.alpha, Tensor) else [function(x) for x in self.alpha]
        return Tokens(queries, keys, values, theta, eta, alpha)

    def span(self, begin: int, end: int) -> "Tokens":
        """Some of them."""
        return self if (begin, end) == (0, self.keys.shape[1]) else self.map(lambda x: x[:, begin:end])

    def behind(self, earlier: "Tokens") -> "Tokens":
        """These behind earlier ones, in the dtype of these."""
        return earlier.joined(self, lambda old, new: torch.cat([old.to(new.dtype), new], 1))


@dataclass
class Matrices(TensorTree):
    """Weights and momentum of a memory, L of (B, H, d_in, d_out) each."""

    weights: list[Tensor]
    momentum: list[Tensor]

    @classmethod
    def one_after_another(cls, several: Sequence["Matrices"]) -> "Matrices":
        """Several in the first axis."""
        return cls(_columns(x.weights for x in several), _columns(x.momentum for x in several))


@dataclass
class Writes(TensorTree):
    """What tokens of a chunk write, worked out once; no token behind them changes it.

    Attributes:
        inputs: For each matrix the inputs of the keys' pass, (B, H, t, d_in), or (N, t, d_in) for N = B H memories.
        deltas: For each matrix the errors at its output, (B, H, t, d_out) or (N, t, d_out).
        steps: theta as the rule takes it, (B, H, t, L) or (N, t, L).
    """

    inputs: list[Tensor]
    deltas: list[Tensor]
    steps: Tensor

    @classmethod
    def one_after_another(cls, several: Sequence["Writes"]) -> "Writes":
        """Several in the first axis."""
        steps = torch.cat([x.steps for x in several])
        return cls(_columns(x.inputs for x in several), _columns(x.deltas for x in several), steps)

    def behind(self, earlier: "Writes") -> "Writes":
        """These behind earlier ones."""
        return earlier.joined(self, lambda old, new: torch.cat([old, new], -2))


@dataclass
class OpenChunk(TensorTree):
    """A chunk that the sequence has not filled yet: its tokens so far, fewer than the chunk size.

    Attributes:
        tokens: The tokens; rows that have begun their chunks at different places hold theirs at the front, a chunk with
            room (decoding.py) at the end.
        writes: What they write, so that the next token costs the same wherever it stands; None where rows hold
            different numbers of tokens and there is no room.
        real: Which of the tokens are there, (B, t) bool; None if all are.
    """

    tokens: Tokens
    writes: Writes | None = None
    real: Tensor | None = None


@dataclass
class MemoryState(TensorTree):
    """The memory after its last token; of memories held in shards the process's parts.

    Attributes:
        weights: L of (B, H, d_in, d_out), float32 (float64 when the memory ran in float64), with which the next chunk
            begins, or with which the open one began.
        momentum: Like weights; the paper's S, past surprise.
        open_chunk: Present when the last token did not fill its chunk; the next piece goes on inside it.
    """

    weights: list[Tensor]
    momentum: list[Tensor]
    open_chunk: OpenChunk | None = None

    @property
    def matrices(self) -> Matrices:
        """Weights and momentum."""
        return Matrices(self.weights, self.momentum)


def _columns(rows: Iterable[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, a tree or a list of such with every tensor replaced; whatever else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, TensorTree):
        return value.map(function)
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    return value


class Backend(NamedTuple):
    """One way to compute the memory.

    Attributes:
        scan: Runs chunks; see chunk.chunk_scan.
        go_on: Runs tokens that stay inside the open chunk; see chunk.go_on.
    """

    scan: Callable[..., tuple[Tensor, Matrices]]
    go_on: Callable[..., tuple[Tensor, MemoryState]]
