"""Sums over the ranks that hold parts of every memory's matrices (parallel.memory_parallel hidden), float32.

A scan of C chunks of b tokens by N = B H memories of width D and depth L, in groups of ceil(sqrt(C)) chunks:

    forward    each chunk's prediction N b D; for each group of g whole chunks mean squares 2 L g N; all reads C N b D
    backward   each chunk's prediction again; once all gradients at what is whole, C b N (3 D + 3 L) + 2 N D

Three or four matrices sum, beside this, at the hidden width 2 N b D expansion for each chunk's prediction and 3 N b D
expansion on its way back. That is what a scan takes whose state shell does not act; where it does, a group is gone
through twice, and a chunk takes a small sum more. MAC's recall sums its reads N T D once forward and once backward.
"""

import math

from pretrain.config import RunConfig
from pretrain.planning.layout import Layout
from titans_mcore.config import TitansConfig

_FLOAT32 = 4
Sums = tuple[int, int]  # calls, bytes


def memory_sums(config: RunConfig, layout: Layout) -> Sums:
    """Of one layer and micro-batch, forward and backward: that of the first rank, which reads the persistent tokens."""
    model, rows = config.model, config.train.micro_batch
    length = config.train.sequence_length // layout.context
    if model.variant == "mac":
        whole, rest = divmod(length, model.segment_length)
        pieces = [model.segment_length] * whole + ([rest] if rest else [])
        return _total([*(_scan(model, rows, piece) for piece in pieces), *(_recall(model, rows, x) for x in pieces)])
    persistent = model.persistent_tokens
    closed, opened = persistent // model.chunk_size * model.chunk_size, persistent % model.chunk_size
    return _total([_scan(model, rows, length), *(_scan(model, 1, piece) for piece in (closed, opened) if piece)])


def _scan(model: TitansConfig, rows: int, length: int) -> Sums:
    (heads, width), depth = model.memory_shape, model.memory_depth
    memories = rows * heads
    size = min(model.chunk_size, length)
    chunks = math.ceil(length / size)
    groups = math.ceil(chunks / (math.isqrt(chunks - 1) + 1))
    predictions = chunks * memories * size * width
    shells = groups if size == model.chunk_size else 0  # an open chunk has no shell behind it
    squares = 2 * depth * chunks * memories if shells else 0
    gradients = length * memories * 3 * (width + depth) + 2 * memories * width
    calls = (chunks + shells + 1) + (chunks + 1)
    numbers = (2 * predictions + squares) + (predictions + gradients)
    if depth > 2:
        calls += chunks + groups + 2 * chunks
        numbers += 5 * predictions * model.memory_expansion
    return calls, _FLOAT32 * numbers


def _recall(model: TitansConfig, rows: int, length: int) -> Sums:
    return 2, 2 * _FLOAT32 * rows * length * model.memory_shape.channels


def _total(parts: list[Sums]) -> Sums:
    return sum(calls for calls, _ in parts), sum(size for _, size in parts)
