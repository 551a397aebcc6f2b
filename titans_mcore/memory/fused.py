"""The fused kernels behind the same door as the chunk form, where they are installed and fit."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunk import gates_of
from .inputs import Matrices, Tokens
from .layout import Chunks
from .rule import Memory

# By name: this file travels with an exported model, which uses the kernels where the package is installed.
_KERNELS = "titans_mcore.kernels"
_SMALLEST_BLOCK = 16  # tokens that a matrix product in a kernel takes at least


def why_not_fused(memory: Memory, queries: Tensor, *, channelwise: bool, sharded: bool) -> str:
    """Why the fused kernels cannot run for these arguments, in a sentence; empty if they can."""
    if sharded:
        return "the fused memory kernels compute whole memories, not parts of them; use memory backend 'chunked'"
    if channelwise:
        return "the fused memory kernels forget by head, not by channel; use memory backend 'chunked'"
    if memory.rule.exact:
        return "the fused memory kernels lack the stable rule of plain networks; use memory backend 'chunked'"
    if importlib.util.find_spec(_KERNELS.partition(".")[0]) is None:
        return "the fused memory kernels come with the titans-mcore package; install it or use memory backend 'chunked'"
    return importlib.import_module(_KERNELS).fused_fits(queries, memory.initial, memory.rule.chunk_size)


def fused_scan(
    memory: Memory, tokens: Tokens, start: Matrices, chunks: Chunks, fresh: Matrices | None = None
) -> tuple[Tensor, Matrices]:
    """The same as checkpoint.chunk_scan; queries, keys and values in half precision are multiplied as such."""
    network, rule = memory.network, memory.rule
    batch, length, heads = tokens.keys.shape[:3]
    device, size, block = tokens.keys.device, chunks.size, _block(chunks.size)
    if block != size:
        tokens = tokens.map(lambda x: _into_blocks(x, size, block))
        counts = torch.full((length // size, batch), size) if chunks.counts is None else chunks.counts
        chunks = Chunks(block, chunks.closed, counts, chunks.restarts)
    assert isinstance(tokens.alpha, Tensor)
    theta, eta, alpha = map(chunks.split_gate, (tokens.theta, tokens.eta, tokens.alpha))
    closed: bool | Tensor = chunks.closed
    if chunks.closed and chunks.counts is not None:
        closed = (chunks.counts == size).to(device)
    first: dict[str, Any] = {}
    if chunks.restarts is not None:
        assert fresh is not None
        first = {
            "restarts": chunks.restarts.to(device),
            "fresh_weights": [w.flatten(0, 1) for w in fresh.weights],
            "fresh_momentum": [s.flatten(0, 1) for s in fresh.momentum],
        }
    kernels = importlib.import_module(_KERNELS)
    borders = kernels.Borders(
        closed, anchors=memory.initial if rule.anchored else [], rms_limit=rule.rms_limit, **first
    )
    reads, weights, momentum = kernels.fused_scan(
        tokens.queries,
        tokens.keys,
        tokens.values,
        gates_of(theta, eta, alpha, chunks.real(heads, device)),
        start.weights,
        start.momentum,
        residual_norm=network.residual_norm,
        norm_weight=network.norm_weight,
        norm_bias=network.norm_bias,
        borders=borders,
    )
    if block != size:
        reads = reads.unflatten(1, (-1, block))[:, :, :size].flatten(1, 2)
    return reads, Matrices(weights, momentum)


def _block(size: int) -> int:
    """Slots of a chunk as the kernels take them: a power of two."""
    return max(_SMALLEST_BLOCK, 1 << (size - 1).bit_length())


def _into_blocks(x: Tensor, size: int, block: int) -> Tensor:
    """Tokens (B, C size, ...) in chunks of more slots, the rest of them empty, (B, C block, ...)."""
    by_chunk = x.unflatten(1, (-1, size))
    return F.pad(by_chunk, (0, 0) * (x.dim() - 2) + (0, block - size)).flatten(1, 2)
