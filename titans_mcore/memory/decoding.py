"""Token by token with the same shapes: an open chunk with room for all tokens that it may come to hold.

It is what a captured graph of operations needs. An open chunk holds fewer tokens than the chunk size b, so one with
room has b - 1 places; its tokens stand at the end, and the places in front write nothing. Where a row's token fills its
chunk, the chunk ends and all places are empty, in the same operations as for every other token.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunk import flat, gates_of_chunk, join, split, work_out
from .inputs import MemoryState, OpenChunk, Tokens, Writes
from .layout import take
from .rule import Memory


def with_room(memory: Memory, state: MemoryState, nothing: Tokens) -> MemoryState:
    """The same state, its open chunk with room; rows may stand at different places of their chunks.

    Args:
        memory: The memory.
        state: After any token.
        nothing: No tokens, (B, 0, ...), as they come to the memory.
    """
    room = memory.rule.chunk_size - 1
    if not room or has_room(memory, state):  # with chunks of one token none is ever open
        return state
    tokens, real = nothing, torch.ones_like(nothing.theta[..., 0, 0], dtype=torch.bool)
    if (opened := state.open_chunk) is not None:
        tokens = opened.tokens
        real = torch.ones_like(tokens.theta[..., 0, 0], dtype=torch.bool) if opened.real is None else opened.real
    order = real.to(torch.int8).argsort(dim=1, stable=True)  # empty places first
    more = room - real.shape[1]
    tokens = tokens.map(lambda x: F.pad(take(x, order), (0, 0) * (x.dim() - 2) + (more, 0)))
    real = F.pad(real.gather(1, order), (more, 0))
    heads, first = tokens.keys.shape[2], flat(state.matrices)
    here = tokens.map(lambda x: split(x.to(first.weights[0].dtype)))
    writes = work_out(memory, here, first, gates_of_chunk(memory, here, real.repeat_interleave(heads, 0))).writes
    return MemoryState(state.weights, state.momentum, _opened(tokens, writes, real))


def has_room(memory: Memory, state: MemoryState | None) -> bool:
    """Whether decode() takes the state."""
    opened = None if state is None else state.open_chunk
    return (
        opened is not None
        and opened.writes is not None
        and opened.real is not None
        and opened.real.shape[1] == memory.rule.chunk_size - 1
    )


def decode(memory: Memory, token: Tokens, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """chunk.go_on for one token of every row, (B, 1, ...), behind a state with room; the state after it has the same.

    Nothing of what is done depends on a value.
    """
    start, opened = state.matrices, state.open_chunk
    assert opened is not None
    assert opened.writes is not None
    assert opened.real is not None
    heads, first = token.keys.shape[2], flat(start)
    together, real = token.behind(opened.tokens), F.pad(opened.real, (0, 1), value=True)
    every = together.map(lambda x: split(x.to(first.weights[0].dtype)))
    gates = gates_of_chunk(memory, every, real.repeat_interleave(heads, 0))
    before = OpenChunk(opened.tokens, opened.writes.map(lambda x: x.flatten(0, 1)))
    work = work_out(memory, every.map(lambda x: x[:, -1:]), first, gates, before)
    reads = join(work.read(every.queries[:, -1:], first), len(real)).to(token.queries.dtype)
    full = real.all(1)
    ends = full[:, None, None, None]
    after = work.end(first).map(lambda x: memory.rule.into_shell(x, memory.network.shard).unflatten(0, (-1, heads)))
    after = after.joined(start, lambda new, old: torch.where(ends, new, old))
    left = (real & ~full.unsqueeze(1))[:, 1:]
    writes = work.writes.map(lambda x: x[:, 1:])
    return reads, MemoryState(after.weights, after.momentum, _opened(together.map(lambda x: x[:, 1:]), writes, left))


def _opened(tokens: Tokens, writes: Writes, real: Tensor) -> OpenChunk:
    """An open chunk of what N memories write; where no token is, no step is taken."""
    writes = writes.map(lambda x: x.unflatten(0, (len(real), -1)))
    writes.steps = writes.steps * real[:, None, :, None]
    return OpenChunk(tokens, writes, real)
