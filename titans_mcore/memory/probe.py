"""Looks into a scan: what some of its chunks learn from, worked out beside the scan, whatever its backend is.

A scan that is looked into goes from one chosen chunk to the next; there the states are at hand, and the quantities
follow from the same functions as the chunk form. The scan's own numbers do not change.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk import flat, gates_of_chunk, work_out
from .inputs import Backend, Matrices, MemoryState, Tokens
from .layout import Chunks
from .rule import Memory


@dataclass(frozen=True)
class Probed:
    """What a chunk's tokens meet; N memories, b tokens.

    Attributes:
        surprise: Norm of the inner gradient over all matrices, (N, b).
        written: How far a token's own step moves the weights, theta times that, (N, b).
        held: Where the rule makes a token's step smaller, or scales the chunk's weights back behind it, (N, b).
        drift: Root mean square of the weights of the chunk's start less the initial ones, (L, N).
        real: Which slots hold a token, (N, b).
    """

    surprise: Tensor
    written: Tensor
    held: Tensor
    drift: Tensor
    real: Tensor


@dataclass(frozen=True)
class Probe:
    """Which chunks are looked at, and who is told.

    Attributes:
        every_tokens: About so many tokens lie between two looks; less than a chunk looks at every one.
        tell: Takes what was seen, chunk after chunk.
    """

    every_tokens: int
    tell: Callable[[Probed], None]

    def chosen(self, chunks: int, size: int) -> list[int]:
        """The last of every few chunks; of fewer than these the last."""
        step = max(1, self.every_tokens // size)
        return list(range(step - 1, chunks, step)) or [chunks - 1]


@dataclass(frozen=True)
class _Probing:
    """A backend that goes from one look to the next."""

    probe: Probe
    backend: Backend

    def scan(
        self, memory: Memory, tokens: Tokens, start: Matrices, chunks: Chunks, fresh: Matrices | None = None
    ) -> tuple[Tensor, Matrices]:
        """Backend.scan; a chunk that is still open is not looked at: its tokens come again with those that fill it."""
        if not chunks.closed:
            return self.backend.scan(memory, tokens, start, chunks, fresh)
        size, count = chunks.size, tokens.keys.shape[1] // chunks.size
        reads, state, done = [], start, 0
        for chunk in [*self.probe.chosen(count, size), count]:
            if chunk > done:
                piece, here = tokens.span(done * size, chunk * size), chunks.group(slice(done, chunk))
                read, state = self.backend.scan(memory, piece, state, here, fresh)
                reads.append(read)
                done = chunk
            if chunk < count:
                here = chunks.group(slice(chunk, chunk + 1))
                met = _begun(state, here, fresh)
                self.probe.tell(probe_chunk(memory, tokens.span(chunk * size, (chunk + 1) * size), met, here))
        return torch.cat(reads, 1), state

    def go_on(self, memory: Memory, tokens: Tokens, state: MemoryState, *, ends: bool) -> tuple[Tensor, MemoryState]:
        """Backend.go_on; a chunk is looked at once it is full."""
        reads, after = self.backend.go_on(memory, tokens, state, ends=ends)
        together = tokens if state.open_chunk is None else tokens.behind(state.open_chunk.tokens)
        if together.keys.shape[1] == memory.rule.chunk_size:
            self.probe.tell(probe_chunk(memory, together, state.matrices, Chunks(memory.rule.chunk_size)))
        return reads, after


def probing(probe: Probe, backend: Backend) -> Backend:
    """The backend with looks on the way."""
    looks = _Probing(probe, backend)
    return Backend(looks.scan, looks.go_on)


@torch.no_grad()
def probe_chunk(memory: Memory, tokens: Tokens, start: Matrices, chunk: Chunks) -> Probed:
    """What the tokens of one chunk meet.

    Args:
        memory: The memory.
        tokens: The chunk's tokens, (B, b, ...).
        start: Weights and momentum at the chunk's start.
        chunk: Which of its slots are filled.
    """
    heads = tokens.keys.shape[2]
    state, rule, shard = flat(start), memory.rule, memory.network.shard
    dtype, depth = start.weights[0].dtype, len(memory.initial)
    real = chunk.real(heads, tokens.keys.device)
    here = tokens.map(lambda x: chunk.split(x.to(dtype))[0])
    gates = gates_of_chunk(memory, here, None if real is None else real[0])
    work = work_out(memory, here, state, gates)
    squares = []
    for layer, (h, delta) in enumerate(zip(work.writes.inputs, work.writes.deltas, strict=True)):
        inputs = shard.sum_of_inputs(layer, depth, h.square().sum(-1))
        squares.append(inputs * shard.sum_of_outputs(layer, depth, delta.square().sum(-1)))
    by_matrix = torch.stack(squares, -1)
    held, full = (work.writes.steps < here.theta).any(-1), chunk.full(heads, tokens.keys.device)
    after = work.end(state)
    ends = torch.stack([x.square().mean((-1, -2)) for x in (*after.weights, *after.momentum)])
    scaled_back = rule.beyond(shard.mean(ends)).any(0)
    if full is not None:
        scaled_back &= full[0]
    moved = torch.stack(
        [(w - first).square().mean((-1, -2)).flatten() for w, first in zip(start.weights, memory.initial, strict=True)]
    )
    return Probed(
        surprise=by_matrix.sum(-1).sqrt(),
        written=(by_matrix * work.writes.steps.square()).sum(-1).sqrt(),
        held=held | scaled_back.unsqueeze(-1),
        drift=shard.mean(moved).sqrt(),
        real=torch.ones_like(held) if real is None else real[0],
    )


def _begun(state: Matrices, chunk: Chunks, fresh: Matrices | None) -> Matrices:
    """The state with those of documents that begin in the chunk."""
    if chunk.restarts is None or fresh is None:
        return state
    begins = chunk.restarts[0].to(state.weights[0].device)[:, None, None, None]
    return fresh.joined(state, lambda first, x: torch.where(begins, first, x))
