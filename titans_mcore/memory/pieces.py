"""Pieces of sequences: go on inside the open chunk, run the chunks that end, begin a new open chunk with the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import chunk_scan
from .fused import fused_scan
from .general import Memories, flat, general_scan, work_out
from .inputs import Matrices, MemoryState, OpenChunk, Tokens
from .layout import Chunks, PackedRows
from .naive import naive_scan
from .network import Network
from .probe import Probe, Scan, probe_chunk, scan_and_probe
from .rule import Rule


@dataclass(frozen=True)
class Memory:
    """What does not change along a sequence.

    Attributes:
        network: The memory network, and what the process holds of it.
        rule: The rule of its updates.
        initial: L of (H, d_in, d_out), the learned M_0 or the process's parts of it.
        chunk_size: Tokens b of a chunk.
        backend: The scan that is used, "chunked", "fused" or "oracle".
        probe: Chunks that are looked at on the way; None for none.
    """

    network: Network
    rule: Rule
    initial: list[Tensor]
    chunk_size: int
    backend: str
    probe: Probe | None = None

    def scan(
        self, tokens: Tokens, start: Matrices, chunks: Chunks, fresh: Matrices | None = None
    ) -> tuple[Tensor, Matrices]:
        """Run chunks; see checkpoint.chunk_scan. The oracle takes those without documents or empty slots."""
        scan: Scan = chunk_scan
        if self.backend == "oracle":
            scan = _naive
        elif self.backend == "fused":
            scan = fused_scan
        elif self.rule.exact or isinstance(tokens.alpha, list):
            scan = general_scan
        arguments = self.network, self.rule, tokens, start, self.initial, chunks, fresh
        return scan(*arguments) if self.probe is None else scan_and_probe(self.probe, scan, *arguments)

    def look(self, tokens: Tokens, start: Matrices) -> None:
        """At a chunk that was scanned token by token and is full."""
        if self.probe is not None:
            chunk = Chunks(self.chunk_size)
            self.probe.tell(probe_chunk(self.network, self.rule, tokens, start, self.initial, chunk))

    def memories(self, batch: int) -> Memories:
        """For chunks that are still open."""
        return Memories.of(self.network, self.rule, self.initial, batch)


def _naive(
    network: Network, rule: Rule, tokens: Tokens, start: Matrices, initial: list[Tensor], *_: object
) -> tuple[Tensor, Matrices]:
    """The oracle where another scan may stand."""
    return naive_scan(network, rule, tokens, start, initial)


def scan_whole(memory: Memory, tokens: Tokens, state: MemoryState, *, close: bool) -> tuple[Tensor, MemoryState]:
    """A piece in which every row goes on with one sequence; with `close` it is the last one before a border."""
    reads, matrices, opened = [], state.matrices, state.open_chunk
    length, begun = tokens.keys.shape[1], 0 if opened is None else opened.tokens.keys.shape[1]
    done = 0
    if begun:
        done = min(length, memory.chunk_size - begun)
        read, state = _go_on(memory, tokens.span(0, done), state, ends=close and done == length)
        reads.append(read)
        matrices = state.matrices
    whole = (length - done) // memory.chunk_size * memory.chunk_size
    if whole:
        read, matrices = memory.scan(tokens.span(done, done + whole), matrices, Chunks(memory.chunk_size))
        reads.append(read)
        done += whole
        state = MemoryState(matrices.weights, matrices.momentum)
    if done < length:
        rest, state = tokens.span(done, length), MemoryState(matrices.weights, matrices.momentum)
        if close:
            read, matrices = memory.scan(rest, matrices, Chunks(length - done, closed=False))
            state = MemoryState(matrices.weights, matrices.momentum)
        else:
            read, state = _go_on(memory, rest, state, ends=False)
        reads.append(read)
    return torch.cat(reads, 1), state


def _go_on(memory: Memory, tokens: Tokens, state: MemoryState, *, ends: bool) -> tuple[Tensor, MemoryState]:
    """Tokens that do not reach beyond the open chunk; `ends` ends it where it stands."""
    opened, start = state.open_chunk, state.matrices
    together = tokens if opened is None else tokens.behind(opened.tokens)
    full = together.keys.shape[1] == memory.chunk_size
    if memory.backend == "oracle":
        read, after = memory.scan(together, start, Chunks(together.keys.shape[1], closed=full))
        read = read[:, -tokens.keys.shape[1] :]
        chunk = OpenChunk(together)
    else:
        batch, heads = tokens.keys.shape[0], tokens.keys.shape[2]
        wide = tokens.map(lambda x: x.to(start.weights[0].dtype))
        by_memory, matrices = wide.map(_split), flat(start)
        before = None
        if opened is not None:
            assert opened.inputs is not None
            assert opened.deltas is not None
            assert opened.steps is not None
            before = OpenChunk(
                opened.tokens.map(_split),
                [x.flatten(0, 1) for x in opened.inputs],
                [x.flatten(0, 1) for x in opened.deltas],
                _split(opened.steps),
            )
        work = work_out(memory.memories(batch), by_memory, matrices, earlier=before)
        read = _join(work.read(by_memory.queries, matrices), batch).to(tokens.queries.dtype)
        if full or ends:
            after = work.end(matrices).map(lambda x: x.unflatten(0, (batch, heads)))
            if full:
                memory.look(together, start)
                after = after.map(lambda x: memory.rule.into_shell(x, memory.network.shard.differentiable()))
        inputs, deltas = ([x.unflatten(0, (batch, heads)) for x in xs] for xs in (work.inputs, work.deltas))
        chunk = OpenChunk(together, inputs, deltas, _join(work.steps, batch))
    if full or ends:
        return read, MemoryState(after.weights, after.momentum)
    return read, MemoryState(start.weights, start.momentum, chunk)


def _split(x: Tensor) -> Tensor:
    """(B, T, H, F) to (N, T, F)."""
    return x.transpose(1, 2).flatten(0, 1)


def _join(x: Tensor, batch: int) -> Tensor:
    """Back from _split."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def scan_packed(
    memory: Memory, tokens: Tokens, state: MemoryState, first: Matrices, rows: PackedRows | None
) -> tuple[Tensor, MemoryState]:
    """A piece of packed or padded rows; a document begins in `first`."""
    rows, opened = rows or PackedRows(real=_all(tokens)), 0
    start = state.matrices
    if (chunk := state.open_chunk) is not None:
        there = _all(chunk.tokens) if chunk.real is None else chunk.real
        rows, opened, tokens = rows.after(there), there.shape[1], tokens.behind(chunk.tokens)
    packing = rows.packing(memory.chunk_size, tokens.keys.device)
    reads = []
    if packing.closed is not None:
        read, start = memory.scan(tokens.map(packing.closed.lay), start, packing.closed.chunks, first)
        reads.append(read)
    if packing.begins_open:
        begins = packing.restarts[:, None, None, None]
        start = first.joined(start, lambda a, b: torch.where(begins, a, b))
    end = MemoryState(start.weights, start.momentum)
    if packing.open is not None:
        laid = tokens.map(packing.open.lay)
        if packing.open.chunks.counts is None:  # every row holds as many: they go on like whole rows
            read, end = _go_on(memory, laid, end, ends=False)
        else:
            read, _ = memory.scan(laid, start, packing.open.chunks)
            end.open_chunk = OpenChunk(laid, real=packing.open.filled)
        reads.append(read)
    if not reads:  # nothing but padding
        return torch.zeros_like(tokens.queries)[:, opened:], state
    return packing.collect(torch.cat(reads, 1))[:, opened:], end


def scan_rows_apart(
    memory: Memory, tokens: Tokens, state: MemoryState, first: Matrices, rows: PackedRows | None
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
            read, now = scan_whole(memory, here, now, close=False)
            reads = reads.index_put((torch.tensor(row), places), read[0])
        ends.append(now)
    return reads, _in_one(ends)


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


def _in_one(rows: list[MemoryState]) -> MemoryState:
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
