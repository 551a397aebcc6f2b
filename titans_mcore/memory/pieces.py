"""Pieces of sequences: go on inside the open chunk, run the chunks that end, begin a new open chunk with the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .accelerated import fused_scan
from .channelwise import channelwise_scan
from .checkpointed import chunked_scan
from .coefficients import by_channel
from .looks import Looks, Matrices, scan_and_look
from .network import Network
from .packing import Chunks, PackedRows
from .recurrence import recurrent_scan
from .state import MemoryState, OpenChunk


@dataclass(frozen=True)
class Memory:
    """What does not change along a sequence.

    Attributes:
        network: The memory network, and the process's part of it.
        initial: L of (H, d_in, d_out), the learned M_0 or the process's parts of it.
        chunk_size: Tokens b of a chunk.
        backend: The scan that is used, "chunked", "fused" or "oracle".
        looks: Chunks that are looked at on the way; None for none.
    """

    network: Network
    initial: list[Tensor]
    chunk_size: int
    backend: str
    looks: Looks | None = None

    def scan(
        self, tokens: list[Tensor], start: Matrices, chunks: Chunks, fresh: Matrices | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run chunks; see checkpointed.chunked_scan. The oracle takes those without documents or empty slots."""
        if self.looks is None:
            return self._scan(tokens, start, chunks, fresh)
        return scan_and_look(self.looks, self._scan, self.network, self.initial, tokens, start, chunks, fresh)

    def _scan(
        self, tokens: list[Tensor], start: Matrices, chunks: Chunks, fresh: Matrices | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        if self.backend == "oracle":
            return recurrent_scan(self.network, tokens, *start, self.initial, self.chunk_size)
        scan = chunked_scan
        if self.backend == "fused":
            scan = fused_scan
        elif by_channel(tokens, len(self.initial)):
            scan = channelwise_scan
        return scan(self.network, tokens, *start, self.initial, chunks, fresh)


def scan_whole(memory: Memory, tokens: list[Tensor], state: MemoryState) -> tuple[Tensor, MemoryState]:
    """A piece in which every row goes on with one sequence; tokens as for recurrent_scan."""
    start, opened = (state.weights, state.momentum), 0
    if (chunk := state.open_chunk) is not None:
        start, opened, tokens = (chunk.weights, chunk.momentum), chunk.tokens[0].shape[1], _behind(chunk, tokens)
    length = tokens[0].shape[1]
    whole = length // memory.chunk_size * memory.chunk_size
    reads = []
    if whole:
        read, weights, momentum = memory.scan([x[:, :whole] for x in tokens], start, Chunks(memory.chunk_size))
        reads.append(read)
        start = weights, momentum
    end = MemoryState(*start)
    if whole < length:
        rest = [x[:, whole:] for x in tokens]
        read, weights, momentum = memory.scan(rest, start, Chunks(length - whole, closed=False))
        reads.append(read)
        end = MemoryState(weights, momentum, OpenChunk(*start, rest[1:]))
    return torch.cat(reads, 1)[:, opened:], end


def scan_packed(
    memory: Memory, tokens: list[Tensor], state: MemoryState, first: MemoryState, rows: PackedRows | None
) -> tuple[Tensor, MemoryState]:
    """A piece of packed or padded rows; a document begins in the state `first`."""
    rows, opened = rows or PackedRows(real=_all(tokens[0])), 0
    start: Matrices = (state.weights, state.momentum)
    if (chunk := state.open_chunk) is not None:
        there = _all(chunk.tokens[0]) if chunk.real is None else chunk.real
        rows, start = rows.after(there), (chunk.weights, chunk.momentum)
        opened, tokens = there.shape[1], _behind(chunk, tokens)
    packing = rows.packing(memory.chunk_size, tokens[0].device)
    reads = []
    if packing.closed is not None:
        laid = [packing.closed.lay(x) for x in tokens]
        read, weights, momentum = memory.scan(laid, start, packing.closed.chunks, (first.weights, first.momentum))
        reads.append(read)
        start = weights, momentum
    if packing.begins_open:
        start = _where(packing.restarts, (first.weights, first.momentum), start)
    end = MemoryState(*start)
    if packing.open is not None:
        laid = [packing.open.lay(x) for x in tokens]
        read, weights, momentum = memory.scan(laid, start, packing.open.chunks)
        reads.append(read)
        real = None if packing.open.chunks.counts is None else packing.open.filled
        end = MemoryState(weights, momentum, OpenChunk(*start, laid[1:], real))
    if not reads:  # nothing but padding
        return torch.zeros_like(tokens[0])[:, opened:], state
    return packing.collect(torch.cat(reads, 1))[:, opened:], end


def scan_rows_apart(
    memory: Memory, tokens: list[Tensor], state: MemoryState, first: MemoryState, rows: PackedRows | None
) -> tuple[Tensor, MemoryState]:
    """What scan_packed has to equal: every document of every row by itself, without what is not real."""
    batch, length = tokens[0].shape[:2]
    starts = torch.zeros(batch, length, dtype=torch.bool) if rows is None or rows.starts is None else rows.starts
    real = _all(tokens[0]) if rows is None or rows.real is None else rows.real
    reads, ends = torch.zeros_like(tokens[0]), []
    for row in range(batch):
        now = _row(state, row)
        for document in range(int(starts[row].sum()) + 1):
            places = (real[row] & (starts[row].cumsum(0) == document)).nonzero()[:, 0]
            if not len(places):
                continue
            if document:
                now = _row(first, row)
            read, now = scan_whole(memory, [x[row : row + 1, places] for x in tokens], now)
            reads = reads.index_put((torch.tensor(row), places), read[0])
        ends.append(now)
    return reads, _in_one(ends)


def _behind(chunk: OpenChunk, tokens: list[Tensor]) -> list[Tensor]:
    """The tokens of a piece behind those of the open chunk, whose queries have read already."""
    earlier = [torch.zeros_like(chunk.tokens[0]), *chunk.tokens]
    return [torch.cat([old.to(new.dtype), new], 1) for old, new in zip(earlier, tokens, strict=True)]


def _all(x: Tensor) -> Tensor:
    """A mask for all tokens of x (B, T, ...)."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def _where(rows: Tensor, there: Matrices, elsewhere: Matrices) -> Matrices:
    """States of these rows (B,) from one, of the others from the other."""
    mask = rows[:, None, None, None]
    weights, momentum = (
        [torch.where(mask, a, b) for a, b in zip(*both, strict=True)] for both in zip(there, elsewhere, strict=True)
    )
    return weights, momentum


def _row(state: MemoryState, row: int) -> MemoryState:
    """One row of a state, its open chunk without empty places."""
    one = state.map(lambda x: x[row : row + 1])
    if one.open_chunk is None or one.open_chunk.real is None:
        return one
    chunk, there = one.open_chunk, one.open_chunk.real[0]
    if not there.any():
        return MemoryState(chunk.weights, chunk.momentum)
    tokens = [x[:, there] for x in chunk.tokens]
    return MemoryState(one.weights, one.momentum, OpenChunk(chunk.weights, chunk.momentum, tokens))


def _in_one(rows: list[MemoryState]) -> MemoryState:
    """States of one row each as one state."""

    def stack(matrices: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(column) for column in zip(*matrices, strict=True)]

    weights, momentum = stack([x.weights for x in rows]), stack([x.momentum for x in rows])
    if all(x.open_chunk is None for x in rows):
        return MemoryState(weights, momentum)
    # A row without an open chunk goes on from where it stands.
    begun = [x.open_chunk or x for x in rows]
    like = next(x.open_chunk for x in rows if x.open_chunk is not None)
    held = [[x[:, :0] for x in like.tokens] if row.open_chunk is None else row.open_chunk.tokens for row in rows]
    counts = torch.tensor([tokens[0].shape[1] for tokens in held])
    longest = int(counts.max())

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, longest - x.shape[1], *x.shape[2:])], 1)

    tokens = stack([[padded(x) for x in tokens] for tokens in held])
    real = None if bool((counts == longest).all()) else torch.arange(longest) < counts.unsqueeze(1)
    chunk = OpenChunk(stack([x.weights for x in begun]), stack([x.momentum for x in begun]), tokens, real)
    return MemoryState(weights, momentum, chunk)
