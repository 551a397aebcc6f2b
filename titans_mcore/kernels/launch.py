"""Buffers and launches of the kernels: the scan, and its gradient group of chunks by group of chunks."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..memory.layout import group_size
from ..memory.rule import LAYER_NORM_EPS
from .backward_chain import chain_backward_kernel
from .backward_reads import reads_backward_kernel
from .backward_rest import anchors_backward_kernel, rest_backward_kernel
from .forward import reads_kernel, walk_kernel
from .fused import Shape
from .network import INTERPRETED


class Arguments(NamedTuple):
    """The tensors of a scan, in the order in which autograd sees them; shapes in forward.py."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    read: Tensor
    end: Tensor
    writes: Tensor
    write: Tensor
    mass: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    start: Tensor
    fresh: Tensor | None
    anchors: Tensor | None
    closed: Tensor | None
    restarts: Tensor


def scan(shape: Shape, tensors: Arguments, keep_every: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reads (B, T, H, D), the last states (N, size) and those of every keep_every-th chunk; 0 keeps none."""
    reads = torch.empty(tensors.queries.shape, dtype=tensors.queries.dtype, device=tensors.queries.device)
    every, state = keep_every or group_size(shape.chunks), tensors.start
    walk, kept = _Walk(shape, tensors, every), None
    if keep_every:
        kept = state.new_empty(-(-shape.chunks // every), *state.shape)
    for begin in range(0, shape.chunks, every):
        if kept is not None:
            kept[begin // every] = state
        span = slice(begin, min(begin + every, shape.chunks))
        walk.launch(span, state)
        _launch_reads(shape, tensors, span, walk, reads)
        state = walk.states[span.stop - span.start]
    return reads, state.clone(), kept


def scan_gradient(
    shape: Shape, tensors: Arguments, kept: Tensor, every: int, of_reads: Tensor, of_end: Tensor
) -> list[Tensor | None]:
    """Gradients at the first 13 of the arguments.

    Args:
        shape: Of the scan, like tensors.
        kept: States with which the groups of chunks begin, (groups, N, size).
        every: Chunks g of a group.
        of_reads: Gradient at the reads, (B, T, H, D).
        of_end: Gradient at the last states, (N, size).
    """
    found = _Gradients(shape, tensors, of_end)
    scratch = _Scratch(shape, tensors, min(every, shape.chunks))
    of_reads = of_reads.contiguous()
    for begin in reversed(range(0, shape.chunks, every)):
        span = slice(begin, min(begin + every, shape.chunks))
        _launch_gradient(shape, tensors, span, kept[begin // every], of_reads, found, scratch)
    return found.by_argument(shape, tensors)


class _Gradients:
    """Buffers of the gradients. What is written once begins empty, what is added to begins at zero."""

    def __init__(self, shape: Shape, tensors: Arguments, of_end: Tensor) -> None:
        # Contiguous, also where the tokens are not: the kernels write (B, T, H, D) row after row.
        self.queries, self.keys, self.values = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors[:3]
        )
        self.read, self.end, self.writes, self.write = (torch.empty_like(x) for x in tensors[3:7])
        self.mass = None if tensors.mass is None else torch.empty_like(tensors.mass)
        self.state = of_end.clone(memory_format=torch.contiguous_format)
        self.fresh = None if tensors.fresh is None else torch.zeros_like(tensors.start)
        self.anchors = None
        if tensors.anchors is not None:
            self.anchors = tensors.start.new_zeros(shape.memories, shape.size // 2)
        self.norm = None
        if shape.residual_norm:
            self.norm = tensors.start.new_empty(shape.chunks, shape.memories, 2, shape.width)

    def by_argument(self, shape: Shape, tensors: Arguments) -> list[Tensor | None]:
        """In the order of Arguments, parts by memory summed to what the argument is by."""
        norm: list[Tensor | None] = [None, None]
        if self.norm is not None:
            by_head = self.norm.unflatten(1, (shape.batch, shape.heads)).sum((0, 1))
            parts = zip((tensors.scale, tensors.shift), by_head.unbind(1), strict=True)
            norm = [None if x is None else part for x, part in parts]
        fresh, anchors = _as_given(self.fresh, tensors.fresh), _as_given(self.anchors, tensors.anchors)
        gates = [self.read, self.end, self.writes, self.write, self.mass]
        return [self.queries, self.keys, self.values, *gates, *norm, self.state, fresh, anchors]


class _Walk:
    """What a group of chunks comes to; (g, N) first.

    Attributes:
        states: With which the chunks begin, and the one after the group, (g + 1, N, size).
        factors: By what the state shell has scaled the matrices, (g, N, 4).
        alike: Products of the keys' inputs of the last matrix, (g, N, b, b).
        hidden: The keys' z, and what arrives there of the last delta, (g, N, 2, b, HIDDEN).
        deltas: The last delta and LayerNorm's value, (g, N, 2, b, D).
        known: What else errors.deltas_of gives, (g, N, 4, b).
        held: Of (b,) each: the share of the first matrix' steps, and |delta|^2 there; in the backward pass also what
            that has of a gradient of 1 at the share, and the gradient at the share.
    """

    def __init__(self, shape: Shape, tensors: Arguments, group: int) -> None:
        self.shape, self.tensors = shape, tensors
        new, first, block = tensors.start.new_empty, (group, shape.memories), shape.block
        self.states = new(group + 1, shape.memories, shape.size)
        self.factors = None if shape.rms_limit is None else new(*first, 4)
        self.alike = new(*first, block, block) if shape.exact else None
        self.hidden = new(*first, 2, block, shape.hidden)
        self.deltas = new(*first, 2, block, shape.width)
        self.known = new(*first, 4, block) if shape.residual_norm else None
        self.held = None if tensors.mass is None else new(*first, 4, block)
        self._aims = new(shape.memories, block, shape.width) if shape.exact else None

    def launch(self, span: slice, start: Tensor) -> None:
        """Take all memories through the chunks, from states (N, size)."""
        t, shape = self.tensors, self.shape
        fresh = t.start if t.fresh is None else t.fresh
        walk_kernel[(shape.memories,)](
            t.keys, t.values, t.read, t.end, t.writes, t.write, t.mass, t.scale, t.shift,
            start, self.states, self.factors, self._aims, self.alike, self.hidden, self.deltas, self.known, self.held,
            fresh, t.anchors, t.restarts, t.closed, *_where(shape, t, span),
            _count(span.stop - span.start), len(fresh),
            LIMIT=shape.rms_limit, EXACT=shape.exact, **_settings(shape, t, shape.chain_tile),
        )  # fmt: skip


class _Scratch(_Walk):
    """What a group's chunks hand on in the backward pass.

    Attributes:
        of_states: Gradients at the states.
        wide: Of (b, HIDDEN) each: gradients at the keys' h, at last at z, and first delta; the queries' x and gradient
            at z, (g, N, 4, b, HIDDEN).
        narrow: Of (b, D) each: gradients at keys, last delta and queries' raw answer; half the gradient of
            |first delta|^2 at the last one, at last the one at the keys' output; what that has of a gradient of 1 at
            the share, (g, N, 5, b, D).
    """

    def __init__(self, shape: Shape, tensors: Arguments, group: int) -> None:
        super().__init__(shape, tensors, group)
        new, first = tensors.start.new_empty, (group, shape.memories)
        self.of_states = torch.empty_like(self.states)
        self.wide = new(*first, 4, shape.block, shape.hidden)
        self.narrow = new(*first, 5, shape.block, shape.width)


def _as_given(gradient: Tensor | None, argument: Tensor | None) -> Tensor | None:
    """Gradients by memory, (N, ...), for an argument by memory or by head."""
    if gradient is None or argument is None or len(gradient) == len(argument):
        return gradient
    return gradient.unflatten(0, (-1, len(argument))).sum(0)


def _launch_reads(shape: Shape, tensors: Arguments, span: slice, walk: _Walk, reads: Tensor) -> None:
    t = tensors
    reads_kernel[(shape.memories, span.stop - span.start)](
        t.queries, t.keys, reads, t.read, t.writes, t.scale, t.shift, t.anchors,
        walk.states, walk.hidden, walk.deltas, walk.held,
        *_where(shape, t, span), **_settings(shape, t, shape.tile),
    )  # fmt: skip


def _launch_gradient(
    shape: Shape,
    tensors: Arguments,
    span: slice,
    start: Tensor,
    of_reads: Tensor,
    found: _Gradients,
    scratch: _Scratch,
) -> None:
    t, s, group = tensors, scratch, span.stop - span.start
    every, where, settings = (shape.memories, group), _where(shape, t, span), _settings(shape, t, shape.tile)
    s.launch(span, start)
    reads_backward_kernel[every](
        t.queries, t.keys, t.values, of_reads, found.queries,
        t.read, t.writes, t.mass, found.read, found.writes, t.scale, t.shift, t.anchors,
        s.states, s.hidden, s.deltas, s.known, s.held, s.wide, s.narrow, found.norm, *where, **settings,
    )  # fmt: skip
    s.of_states[group].copy_(found.state)
    chain_backward_kernel[(shape.memories,)](
        t.queries, t.keys, t.read, t.end, t.writes, t.write, t.scale, t.anchors,
        s.states, s.of_states, s.factors, s.alike, s.of_states if found.fresh is None else found.fresh, t.restarts,
        s.hidden, s.deltas, s.known, s.held, s.wide, s.narrow, *where, _count(group),
        LIMIT=shape.rms_limit, EXACT=shape.exact, **_settings(shape, t, shape.chain_tile),
    )  # fmt: skip
    found.state.copy_(s.of_states[0])
    rest_backward_kernel[every](
        t.keys, t.values, found.keys, found.values,
        t.read, t.writes, t.write, t.mass, found.read, found.writes, found.end, found.write, found.mass,
        t.scale, t.shift, t.anchors, s.states, s.of_states, s.alike,
        s.hidden, s.deltas, s.known, s.held, s.wide, s.narrow, found.norm, *where, EXACT=shape.exact, **settings,
    )  # fmt: skip
    if t.anchors is not None:
        anchors_backward_kernel[(shape.memories, shape.hidden // shape.tile)](
            t.queries, t.keys, t.read, t.end, found.anchors, s.of_states, s.hidden, s.wide, s.narrow,
            *where, _count(group), EXACT=shape.exact, **settings,
        )  # fmt: skip


def _where(shape: Shape, tensors: Arguments, span: slice) -> tuple[int, ...]:
    """Strides of the tokens, and which chunks of how many."""
    return (*tensors.queries.stride()[:3], shape.memories, shape.heads, shape.chunks, span.start)


def _count(number: int) -> Any:
    """A bound of a loop. The interpreter cannot make an index of one that is a tensor (NumPy 2.4 refuses)."""
    return tl.constexpr(number) if INTERPRETED.value else number


def _settings(shape: Shape, tensors: Arguments, tile: int) -> dict[str, Any]:
    """Compile-time arguments that all kernels have, and `tiles`.

    Eight warps where long chunks, or a tile of weights and momentum of each matrix, leave four too few registers.
    """
    return {
        "tiles": _count(shape.hidden // tile),
        "BLOCK": shape.block,
        "D": shape.width,
        "HIDDEN": shape.hidden,
        "TILE": tile,
        "DEPTH": shape.depth,
        "NORM": shape.residual_norm,
        "EPS": LAYER_NORM_EPS,
        "OPERAND": tl.bfloat16 if tensors.queries.dtype == torch.bfloat16 else tl.float32,
        "num_warps": 8 if 2 * shape.depth * shape.width * tile >= 16_384 or shape.block >= 64 else 4,
        "num_stages": 1,
    }
