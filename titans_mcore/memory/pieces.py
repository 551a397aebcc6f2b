"""Pieces of sequences: go on inside the open chunk, run the chunks that end, begin a new open chunk with the rest."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Matrices, MemoryState, OpenChunk, Tokens
from .layout import Chunks, PackedRows
from .rule import Memory


class Backend(NamedTuple):
    """One way to compute the memory.

    Attributes:
        scan: Runs chunks; see chunk.chunk_scan.
        go_on: Runs tokens that stay inside the open chunk; see chunk.go_on.
    """

    scan: Callable[..., tuple[Tensor, Matrices]]
    go_on: Callable[..., tuple[Tensor, MemoryState]]


def scan_whole(
    memory: Memory, backend: Backend, tokens: Tokens, state: MemoryState, *, close: bool
) -> tuple[Tensor, MemoryState]:
    """A piece in which every row goes on with one sequence; with `close` it is the last one before a border."""
    reads, matrices, opened = [], state.matrices, state.open_chunk
    length, begun = tokens.keys.shape[1], 0 if opened is None else opened.tokens.keys.shape[1]
    done = 0
    if begun:
        done = min(length, memory.rule.chunk_size - begun)
        read, state = backend.go_on(memory, tokens.span(0, done), state, ends=close and done == length)
        reads.append(read)
        matrices = state.matrices
    whole = (length - done) // memory.rule.chunk_size * memory.rule.chunk_size
    if whole:
        read, matrices = backend.scan(memory, tokens.span(done, done + whole), matrices, Chunks(memory.rule.chunk_size))
        reads.append(read)
        done += whole
        state = MemoryState(matrices.weights, matrices.momentum)
    if done < length:
        rest, state = tokens.span(done, length), MemoryState(matrices.weights, matrices.momentum)
        if close:
            read, matrices = backend.scan(memory, rest, matrices, Chunks(length - done, closed=False))
            state = MemoryState(matrices.weights, matrices.momentum)
        else:
            read, state = backend.go_on(memory, rest, state, ends=False)
        reads.append(read)
    return torch.cat(reads, 1), state


def scan_packed(
    memory: Memory, backend: Backend, tokens: Tokens, state: MemoryState, first: Matrices, rows: PackedRows | None
) -> tuple[Tensor, MemoryState]:
    """A piece of packed or padded rows; a document begins in `first`."""
    rows, opened = rows or PackedRows(real=_all(tokens)), 0
    start = state.matrices
    if (chunk := state.open_chunk) is not None:
        there = _all(chunk.tokens) if chunk.real is None else chunk.real
        rows, opened, tokens = rows.after(there), there.shape[1], tokens.behind(chunk.tokens)
    packing = rows.packing(memory.rule.chunk_size, tokens.keys.device)
    reads = []
    if packing.closed is not None:
        read, start = backend.scan(memory, tokens.map(packing.closed.lay), start, packing.closed.chunks, first)
        reads.append(read)
    if packing.begins_open:
        begins = packing.restarts[:, None, None, None]
        start = first.joined(start, lambda a, b: torch.where(begins, a, b))
    end = MemoryState(start.weights, start.momentum)
    if packing.open is not None:
        laid = tokens.map(packing.open.lay)
        if packing.open.chunks.counts is None:  # every row holds as many: they go on like whole rows
            read, end = backend.go_on(memory, laid, end, ends=False)
        else:
            read, _ = backend.scan(memory, laid, start, packing.open.chunks)
            end.open_chunk = OpenChunk(laid, real=packing.open.filled)
        reads.append(read)
    if not reads:  # nothing but padding
        return torch.zeros_like(tokens.queries)[:, opened:], state
    return packing.collect(torch.cat(reads, 1))[:, opened:], end


def scan_rows_apart(
    memory: Memory, backend: Backend, tokens: Tokens, state: MemoryState, first: Matrices, rows: PackedRows | None
) -> tuple[Tensor, MemoryState]:
    """What scan_packed has to equal: every document of every row by itself, without what is not real."""
    batch, length = tokens.keys.shape[:2]
    starts = torch.zeros(batch, length, dtype=torch.bool) if rows is None or rows.starts is None else rows.starts
    real = _all(tokens) if rows is None or rows.real is None else rows.real
    reads, ends = torch.zeros_like(tokens.queries), []
    for row in range(batch):
        now = _row(state, row)
        for document in range(int(starts[row].sum()) + 1):
            places = (real[row] & (starts[row].cumsum(0) == document)).nonzero()[:, 0]
            if not len(places):
                continue
            if document:
                begun = first.map(lambda x, row=row: x[row : row + 1])  # type: ignore[misc]
                now = MemoryState(begun.weights, begun.momentum)
            here = tokens.map(lambda x, row=row, places=places: x[row : row + 1, places])  # type: ignore[misc]
            read, now = scan_whole(memory, backend, here, now, close=False)
            reads = reads.index_put((torch.tensor(row), places), read[0])
        ends.append(now)
    return reads, _rows_in_one(ends)


def _all(tokens: Tokens) -> Tensor:
    """A mask for all tokens."""
    return torch.ones(tokens.keys.shape[:2], dtype=torch.bool, device=tokens.keys.device)


def _row(state: MemoryState, row: int) -> MemoryState:
    """One row of a state, its open chunk without empty places."""
    one = state.map(lambda x: x[row : row + 1])
    if one.open_chunk is None:
        return one
    chunk, there = one.open_chunk, one.open_chunk.real
    tokens = chunk.tokens if there is None else chunk.tokens.map(lambda x: x[:, there[0]])
    if not tokens.keys.shape[1]:
        return MemoryState(one.weights, one.momentum)
    return MemoryState(one.weights, one.momentum, OpenChunk(tokens))


def _rows_in_one(rows: list[MemoryState]) -> MemoryState:
    """States of one row each as one state."""

    def stack(matrices: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(column) for column in zip(*matrices, strict=True)]

    weights, momentum = stack([x.weights for x in rows]), stack([x.momentum for x in rows])
    begun = [x.open_chunk.tokens for x in rows if x.open_chunk is not None]
    if not begun:
        return MemoryState(weights, momentum)
    held = [begun[0].span(0, 0) if x.open_chunk is None else x.open_chunk.tokens for x in rows]
    counts = torch.tensor([tokens.keys.shape[1] for tokens in held])
    longest = int(counts.max())

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, longest - x.shape[1], *x.shape[2:])], 1)

    columns = [torch.cat(column) for column in zip(*(x.map(padded).tensors() for x in held), strict=True)]
    left = iter(columns)
    tokens = begun[0].map(lambda _: next(left))
    real = None if bool((counts == longest).all()) else torch.arange(longest) < counts.unsqueeze(1)
    return MemoryState(weights, momentum, OpenChunk(tokens, real=real))
