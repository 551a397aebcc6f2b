"""The dual form over a whole sequence, with a backward pass of its own that keeps only every g-th state.

The forward pass stores its arguments and the states with which groups of g chunks begin. The backward pass takes the
groups from the last to the first, walks through a group's chunks once more and goes back through them by hand
(chunked_gradient.py). With g near the root of the number of chunks, the states stored and those of the group at work
are about equally many, and nothing grows with length times the size of a state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import Borders, Bounds, Gates, Tokens, bounds_met, gates_of, norm_of_reads, read, walk
from .chunked_gradient import group_gradient
from .network import Network, answer
from .packing import Chunks
from .sharing import Share
from .shell import anchors_of


def chunked_scan(
    network: Network,
    tokens: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    initial: list[Tensor],
    chunks: Chunks,
    fresh: tuple[list[Tensor], list[Tensor]] | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Update and read the memory chunk by chunk. The result can be differentiated once.

    Args:
        network: The memory network. With a share, weights, momentum, initial and fresh are the process's parts, and so
            are the gradients at them; all else is equal on all processes.
        tokens: Queries, keys and values (B, C b, H, D), theta, eta and alpha (B, C b, H, L), in the slots of the
            chunks; zeros where a slot is empty.
        weights: L of (B, H, d_in, d_out) before the first token; momentum alike.
        initial: L of (H, d_in, d_out), the learned M_0; the state shell leads emptied weights back to them.
        chunks: Where the slots are empty and where documents begin.
        fresh: Weights and momentum in which a document begins, like weights; None if none begins.

    Returns:
        What each token reads, (B, C b, H, D), and the weights and momentum after the last one.
    """
    batch, _, heads = tokens[0].shape[:3]
    rows = network.for_memories(batch)
    layout, share = _Layout(network.residual_norm, network.share, chunks, batch, heads), network.share
    share = None if share is None else share.differentiable()
    anchors = [x.expand(batch, *x.shape).flatten(0, 1) for x in anchors_of(initial, share)]
    states = [_joined(weights, momentum), [] if fresh is None else _joined(*fresh)]
    tensors = (*tokens, rows.norm_weight, rows.norm_bias, *anchors, *states[0], *states[1])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        reads, *end = _Scan.apply(layout, len(weights), *tensors)
    else:
        reads, end, _ = _scan(layout, rows, _Given(tokens, anchors, *states), keep=False)
    both = [state.unflatten(0, (batch, heads)).chunk(2, -2) for state in end]
    return reads, [w.contiguous() for w, _ in both], [s.contiguous() for _, s in both]


def group_size(chunks: int) -> int:
    """Chunks g between two states that are stored: the root of their number, rounded up."""
    return math.isqrt(chunks - 1) + 1


class _Given(NamedTuple):
    """Arguments of a scan, or their gradients.

    Attributes:
        tokens: The six of the sequence.
        anchors: L of (N, d_in, d_out).
        start: L states (N, 2 d_in, d_out).
        fresh: Like start, or empty.
    """

    tokens: list[Tensor]
    anchors: list[Tensor]
    start: list[Tensor]
    fresh: list[Tensor]


def _joined(weights: list[Tensor], momentum: list[Tensor]) -> list[Tensor]:
    """States (N, 2 d_in, d_out), weights above momentum."""
    return [torch.cat([w, s], -2).flatten(0, 1) for w, s in zip(weights, momentum, strict=True)]


