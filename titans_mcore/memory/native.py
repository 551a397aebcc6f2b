"""The memory's native CPU operation behind the same door as the chunk form, where it is installed and fits."""

import importlib
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from .inputs import Matrices, MemoryState, OpenChunk, Tokens, Writes
from .layout import Chunks, group_size
from .rule import LAYER_NORM_EPS, SMALLEST_DECAY, VERSION, Memory

# By name: this file travels with an exported model, which uses the operation where the package is installed.
_OPERATION = "titans_mcore.native"


def why_not_native(device: torch.device, *, channelwise: bool, sharded: bool) -> str:
    """Why the native operation cannot run, in a sentence; empty if it can. Where it was never needed it is compiled."""
    if device.type != "cpu":
        return f"the native memory is for the CPU, and the queries are on {device.type}; use memory backend 'auto'"
    if sharded:
        return "the native memory computes whole memories, not parts of them; use memory backend 'chunked'"
    if channelwise:
        return "the native memory forgets by head, not by channel; use memory backend 'chunked'"
    if _OPERATION not in sys.modules and importlib.util.find_spec(_OPERATION.partition(".")[0]) is None:
        return "the native memory comes with the titans-mcore package; install it or use memory backend 'chunked'"
    if getattr(_operation(), "VERSION", None) != VERSION:
        return "the native memory installed is another version's; install this titans-mcore, or use 'chunked'"
    reason: str = _operation().why_not_built()
    return reason


def _operation() -> Any:
    return sys.modules.get(_OPERATION) or importlib.import_module(_OPERATION)


def native_scan(
    memory: Memory, tokens: Tokens, start: Matrices, chunks: Chunks, fresh: Matrices | None = None
) -> tuple[Tensor, Matrices]:
    """The same as chunk.chunk_scan, for every rule."""
    operation = _operation()
    tensors = _tensors(memory, tokens, start, chunks, None if chunks.restarts is None else fresh)
    count = tokens.keys.shape[1] // chunks.size
    reads, weights, momentum = operation.scan(tensors, _setting(operation, memory, chunks, count))
    return reads, Matrices(weights, momentum)


def native_go_on(memory: Memory, tokens: Tokens, state: MemoryState, *, ends: bool) -> tuple[Tensor, MemoryState]:
    """The same as chunk.go_on."""
    opened, new = state.open_chunk, tokens.keys.shape[1]
    together = tokens if opened is None else tokens.behind(opened.tokens)
    full = together.keys.shape[1] == memory.rule.chunk_size
    chunk = Chunks(together.keys.shape[1], closed=full)
    if not _differentiated(memory, together, state):
        reads, writes, after = _work_out(memory, together, state, chunk, ends=full or ends)
    else:
        # Gradients come from all the chunk's tokens at once; what is worked out of them is for who goes on without.
        reads, after = native_scan(memory, together, state.matrices, chunk)
        reads = reads[:, -new:]
        if not full and not ends:
            with torch.no_grad():
                _, writes, _ = _work_out(memory, together, state, chunk, ends=False)
    if full or ends:
        return reads, MemoryState(after.weights, after.momentum)
    return reads, MemoryState(state.weights, state.momentum, OpenChunk(together, writes))


def _work_out(
    memory: Memory, together: Tokens, state: MemoryState, chunk: Chunks, *, ends: bool
) -> tuple[Tensor, Writes, Matrices]:
    """Reads of those tokens of an open chunk that the state does not hold, what all write, and what is behind them."""
    operation, opened = _operation(), state.open_chunk
    before: tuple[Any, ...] = [], [], together.theta[:, :0]
    if opened is not None:
        assert opened.writes is not None
        before = opened.writes.inputs, opened.writes.deltas, opened.writes.steps.transpose(1, 2)
    reads, inputs, deltas, steps, weights, momentum = operation.go_on(
        _tensors(memory, together, state.matrices, chunk, None), _setting(operation, memory, chunk), *before, ends
    )
    return reads, Writes(inputs, deltas, steps.transpose(1, 2)), Matrices(weights, momentum)


def _differentiated(memory: Memory, tokens: Tokens, state: MemoryState) -> bool:
    """Whether a gradient may be asked for of what these give."""
    if not torch.is_grad_enabled():
        return False
    norm = [x for x in (memory.network.norm_weight, memory.network.norm_bias) if x is not None]
    return any(x.requires_grad for x in (*tokens.tensors(), *state.tensors(), *memory.initial, *norm))


def _tensors(
    memory: Memory, tokens: Tokens, start: Matrices, chunks: Chunks, fresh: Matrices | None
) -> tuple[Any, ...]:
    """Tensors as the operation takes them."""
    return (
        tokens.queries,
        tokens.keys,
        tokens.values,
        tokens.theta,
        tokens.eta,
        tokens.alpha,
        memory.network.norm_weight,
        memory.network.norm_bias,
        memory.initial if memory.rule.anchored else [],
        start.weights,
        start.momentum,
        [] if fresh is None else fresh.weights,
        [] if fresh is None else fresh.momentum,
        chunks.counts,
        chunks.restarts,
    )


def _setting(operation: Any, memory: Memory, chunks: Chunks, count: int = 1) -> Any:
    """All else that it takes, for so many chunks."""
    rule = memory.rule
    return operation.Setting(
        widths=[*(w.shape[-2] for w in memory.initial), memory.initial[-1].shape[-1]],
        size=chunks.size,
        group=group_size(count),
        closed=chunks.closed,
        norm=memory.network.residual_norm,
        exact=rule.exact,
        holds_last=rule.holds_last,
        rms_limit=rule.rms_limit,
        lower_steps=rule.lower_steps(len(memory.initial)),
        smallest_decay=SMALLEST_DECAY,
        epsilon=LAYER_NORM_EPS,
    )
