"""fused_scan: the dual form by Triton kernels, with gradients at all that it takes. No Triton is needed to import it.

It is a twin of memory/chunk.py. The gates' coefficients are made outside by fused.gates_of,
for all chunks at once and under autograd: they are b numbers a token. What is of the size of the state never exists for
every token: the forward pass keeps the states of every g-th chunk, g near the root of their number, and the backward
pass makes those between them anew, group by group.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory.fused import Gates
from ..memory.layout import group_size
from ..memory.triton_faults import avoid, dotted, fault_here, triton_version

SMALLEST_BLOCK = 16  # of a matrix product in Triton
LARGEST_CHUNK = 128
LARGEST_WIDTH = 128
LARGEST_HIDDEN = 256
STREAMED_NUMBERS = 2048  # in a tile of a matrix; with more the compiler spills registers where much is done at once


@dataclass(frozen=True)
class Borders:
    """What happens between chunks.

    Attributes:
        closed: Whether the state shell is after a chunk: for all alike, or (C, B) by chunk and row.
        restarts: Chunks that begin a document, (C, B) bool; None if none does.
        fresh_weights: L states in which a document begins, (H or N, d_in, d_out). Needed with restarts only.
        fresh_momentum: Likewise.
        anchors: M_0, to which forgetting leads, L of (H, d_in, d_out); empty where it leads to zero.
        rms_limit: Largest root mean square of a matrix and of its momentum in the shell; infinite for no shell.
    """

    closed: bool | Tensor = True
    restarts: Tensor | None = None
    fresh_weights: Sequence[Tensor] = ()
    fresh_momentum: Sequence[Tensor] = ()
    anchors: Sequence[Tensor] = ()
    rms_limit: float = math.inf


@dataclass(frozen=True)
class Shape:
    """Sizes and settings that the kernels are launched with; names as in forward.py."""

    batch: int
    heads: int
    chunks: int
    block: int
    width: int
    hidden: int
    depth: int
    residual_norm: bool
    exact: bool
    rms_limit: float | None  # None without a state shell

    @property
    def memories(self) -> int:
        return self.batch * self.heads

    @property
    def size(self) -> int:
        """Floats of one memory's state."""
        return 2 * self.depth * self.width * self.hidden

    @property
    def tile(self) -> int:
        """Columns of the hidden layer that are worked on at once where chunks are apart."""
        return self._columns(STREAMED_NUMBERS)

    @property
    def chain_tile(self) -> int:
        """Likewise where chunk follows upon chunk, and every tile is waited for."""
        return self._columns(4 * STREAMED_NUMBERS)

    def _columns(self, numbers: int) -> int:
        return min(self.hidden, max(numbers // self.width, 32)) if self.depth == 2 else self.hidden


def fused_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    *,
    residual_norm: bool,
    exact: bool = False,
    mass: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    borders: Borders | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Update and read N = B * H memories chunk by chunk (paper, section 3.1, in the dual form of memory/chunk.py).

    Products take their operands in the tokens' dtype; state and sums are float32. The result can be differentiated
    once, at every tensor that is given.

    Args:
        queries: (B, C b, H, D), float32 or bfloat16, any strides; keys and values alike. Slots of a chunk that hold no
            token are zeros, with gates of theta 0, eta 1 and alpha 0.
        gates: What fused.gates_of gives for all C chunks.
        weights: L = 1 or 2 matrices (B, H, d_in, d_out) before the first chunk; momentum alike.
        residual_norm: Whether the network is x + LayerNorm(MLP(x)); else it is the MLP.
        exact: Whether errors are those at the token's own last matrix; else those at the chunk's start.
        mass: What fused.chunk_mass gives, for two matrices with LayerNorm: steps of the first are held. None for none.
        norm_weight: LayerNorm's scale (H, D); None is 1.
        norm_bias: LayerNorm's shift (H, D); None is 0.
        borders: What happens between chunks; None is no state shell and forgetting to zero.

    Returns:
        The reads (B, C b, H, D) in the queries' dtype, and weights and momentum after the last chunk, float32.

    Raises:
        ValueError: The kernels cannot run for these arguments; the message is fused_fits' reason.
    """
    borders = borders or Borders()
    block, depth = gates.writes.shape[-1], len(weights)
    if reason := fused_fits(queries, weights, block):
        raise ValueError(reason)
    if queries.dtype == torch.bfloat16 and (fault := fault_here(queries.device)):
        avoid(fault)
    assert mass is None or (exact and depth == 2 and mass.shape == gates.write.shape[1:-1])
    heads, length = queries.shape[2], queries.shape[1]
    _check(queries, keys, values, gates, weights, momentum, borders.anchors)
    has_shell = math.isfinite(borders.rms_limit)
    shape = Shape(
        batch=queries.shape[0],
        heads=heads,
        chunks=length // block,
        block=block,
        width=queries.shape[-1],
        hidden=weights[0].shape[-1],
        depth=depth,
        residual_norm=residual_norm,
        exact=exact,
        rms_limit=borders.rms_limit if has_shell else None,
    )
    closed = _by_chunk(borders.closed, shape, queries.device) if has_shell else None
    restarts = _by_chunk(False if borders.restarts is None else borders.restarts, shape, queries.device)
    start = _pack([m.flatten(0, 1) for pair in zip(weights, momentum, strict=True) for m in pair])
    fresh = None
    if borders.restarts is not None:
        pairs = zip(borders.fresh_weights, borders.fresh_momentum, strict=True)
        fresh = _pack([m for pair in pairs for m in pair])
    anchors = _pack(borders.anchors) if borders.anchors else None
    tokens = _alike(queries, keys, values)
    coefficients = [x.float().contiguous() for x in gates]
    optional = [None if x is None else x.float().contiguous() for x in (mass, norm_weight, norm_bias)]
    tensors = (*tokens, *coefficients, *optional, start, fresh, anchors)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    keep_every = group_size(shape.chunks) if differentiated else 0
    reads, end = _FusedScan.apply(shape, keep_every, closed, restarts, *tensors)
    shapes = [w.shape for w in weights for _ in range(2)]
    matrices = end.split([s[-2] * s[-1] for s in shapes], 1)
    state = [m.view(s) for m, s in zip(matrices, shapes, strict=True)]
    return reads, state[::2], state[1::2]


def fused_fits(queries: Tensor, weights: Sequence[Tensor], chunk_size: int) -> str:
    """Why the kernels cannot run for these arguments, in a sentence; empty if they can.

    Args:
        queries: (B, T, H, D), like fused_scan's. T need not be whole chunks: the caller lays tokens into them.
        weights: L matrices (..., d_in, d_out).
        chunk_size: Tokens b of a chunk.
    """
    width, depth = queries.shape[-1], len(weights)
    if importlib.util.find_spec("triton") is None:
        return "the fused memory kernels need the triton package; install it or use memory backend 'chunked'"
    if not queries.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the fused memory kernels need CUDA tensors; these are on {queries.device}"
    if queries.dtype not in (torch.float32, torch.bfloat16):
        return f"the fused memory kernels take float32 and bfloat16 tokens; these are {queries.dtype}"
    if queries.dtype == torch.bfloat16 and (fault := fault_here(queries.device)) and not fault.variable:
        return (
            f"Triton {dotted(triton_version())} makes wrong code of the fused memory kernels on this GPU "
            f"({fault.source}); install Triton {fault.fixed} or later, or use memory backend 'chunked'"
        )
    if depth not in (1, 2):
        return f"the fused memory kernels take memories of 1 or 2 matrices; this one has {depth}"
    if not _is_power(chunk_size, LARGEST_CHUNK):
        return f"chunk_size is {chunk_size}; the fused memory kernels take powers of two from 16 to {LARGEST_CHUNK}"
    if not _is_power(width, LARGEST_WIDTH):
        return f"the head width is {width}; the fused memory kernels take powers of two from 16 to {LARGEST_WIDTH}"
    hidden = weights[0].shape[-1]
    if depth == 2 and not _is_power(hidden, LARGEST_HIDDEN):
        return f"the hidden width is {hidden}; the fused memory kernels take powers of two from 16 to {LARGEST_HIDDEN}"
    return ""


def _by_chunk(holds: bool | Tensor, shape: Shape, device: torch.device) -> Tensor:
    """For which chunks it holds, (C, B): also where for all or none, for which kernels would be others."""
    if isinstance(holds, Tensor):
        return holds.to(torch.int8).contiguous()
    return torch.full((shape.chunks, shape.batch), int(holds), dtype=torch.int8, device=device)


def _is_power(number: int, largest: int) -> bool:
    return SMALLEST_BLOCK <= number <= largest and number & (number - 1) == 0


def _check(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    anchors: Sequence[Tensor],
) -> None:
    """Shapes: a kernel given others would write where it must not."""
    batch, length, heads, width = queries.shape
    depth, chunks, memories, block = gates.writes.shape[:-1]
    rows, hidden = (depth, chunks, memories, block), weights[0].shape[-1]
    assert keys.shape == values.shape == queries.shape
    assert (length, memories) == (chunks * block, batch * heads)
    assert gates.read.shape == gates.write.shape == (*rows, 2)
    assert gates.writes.shape == (*rows, block)
    assert gates.end.shape == (*rows[:3], 2, 2)
    assert depth == len(weights) == len(momentum)
    pairs = [(width, hidden), (hidden, width)][:depth]
    for matrices in (weights, momentum):
        assert [tuple(m.shape) for m in matrices] == [(batch, heads, *pair) for pair in pairs]
    assert not anchors or [tuple(m.shape) for m in anchors] == [(heads, *pair) for pair in pairs]


def _pack(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices (M, d_in, d_out) of M memories one after another, (M, floats)."""
    return torch.cat([m.flatten(1) for m in matrices], 1).float()


def _alike(*tokens: Tensor) -> list[Tensor]:
    """Tokens of one set of strides, the last of which is 1; copies only if they are not so."""
    if tokens[0].stride(-1) == 1 and len({x.stride() for x in tokens}) == 1:
        return list(tokens)
    return [x.contiguous() for x in tokens]


class _FusedScan(torch.autograd.Function):
    """Arguments: shape, chunks of a group, closed, restarts, and launch.Arguments up to the anchors."""

    @staticmethod
    def forward(
        ctx: Any, shape: Shape, keep_every: int, closed: Tensor | None, restarts: Tensor, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        from . import launch

        arguments = launch.Arguments._make([*tensors, closed, restarts])
        reads, end, kept = launch.scan(shape, arguments, keep_every)
        ctx.shape, ctx.keep_every = shape, keep_every
        ctx.save_for_backward(*arguments, kept)
        return reads, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_reads: Tensor, of_end: Tensor) -> tuple[Tensor | None, ...]:
        from . import launch

        *saved, kept = ctx.saved_tensors
        found = launch.scan_gradient(ctx.shape, launch.Arguments(*saved), kept, ctx.keep_every, of_reads, of_end)
        return None, None, None, None, *found