@dataclass(frozen=True)
class _Layout:
    """How a sequence falls into groups of chunks, for B rows and H heads."""

    residual_norm: bool
    share: Share | None
    chunks: Chunks
    batch: int
    heads: int

    def network(self, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Network:
        """The memory network, with scale and shift for N memories."""
        return Network(self.residual_norm, norm_weight, norm_bias, self.share)

    def groups(self, length: int) -> list[slice]:
        """The tokens of each group."""
        step = group_size(length // self.chunks.size) * self.chunks.size
        return [slice(start, start + step) for start in range(0, length, step)]

    def borders(self, span: slice, given: _Given) -> tuple[Borders, Tensor | None]:
        """What happens between the chunks of a group, and which of its slots are real."""
        size, device = self.chunks.size, given.tokens[0].device
        chunks = self.chunks.group(slice(span.start // size, span.stop // size))
        full, restarted = chunks.full(self.heads, device), chunks.restarted(self.heads, device)
        borders = Borders(chunks.closed, full, restarted, given.fresh, given.anchors)
        return borders, chunks.real(self.heads, device)


class _Stored(NamedTuple):
    """What the forward pass keeps of a group: its first state, the bounds it was walked with, sums over the parts."""

    start: list[Tensor]
    bounds: Bounds
    sums: list[Tensor]


def _scan(
    layout: _Layout, network: Network, given: _Given, *, keep: bool
) -> tuple[Tensor, list[Tensor], list[_Stored]]:
    """Reads, the last state, and what is kept of each group; the sums only if they are wanted."""
    outputs, groups, state = [], [], given.start
    alone = given.tokens[0].shape[1] == layout.chunks.size
    bounds = Bounds(alone, alone)  # one chunk can be looked at while walking as well as afterwards
    for span in layout.groups(given.tokens[0].shape[1]):
        part = [x[:, span] for x in given.tokens]
        tokens = Tokens(*map(layout.chunks.split, part[:3]))
        borders, real = layout.borders(span, given)
        theta, eta, alpha = map(layout.chunks.split_gate, part[3:])
        gates = gates_of(theta, eta, alpha, real)
        sums: list[Tensor] = []
        recording = _recording(network, sums) if keep else network
        walked = walk(recording, tokens, gates, state, borders, bounds)
        while (met := bounds_met(network, walked, gates, borders, bounds)) != bounds:
            bounds = met  # also for the groups that follow: a bound that has acted will act again
            sums.clear()
            walked = walk(recording, tokens, gates, state, borders, bounds)
        outputs.append(read(recording, tokens, gates, walked).output)
        groups.append(_Stored(state, bounds, sums))
        state = [path.states[-1] for path in walked.paths]
    queries = layout.chunks.split(given.tokens[0])
    normed = norm_of_reads(network, len(state), torch.cat(outputs) if len(outputs) > 1 else outputs[0])
    if keep and network.share is not None:
        for group, output in zip(groups, normed.raw.split([len(x) for x in outputs]), strict=True):
            group.sums.append(output)
    answers = answer(network, queries, normed.value.view_as(queries))
    return layout.chunks.join(answers, layout.batch), state, groups


def _recording(network: Network, sums: list[Tensor]) -> Network:
    """The same network, whose sums over the parts are kept for the backward pass."""
    return network if network.share is None else replace(network, share=network.share.recorded(sums))


def _replaying(network: Network, sums: list[Tensor]) -> Network:
    return network if network.share is None else replace(network, share=network.share.replayed(sums))


class _Scan(torch.autograd.Function):
    """Arguments: layout, L, the six of the sequence, scale and shift for N memories, then the rest of _Given."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, depth: int, *tensors: Any) -> tuple[Tensor, ...]:
        given = _given(depth, tensors)
        reads, end, groups = _scan(layout, layout.network(*tensors[6:8]), given, keep=True)
        ctx.layout, ctx.depth, ctx.bounds, ctx.count = layout, depth, [group.bounds for group in groups], len(tensors)
        ctx.sums = [len(group.sums) for group in groups]
        ctx.save_for_backward(*tensors, *(x for group in groups for x in (*group.start, *group.sums)))
        return reads, *end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_reads: Tensor, *of_end: Tensor) -> tuple[Tensor | None, ...]:
        layout, depth = ctx.layout, ctx.depth
        saved = ctx.saved_tensors  # taken once: a checkpoint around recomputes them when asked
        tensors, kept = saved[: ctx.count], iter(saved[ctx.count :])
        groups = [
            _Stored(list(islice(kept, depth)), bounds, list(islice(kept, sums)))
            for bounds, sums in zip(ctx.bounds, ctx.sums, strict=True)
        ]
        given, norm = _given(depth, tensors), tensors[6:8]
        back = _Back(layout, layout.network(*norm), given)
        of_tokens = [torch.empty_like(x) for x in given.tokens]
        of_state = [x.clone(memory_format=torch.contiguous_format) for x in of_end]  # it is changed in place
        for span, stored in reversed(list(zip(layout.groups(of_reads.shape[1]), groups, strict=True))):
            part, of_state = back.through(span, stored, of_reads[:, span], of_state)
            for whole, piece in zip(of_tokens, part, strict=True):
                whole[:, span] = piece
        of_norm = [None if x is None else total for x, total in zip(norm, back.of_norm, strict=True)]
        if layout.share is not None:
            of_tokens, of_norm = _whole(layout.share, of_tokens, of_norm)
        return None, None, *of_tokens, *of_norm, *back.of_anchors, *of_state, *back.of_fresh


def _whole(share: Share, of_tokens: list[Tensor], of_norm: list[Tensor | None]) -> tuple[list[Tensor], list[Any]]:
    """Partial gradients at tokens and norm, summed over the parts in one."""
    whole = share.add_all([*of_tokens, *(x for x in of_norm if x is not None)])
    count = len(of_tokens)
    rest = iter(whole[count:])
    return whole[:count], [None if x is None else next(rest) for x in of_norm]


def _given(depth: int, tensors: Any) -> _Given:
    rest = list(tensors[8:])
    return _Given(list(tensors[:6]), rest[:depth], rest[depth : 2 * depth], rest[2 * depth :])


class _Back:
    """Goes back through the groups of a scan, and sums the gradients at what they share.

    Attributes:
        of_norm: At scale and shift; None until a group has given one, like the next two.
        of_anchors: At the anchors of the state shell.
        of_fresh: At the states in which documents begin.
    """

    def __init__(self, layout: _Layout, network: Network, given: _Given) -> None:
        self.layout, self.network, self.given = layout, network, given
        self.of_norm: list[Tensor | None] = [None, None]
        self.of_anchors: list[Tensor | None] = [None] * len(given.anchors)
        self.of_fresh: list[Tensor | None] = [None] * len(given.fresh)

    def through(
        self, span: slice, stored: _Stored, of_reads: Tensor, of_end: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients at a group's tokens and at its first state; walks through the group again."""
        arguments = [x[:, span] for x in self.given.tokens]
        tokens = Tokens(*map(self.layout.chunks.split, arguments[:3]))
        borders, real = self.layout.borders(span, self.given)
        with torch.enable_grad():
            leaves = [self.layout.chunks.split_gate(x.detach()).requires_grad_() for x in arguments[3:]]
            made = gates_of(leaves[0], leaves[1], leaves[2], real)
        gates = Gates(*(x.detach() for x in made))
        again = _replaying(self.network, stored.sums)
        walked = walk(again, tokens, gates, stored.start, borders, stored.bounds)
        reads = read(again, tokens, gates, walked)
        normed = norm_of_reads(again, len(walked.paths), reads.output)
        of_answers = self.layout.chunks.split(of_reads)
        found = group_gradient(self.network, tokens, gates, walked, borders, reads, normed, of_answers, of_end)
        _add(self.of_norm, found.norm)
        _add(self.of_anchors, found.anchors)
        _add(self.of_fresh, found.fresh)
        differentiated = [(x, of) for x, of in zip(made, found.gates, strict=True) if of is not None]
        outputs, gradients = zip(*differentiated, strict=True)
        of_gates = torch.autograd.grad(outputs, leaves, gradients)
        chunks, batch = self.layout.chunks, self.layout.batch
        parts = [chunks.join(x, batch) for x in found.tokens] + [chunks.join_gate(x, batch) for x in of_gates]
        return parts, found.start


def _add(totals: list[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    """Adds what a group has given; documents may begin in none, and then there is nothing to add to."""
    for i, part in enumerate(parts[: len(totals)]):
        if part is not None:
            total = totals[i]
            totals[i] = part if total is None else total + part
