"""Buffers and launches of the kernels: the scan, and its gradient group of chunks by group of chunks."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..memory.rule import LAYER_NORM_EPS
from .backward_chain import chain_backward_kernel
from .backward_reads import reads_backward_kernel
from .forward import scan_kernel
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
    restarts: Tensor | None


def scan(shape: Shape, tensors: Arguments, keep_every: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reads (B, T, H, D), the last states (N, size) and those of every keep_every-th chunk; 0 keeps none."""
    reads = torch.empty(tensors.queries.shape, dtype=tensors.queries.dtype, device=tensors.queries.device)
    end = torch.empty_like(tensors.start)
    kept = None
    if keep_every:
        kept = tensors.start.new_empty(-(-shape.chunks // keep_every), *tensors.start.shape)
    _launch_scan(shape, tensors, slice(0, shape.chunks), tensors.start, end, reads, kept, None, keep_every)
    return reads, end, kept


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
    scratch = _Scratch(shape, tensors.start, min(every, shape.chunks), holds=tensors.mass is not None)
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


class _Scratch:
    """What the kernels of one group hand on; (g, N) first. Shapes in backward_reads.py."""

    def __init__(self, shape: Shape, like: Tensor, group: int, *, holds: bool) -> None:
        first = (group, shape.memories)
        self.states = like.new_empty(group + 1, shape.memories, shape.size)
        self.factors = None if shape.rms_limit is None else like.new_empty(*first, 4)
        self.wide = like.new_empty(*first, 4, shape.block, shape.hidden)
        self.narrow = like.new_empty(*first, 5, shape.block, shape.width)
        self.known = like.new_empty(*first, 4, shape.block) if shape.residual_norm else None
        self.held = like.new_empty(*first, 2, shape.block) if holds else None
        self.alike = _products(shape, like, group)


def _products(shape: Shape, like: Tensor, chunks: int) -> Tensor | None:
    """Room for the products of the keys' inputs of the last matrix, (chunks, N, b, b)."""
    return like.new_empty(chunks, shape.memories, shape.block, shape.block) if shape.exact else None


def _as_given(gradient: Tensor | None, argument: Tensor | None) -> Tensor | None:
    """Gradients by memory, (N, ...), for an argument by memory or by head."""
    if gradient is None or argument is None or len(gradient) == len(argument):
        return gradient
    return gradient.unflatten(0, (-1, len(argument))).sum(0)


def _launch_scan(
    shape: Shape,
    tensors: Arguments,
    span: slice,
    start: Tensor,
    after: Tensor,
    reads: Tensor | None,
    kept: Tensor | None,
    walk: _Scratch | None,
    keep_every: int,
) -> None:
    t = tensors
    factors, narrow, known, held, alike = None, None, None, None, _products(shape, start, 1)
    if walk is not None:
        factors, narrow, known, held, alike = walk.factors, walk.narrow, walk.known, walk.held, walk.alike
    aims = start.new_empty(shape.memories, shape.block, shape.width) if shape.exact else None
    scan_kernel[(shape.memories,)](
        t.queries, t.keys, t.values, reads,
        t.read, t.end, t.writes, t.write, t.mass, t.scale, t.shift,
        start, after, kept, factors, aims, alike, narrow, known, held, t.fresh, t.anchors, t.restarts, t.closed,
        *t.queries.stride()[:3], shape.memories, shape.heads, shape.chunks,
        _count(span.start), _count(span.stop), keep_every, 1 if t.fresh is None else len(t.fresh),
        LIMIT=shape.rms_limit, EXACT=shape.exact, ON_CHIP=shape.on_chip, **_settings(shape, t, shape.on_chip),
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
    t, group = tensors, span.stop - span.start
    strides = t.queries.stride()[:3]
    states = scratch.states
    _launch_scan(shape, t, span, start, states[group], None, states, scratch, 1)
    reads_backward_kernel[(shape.memories, group)](
        t.queries, t.keys, of_reads, found.queries,
        t.read, t.writes, found.read, found.writes, t.scale, t.anchors,
        states, scratch.wide, scratch.held, scratch.narrow, found.norm,
        *strides, shape.memories, shape.heads, shape.chunks, span.start,
        **_settings(shape, t, shape.gradient_on_chip),
    )  # fmt: skip
    chain_backward_kernel[(shape.memories,)](
        t.queries, t.keys, t.values, found.keys, found.values,
        t.read, t.end, t.writes, t.write, t.mass, found.read, found.writes, found.end, found.write, found.mass,
        t.scale, t.shift, t.anchors,
        states, found.state, scratch.factors, scratch.alike, found.fresh, found.anchors, t.restarts,
        scratch.wide, scratch.narrow, scratch.known, scratch.held, found.norm,
        *strides, shape.memories, shape.heads, shape.chunks, span.start, _count(group),
        LIMIT=shape.rms_limit, EXACT=shape.exact, ON_CHIP=shape.gradient_on_chip,
        **_settings(shape, t, shape.gradient_on_chip),
    )  # fmt: skip


def _count(number: int) -> Any:
    """A bound of a loop. The interpreter cannot make an index of one that is a tensor (NumPy 2.4 refuses)."""
    return tl.constexpr(number) if INTERPRETED.value else number


def _settings(shape: Shape, tensors: Arguments, on_chip: bool) -> dict[str, Any]:
    return constants(shape, tensors.queries.dtype, on_chip) | options(shape, on_chip)


def constants(shape: Shape, tokens: torch.dtype, on_chip: bool) -> dict[str, Any]:
    """Compile-time arguments that all kernels have, and `tiles`."""
    tile = shape.tile(on_chip)
    return {
        "tiles": _count(shape.hidden // tile),
        "BLOCK": shape.block,
        "D": shape.width,
        "HIDDEN": shape.hidden,
        "TILE": tile,
        "DEPTH": shape.depth,
        "NORM": shape.residual_norm,
        "EPS": LAYER_NORM_EPS,
        "OPERAND": tl.bfloat16 if tokens == torch.bfloat16 else tl.float32,
    }


def options(shape: Shape, on_chip: bool) -> dict[str, int]:
    """Eight warps where long chunks, or a tile of weights and momentum of each matrix, leave four too few registers."""
    tiles = 2 * shape.depth * shape.width * shape.tile(on_chip)
    return {"num_warps": 8 if tiles >= 16_384 or shape.block >= 64 else 4, "num_stages": 1}
