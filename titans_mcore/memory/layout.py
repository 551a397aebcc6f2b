"""Rows that hold more than one sequence, or less than a whole one: where their tokens go in chunks.

A document begins in the memory's first state and with a chunk of its own; a token that is not real neither writes nor
counts. Both come to one thing: tokens are laid into chunks whose slots a document's end leaves empty.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


def group_size(chunks: int) -> int:
    """Chunks g between two states that are stored: the root of their number, rounded up."""
    return math.isqrt(chunks - 1) + 1


@dataclass(frozen=True)
class Chunks:
    """C chunks of b slots for B rows; their tokens come first, the rest of the slots is empty.

    Attributes:
        size: Slots b.
        closed: Whether a chunk that is full has ended; False for the open chunk at the end of a piece.
        counts: Tokens in each chunk, (C, B); None where all are full.
        restarts: Where a chunk begins a document, (C, B); None where none does.
    """

    size: int
    closed: bool = True
    counts: Tensor | None = None
    restarts: Tensor | None = None

    def group(self, chunks: slice) -> "Chunks":
        """Some of the chunks."""
        counts, restarts = (None if x is None else x[chunks] for x in (self.counts, self.restarts))
        return Chunks(self.size, self.closed, counts, restarts)

    def split(self, x: Tensor) -> Tensor:
        """Tokens (B, C b, H, F) by chunk and memory, (C, N, b, F)."""
        return x.unflatten(1, (-1, self.size)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    def split_gate(self, x: Tensor) -> Tensor:
        """A gate (B, C b, H, L) by matrix, chunk and memory, (L, C, N, b)."""
        return x.unflatten(1, (-1, self.size)).permute(4, 1, 0, 3, 2).flatten(2, 3)

    @staticmethod
    def join(x: Tensor, batch: int) -> Tensor:
        """Back from `split`, for B rows."""
        return x.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    def real(self, heads: int, device: torch.device) -> Tensor | None:
        """Which slots hold tokens, for B * heads memories, (C, N, b)."""
        if self.counts is None:
            return None
        counts = self.counts.to(device).repeat_interleave(heads, 1)
        return torch.arange(self.size, device=device) < counts.unsqueeze(-1)

    def full(self, heads: int, device: torch.device) -> Tensor | None:
        """Which chunks end with their last slot, (C, N); None where all do."""
        return None if self.counts is None else (self.counts == self.size).to(device).repeat_interleave(heads, 1)

    def restarted(self, heads: int, device: torch.device) -> list[Tensor | None]:
        """For each of the chunks the memories that begin a document in it; None for none."""
        if self.restarts is None:
            return []
        lanes = self.restarts.repeat_interleave(heads, 1)
        return [here.nonzero()[:, 0].to(device) if bool(here.any()) else None for here in lanes]


class Part(NamedTuple):
    """Chunks and the tokens in them.

    Attributes:
        chunks: The chunks.
        tokens: Token of each slot, (B, C b); any where the slot is empty.
        filled: Which slots hold a token, (B, C b).
    """

    chunks: Chunks
    tokens: Tensor
    filled: Tensor

    def lay(self, x: Tensor) -> Tensor:
        """Tokens (B, T, ...) into the slots, (B, C b, ...); zeros in those that are empty."""
        return _pick(x, self.tokens, self.filled)


class Packing(NamedTuple):
    """Where the tokens of B rows go.

    Attributes:
        closed: The chunks that are over, full or cut short by the end of a document; None if there is none.
        open: The chunk that each row has begun last, unless it is full; None where that holds for all rows.
        restarts: Rows whose open chunk begins a document, (B,).
        begins_open: Whether there is such a row.
        slots: Slot of each token, counted through the closed chunks and then the open one, (B, T).
        real: Which tokens have one, (B, T).
    """

    closed: Part | None
    open: Part | None
    restarts: Tensor
    begins_open: bool
    slots: Tensor
    real: Tensor

    def collect(self, reads: Tensor) -> Tensor:
        """Back from the slots, (B, T, ...); zeros for tokens that are not real."""
        return _pick(reads, self.slots, self.real)


@dataclass(frozen=True)
class PackedRows:
    """What the tokens of B rows are.

    Attributes:
        starts: Tokens that begin a document, (B, T) bool, none of them padding; None if no token does. A row whose
            first token does not goes on with what the state holds.
        real: Tokens that are not padding, (B, T) bool; None if all are. memory_scan takes padding anywhere; what is
            left of a row is one sequence. The mixers want it behind the real tokens.
        documents: The document of each token, (B, T): 0 for what goes on from before, then 1, 2 ...; -1 for padding.
            Like what follows it is made here, once for all mixers.
        positions: Place of each token in its document, counted from the piece's first token for one that goes on,
            (B, T).
        ends: Real tokens of each row, (B,).
        last_documents: The document that each row ends in, (B,).
    """

    starts: Tensor | None = None
    real: Tensor | None = None
    documents: Tensor = field(init=False, repr=False, compare=False)
    positions: Tensor = field(init=False, repr=False, compare=False)
    ends: Tensor = field(init=False, repr=False, compare=False)
    last_documents: Tensor = field(init=False, repr=False, compare=False)
    _packings: dict[tuple[int, torch.device], Packing] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.starts is None and self.real is None:
            raise ValueError("packed rows need starts, real or both")
        for name, mask in (("starts", self.starts), ("real", self.real)):
            if mask is not None and (mask.dtype != torch.bool or mask.dim() != 2):
                raise ValueError(f"{name} is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool (B, T)")
        if self.starts is not None and self.real is not None and self.starts.shape != self.real.shape:
            raise ValueError(
                f"starts has shape {tuple(self.starts.shape)}, real {tuple(self.real.shape)}; make them equal"
            )
        documents = torch.zeros(self.shape, dtype=torch.long) if self.starts is None else self.starts.cumsum(1)
        if self.real is not None:
            documents = documents.to(self.real.device).masked_fill(~self.real, -1)
        positions = torch.arange(self.shape[1], device=documents.device).expand(self.shape)
        if self.starts is not None:
            positions = positions - torch.where(self.starts, positions, 0).cummax(1).values
        for name, made in (
            ("documents", documents),
            ("positions", positions),
            ("ends", (documents >= 0).sum(1)),
            ("last_documents", documents.amax(1).clamp_min(0)),
        ):
            object.__setattr__(self, name, made)

    @property
    def shape(self) -> torch.Size:
        """(B, T)."""
        mask = self.real if self.starts is None else self.starts
        assert mask is not None
        return mask.shape

    @cached_property
    def goes_on(self) -> int:
        """Tokens up to which some row is in the document from before: behind, none is. All, if one has no other."""
        if self.starts is None:
            return self.shape[1]
        first = torch.where(self.starts.any(1), self.starts.long().argmax(1) + 1, self.shape[1])
        return int(first.max())

    def after(self, earlier: Tensor) -> "PackedRows":
        """The same behind earlier tokens, (B, t) bool which of them are real."""
        nothing = torch.zeros(self.shape, dtype=torch.bool, device=earlier.device)
        starts, real = (nothing if self.starts is None else self.starts), (~nothing if self.real is None else self.real)
        return PackedRows(
            torch.cat([torch.zeros_like(earlier), starts.to(earlier.device)], 1),
            torch.cat([earlier, real.to(earlier.device)], 1),
        )

    def packing(self, chunk_size: int, device: torch.device) -> Packing:
        """Where the tokens go in chunks of that size; worked out once, since every layer asks for it."""
        key = chunk_size, device
        if key not in self._packings:
            self._packings[key] = _pack(self.starts, self.real, self.shape, chunk_size, device)
        return self._packings[key]


def _pack(
    begins_document: Tensor | None, not_padding: Tensor | None, shape: torch.Size, size: int, device: torch.device
) -> Packing:
    # On the host: what comes out are shapes and loops, for which a GPU would have to be waited for.
    starts, real = (
        torch.full(shape, value) if mask is None else mask.cpu()
        for mask, value in ((begins_document, False), (not_padding, True))
    )
    if bool((starts & ~real).any()):
        row, token = (starts & ~real).nonzero()[0].tolist()
        raise ValueError(f"token {token} of row {row} begins a document and is padding; mark the first real token")
    batch, length = shape
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)  # real tokens first, in their order
    number = real.sum(1)
    place = torch.arange(length).expand(batch, length)
    counted = place < number.unsqueeze(1)
    document = starts.cumsum(1).gather(1, order)
    first = torch.ones(shape, dtype=torch.bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    position = place - torch.where(first, place, 0).cummax(1).values
    begins = (position % size == 0) & counted
    chunk = begins.cumsum(1) - 1  # of the row
    chunks = begins.sum(1)
    last_begin = torch.where(begins, place, 0).amax(1)
    open_count = torch.where((number - last_begin < size) & (chunks > 0), number - last_begin, 0)
    closed_chunks = chunks - (open_count > 0).long()
    is_open = counted & (chunk == (chunks - 1).unsqueeze(1)) & (open_count > 0).unsqueeze(1)
    restarts = first & (document > 0) & counted

    total = int(closed_chunks.max()) if batch else 0
    slot = torch.where(is_open, total * size, chunk * size) + position % size
    slots = torch.zeros(shape, dtype=torch.long).scatter_(1, order, torch.where(counted, slot, 0))
    closed = None
    if total:
        counts, begun = _by_chunk(chunk, counted & ~is_open, restarts, total)
        tokens, filled = _invert(slot, order, counted & ~is_open, total * size)
        chunked = Chunks(
            size,
            counts=None if bool((counts == size).all()) else counts,
            restarts=begun if bool(begun.any()) else None,
        )
        closed = Part(chunked, tokens.to(device), filled.to(device))
    opened, longest = None, int(open_count.max())
    if longest:
        tokens, filled = _invert(slot - total * size, order, is_open, longest)
        equal = bool((open_count == longest).all())
        begun_chunks = Chunks(longest, closed=False, counts=None if equal else open_count.unsqueeze(0))
        opened = Part(begun_chunks, tokens.to(device), filled.to(device))
    open_restarts = (restarts & is_open).any(1)
    begins_open = bool(open_restarts.any())
    return Packing(closed, opened, open_restarts.to(device), begins_open, slots.to(device), real.to(device))


def _by_chunk(chunk: Tensor, here: Tensor, restarts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Tokens in each chunk, and whether it begins a document, both (C, B)."""
    index = torch.where(here, chunk, total)  # what is not here goes to a chunk behind the last
    counts = torch.zeros(chunk.shape[0], total + 1, dtype=torch.long)
    begun = counts.clone()
    counts.scatter_add_(1, index, here.long())
    begun.scatter_add_(1, index, (restarts & here).long())
    return counts[:, :total].T.contiguous(), begun[:, :total].T.contiguous() > 0


def _invert(slot: Tensor, order: Tensor, here: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Token of each slot and whether there is one, both (B, slots), from the slot of each token."""
    index = torch.where(here, slot, slots)
    tokens = torch.zeros(slot.shape[0], slots + 1, dtype=torch.long).scatter_(1, index, order)
    filled = torch.zeros(slot.shape[0], slots + 1, dtype=torch.bool).scatter_(1, index, here)
    return tokens[:, :slots].masked_fill(~filled[:, :slots], 0), filled[:, :slots]


def _pick(x: Tensor, places: Tensor, there: Tensor) -> Tensor:
    """x[b, places[b, i]] where there[b, i], else 0, (B, I, ...) from (B, T, ...)."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    picked = x.flatten(0, 1).index_select(0, (rows + places).flatten()).unflatten(0, places.shape)
    return picked.masked_fill(~there.view(*there.shape, *[1] * (x.dim() - 2)), 0.0)


def take(x: Tensor, places: Tensor) -> Tensor:
    """x[b, places[b, i]], (B, I, ...) from (B, T, ...)."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (rows + places).flatten()).unflatten(0, places.shape)
