"""The dual form over a whole sequence, with a backward pass of its own that keeps only every g-th state.

The forward pass stores its arguments and the states with which groups of g chunks begin. The backward pass takes the
groups from the last to the first, walks through a group's chunks once more and goes back through them by hand
(chunked_gradient.py). With g near the root of the number of chunks, the states stored and those of the group at work
are about equally many, and nothing grows with length times the size of a state.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import Bounds, Gates, Tokens, bounds_met, gates_of, read, walk
from .chunked_gradient import group_gradient
from .network import Network


def chunked_scan(
    network: Network,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor],
    chunk_size: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same as recurrence.recurrent_scan, chunk by chunk; see there for arguments and results.

    The tokens are whole chunks, or one chunk that is still open. The result can be differentiated once.
    """
    batch, length, heads = queries.shape[:3]
    closed = length % chunk_size == 0
    rows = network.for_memories(batch)
    layout = _Layout(network.residual_norm, chunk_size if closed else length, closed)
    start = [torch.cat([w, s], -2).flatten(0, 1) for w, s in zip(weights, momentum, strict=True)]
    arguments = [queries, keys, values, theta, eta, alpha]
    tensors = (*arguments, rows.norm_weight, rows.norm_bias, *start)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        reads, *end = _Scan.apply(layout, *tensors)
    else:
        reads, end, _ = _scan(layout, rows, arguments, start)
    both = [state.unflatten(0, (batch, heads)).chunk(2, -2) for state in end]
    return reads, [w.contiguous() for w, _ in both], [s.contiguous() for _, s in both]


def group_size(chunks: int) -> int:
    """Chunks g between two states that are stored: the root of their number, rounded up."""
    return math.isqrt(chunks - 1) + 1


@dataclass(frozen=True)
class _Layout:
    """How a sequence falls into chunks of `size` tokens; of an open chunk `closed` is False."""

    residual_norm: bool
    size: int
    closed: bool

    def groups(self, length: int) -> list[slice]:
        """The tokens of each group."""
        step = group_size(length // self.size) * self.size
        return [slice(start, start + step) for start in range(0, length, step)]

    def split(self, x: Tensor) -> Tensor:
        """Tokens (B, g b, H, D) to (g, N, b, D)."""
        return x.unflatten(1, (-1, self.size)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    def split_gate(self, x: Tensor) -> Tensor:
        """A gate (B, g b, H, L) to (L, g, N, b)."""
        return x.unflatten(1, (-1, self.size)).permute(4, 1, 0, 3, 2).flatten(2, 3)

    def join(self, x: Tensor, batch: int) -> Tensor:
        """Back from `split`."""
        return x.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    def join_gate(self, x: Tensor, batch: int) -> Tensor:
        """Back from `split_gate`."""
        return x.unflatten(2, (batch, -1)).permute(2, 1, 4, 3, 0).flatten(1, 2)


def _scan(
    layout: _Layout, network: Network, arguments: list[Tensor], state: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[tuple[list[Tensor], Bounds]]]:
    """Reads, the last state, and for each group its first state and the bounds it was walked with."""
    answers, groups = [], []
    alone = arguments[0].shape[1] == layout.size
    bounds = Bounds(alone, alone)  # one chunk can be looked at while walking as well as afterwards
    for span in layout.groups(arguments[0].shape[1]):
        part = [x[:, span] for x in arguments]
        tokens = Tokens(*map(layout.split, part[:3]))
        gates = gates_of(*map(layout.split_gate, part[3:]))
        walked = walk(network, tokens, gates, state, layout.closed, bounds)
        while (met := bounds_met(network, walked, gates, layout.closed, bounds)) != bounds:
            bounds = met  # also for the groups that follow: a bound that has acted will act again
            walked = walk(network, tokens, gates, state, layout.closed, bounds)
        answers.append(layout.join(read(network, tokens, gates, walked).answers, arguments[0].shape[0]))
        groups.append((state, bounds))
        state = [path.states[-1] for path in walked.paths]
    return torch.cat(answers, 1) if len(answers) > 1 else answers[0], state, groups


class _Scan(torch.autograd.Function):
    """Arguments: layout, the six of the sequence, scale and shift for N memories, L first states (N, 2 d_in, d_out)."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, *tensors: Any) -> tuple[Tensor, ...]:
        network = Network(layout.residual_norm, *tensors[6:8])
        reads, end, groups = _scan(layout, network, list(tensors[:6]), list(tensors[8:]))
        ctx.layout, ctx.bounds = layout, [bounds for _, bounds in groups]
        ctx.save_for_backward(*tensors[:8], *(matrix for state, _ in groups for matrix in state))
        return reads, *end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_reads: Tensor, *of_end: Tensor) -> tuple[Tensor | None, ...]:
        arguments, norm, states = ctx.saved_tensors[:6], ctx.saved_tensors[6:8], ctx.saved_tensors[8:]
        network = Network(ctx.layout.residual_norm, *norm)
        of_arguments = [torch.empty_like(x) for x in arguments]
        of_norm = [None if x is None else torch.zeros_like(x) for x in norm]
        of_state, depth = list(of_end), len(of_end)
        spans = ctx.layout.groups(of_reads.shape[1])
        for group, (span, bounds) in reversed(list(enumerate(zip(spans, ctx.bounds, strict=True)))):
            start, part = list(states[group * depth : (group + 1) * depth]), [x[:, span] for x in arguments]
            found = _group_gradient(ctx.layout, network, part, start, bounds, of_reads[:, span], of_state)
            of_part, of_group_norm, of_state = found
            for whole, piece in zip(of_arguments, of_part, strict=True):
                whole[:, span] = piece
            for total, piece in zip(of_norm, of_group_norm, strict=False):
                if total is not None:
                    total += piece
        return None, *of_arguments, *of_norm, *of_state


def _group_gradient(
    layout: _Layout,
    network: Network,
    arguments: list[Tensor],
    start: list[Tensor],
    bounds: Bounds,
    of_reads: Tensor,
    of_end: list[Tensor],
) -> tuple[list[Tensor], tuple[Tensor, ...], list[Tensor]]:
    """Gradients at a group's arguments, at scale and shift, and at its first state; walks through the group again."""
    batch = of_reads.shape[0]
    tokens = Tokens(*map(layout.split, arguments[:3]))
    with torch.enable_grad():
        leaves = [layout.split_gate(x.detach()).requires_grad_() for x in arguments[3:]]
        made = gates_of(*leaves)
    gates = Gates(*(x.detach() for x in made))
    walked = walk(network, tokens, gates, start, layout.closed, bounds)
    reads = read(network, tokens, gates, walked)
    found = group_gradient(network, tokens, gates, walked, reads, layout.split(of_reads), of_end)
    differentiated = [(x, of) for x, of in zip(made, found.gates, strict=True) if of is not None]
    outputs, gradients = zip(*differentiated, strict=True)
    of_gates = torch.autograd.grad(outputs, leaves, gradients)
    parts = [layout.join(x, batch) for x in found.tokens] + [layout.join_gate(x, batch) for x in of_gates]
    return parts, found.norm, found.start
