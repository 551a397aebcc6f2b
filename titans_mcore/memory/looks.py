"""Looks into a scan: what some of its chunks learn from, worked out beside the scan, whatever its backend is.

A scan that is looked at goes from one chosen chunk to the next; there the states are at hand, and the quantities follow
from the same functions that the chunked form is made of. The scan's own numbers do not change.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .network import Network, answer, back_propagate_and_reach, forward
from .packing import Chunks
from .sharing import Share, once_at_output, whole_mean
from .stability import chunk_load, load_mass

Matrices = tuple[list[Tensor], list[Tensor]]  # weights and momentum
Scan = Callable[[list[Tensor], Matrices, Chunks, Matrices | None], tuple[Tensor, list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Looked:
    """What a chunk's tokens meet; N memories, b tokens.

    Attributes:
        surprise: Norm of the inner gradient over all matrices, at the weights of the chunk's start, (N, b).
        bounded: Where the step bound acts, (N, b).
        drift: Root mean square of the weights of the chunk's start less the initial ones, (L, N).
        real: Which slots hold a token, (N, b).
    """

    surprise: Tensor
    bounded: Tensor
    drift: Tensor
    real: Tensor


@dataclass(frozen=True)
class Looks:
    """Which chunks are looked at, and who is told.

    Attributes:
        every_tokens: About so many tokens lie between two looks; less than a chunk looks at every one.
        tell: Takes what was seen, chunk after chunk.
    """

    every_tokens: int
    tell: Callable[[Looked], None]

    def chosen(self, chunks: int, size: int) -> list[int]:
        """The last of every few chunks; of fewer than these the last."""
        step = max(1, self.every_tokens // size)
        return list(range(step - 1, chunks, step)) or [chunks - 1]


def scan_and_look(
    looks: Looks,
    scan: Scan,
    network: Network,
    initial: list[Tensor],
    tokens: list[Tensor],
    start: Matrices,
    chunks: Chunks,
    fresh: Matrices | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The scan, from one look to the next; see pieces.Memory.scan.

    A chunk that is still open is not looked at: its tokens will come again, in front of those that fill it.
    """
    if not chunks.closed:
        return scan(tokens, start, chunks, fresh)
    count = tokens[0].shape[1] // chunks.size
    reads, state, done = [], start, 0
    for chunk in [*looks.chosen(count, chunks.size), count]:
        if chunk > done:
            piece = _span(tokens, chunks, done, chunk)
            read, weights, momentum = scan(piece, state, chunks.group(slice(done, chunk)), fresh)
            reads.append(read)
            state, done = (weights, momentum), chunk
        if chunk < count:
            here = chunks.group(slice(chunk, chunk + 1))
            met = _begun(state[0], here, fresh)
            looks.tell(look_at(network, _span(tokens, chunks, chunk, chunk + 1), met, initial, here))
    return torch.cat(reads, 1), *state


def look_at(
    network: Network, tokens: list[Tensor], weights: list[Tensor], initial: list[Tensor], chunk: Chunks
) -> Looked:
    """What the tokens of one chunk meet.

    Args:
        network: The memory network.
        tokens: Queries, keys, values (B, b, H, D), theta and eta (B, b, H, L); what follows is not looked at.
        weights: At the chunk's start, L of (B, H, d_in, d_out).
        initial: The learned M_0, L of (H, d_in, d_out).
        chunk: Which of its slots are filled.
    """
    batch, _, heads = tokens[0].shape[:3]
    rows, share = network.for_memories(batch), network.share
    flat = [w.flatten(0, 1) for w in weights]
    keys, values = (chunk.split(x.to(flat[0].dtype))[0] for x in tokens[1:3])
    theta, eta = (chunk.split_gate(gate)[:, 0] for gate in tokens[3:5])
    trace = forward(rows, flat, keys)
    error = 2.0 * (answer(rows, keys, trace.normed.value) - values)
    errors, reached = back_propagate_and_reach(rows, flat, trace, error)
    load = chunk_load(trace.inputs, reached.deltas, error, load_mass(theta, eta), share=share)
    input_squares = load.overlaps.diagonal(dim1=-2, dim2=-1)
    surprise = (input_squares * _delta_squares(errors.deltas, share)).sum(0).sqrt()
    moved = [(w - first).square().mean((-1, -2)).flatten() for w, first in zip(weights, initial, strict=True)]
    real = chunk.real(heads, surprise.device)
    there = torch.ones_like(surprise, dtype=torch.bool) if real is None else real[0]
    return Looked(surprise, load.exceeds(), whole_mean(share, torch.stack(moved)).sqrt(), there)


def _delta_squares(deltas: list[Tensor], share: Share | None) -> Tensor:
    """Squared lengths of whole deltas, (L, N, b)."""
    squares = [delta.square().sum(-1) for delta in deltas]
    if share is not None:
        squares = share.add_all([once_at_output(share, i, len(squares), x) for i, x in enumerate(squares)])
    return torch.stack(squares)


def _begun(weights: list[Tensor], chunk: Chunks, fresh: Matrices | None) -> list[Tensor]:
    """The weights with those of documents that begin in the chunk."""
    if chunk.restarts is None or fresh is None:
        return weights
    begins = chunk.restarts[0].to(weights[0].device)[:, None, None, None]
    return [torch.where(begins, first, w) for first, w in zip(fresh[0], weights, strict=True)]


def _span(tokens: list[Tensor], chunks: Chunks, begin: int, end: int) -> list[Tensor]:
    return [x[:, begin * chunks.size : end * chunks.size] for x in tokens]
