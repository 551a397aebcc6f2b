"""Memories whose matrices several processes hold together are the memories of one process: reads, states, gradients."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from titans_mcore.memory import WHOLE, MemoryState, PackedRows, WholeMatrices, memory_read, memory_scan
from titans_mcore.parallel.memory_shard import TPShard, split_axis

from ..matrices import every_pair
from .shared import Meeting, part, part_of
from .streams import Stream, by_channel, make_stream
from .test_chunk_gradients import leaving_the_shell
from .test_packed_rows import first_state, masks, piece_of

CHUNK, HEADS, WIDTH = 4, 2, 8
LENGTH = 15  # three chunks in two groups and an open chunk
SIZES = {"batch": 2, "heads": HEADS, "width": WIDTH}
MEMORIES = 2 * HEADS

# Where sums are counted: sixteen chunks are four groups of four.
GROUPS = 4
CHUNKS = GROUPS * GROUPS
PREDICTION = MEMORIES * CHUNK * WIDTH


def gentle(depth: int, network: str, length: int = LENGTH) -> Stream:
    """A stream on which neither shell nor held steps act."""
    stream = make_stream(length, depth, network, theta=1e-4, **SIZES)
    stream.alpha = 1e-3 * stream.alpha
    return stream


def large(depth: int, network: str, length: int = LENGTH) -> Stream:
    return make_stream(length, depth, network, theta=1.0, **SIZES)


def too_large(depth: int, network: str) -> Stream:
    return leaving_the_shell(LENGTH, network, depth, **SIZES)


def emptied(depth: int, network: str) -> Stream:
    stream = large(depth, network)
    stream.alpha = 0.5 + 0.5 * stream.alpha
    return stream


STREAMS = {"gentle": gentle, "large": large, "too large": too_large, "emptied": emptied}


def results(
    stream: Stream,
    shard: WholeMatrices = WHOLE,
    *,
    backend: str = "auto",
    pieces: tuple[int, ...] = (LENGTH,),
    rows: PackedRows | None = None,
    first: MemoryState | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    """Reads, end state and gradients of a random functional of them; lists are of matrices, with a shard parts."""
    whole, stream = stream, part_of(stream, shard)
    leaves = stream.leaves()
    if first is not None:
        begin = [part(x, shard) for x in (first.weights, first.momentum)]
        first = MemoryState(*([x.detach().clone().requires_grad_() for x in xs] for xs in begin))
        leaves += [*first.weights, *first.momentum]
    reads, state, start = [], first, 0
    for length in pieces:
        piece = stream.piece(start, start + length)
        there = None if rows is None else piece_of(rows, start, start + length)
        settings = {**stream.settings, "chunk_size": CHUNK, "state": state, "rows": there, "backend": backend}
        read, state = memory_scan(
            *piece.tokens, stream.weights, **settings, start=None if rows is None else first, shard=shard
        )
        reads.append(read)
        start += length
    assert state is not None
    generator = torch.Generator().manual_seed(1)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    functional = (torch.cat(reads, 1) * draw(whole.queries.shape)).sum()
    for matrices in (state.weights, state.momentum):
        draws = part([draw((len(whole.queries), *w.shape)) for w in whole.weights], shard)
        functional = functional + sum((x * y).sum() for x, y in zip(matrices, draws, strict=True))
    grads = torch.autograd.grad(functional, leaves, allow_unused=True)  # M_0 may only be where the shell leads to
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    depth = len(stream.weights)
    found: dict[str, Tensor | list[Tensor]] = {"reads": torch.cat(reads, 1)}
    found |= {"weights": state.weights, "momentum": state.momentum}
    if first is not None:
        found["of first momentum"], found["of first weights"] = (
            [gradients.pop() for _ in range(depth)][::-1] for _ in range(2)
        )
    tokens = len(gradients) - depth - len(stream.norm)
    found |= {f"of token {i}": x for i, x in enumerate(gradients[:tokens])}
    found["of weights"] = gradients[tokens : tokens + depth]
    found |= {f"of {name}": x for name, x in zip(stream.norm, gradients[tokens + depth :], strict=True)}
    return found


def assert_parts(shards: list[dict], whole: dict, count: int) -> None:
    """Every process has its parts of the matrices and the rest whole."""
    for index, ours in enumerate(shards):
        assert ours.keys() == whole.keys()
        for name, theirs in whole.items():
            wanted = part(theirs, TPShard(index, count, lambda x: x)) if isinstance(theirs, list) else [theirs]
            found = ours[name] if isinstance(theirs, list) else [ours[name]]
            for a, b in zip(found, wanted, strict=True):
                difference = float((a - b).detach().abs().max() / (1e-300 + b.detach().abs().max()))
                assert difference < 1e-9, f"{name} of part {index} differs by {difference:.1e}"


@lru_cache
def unsharded(kind: str, depth: int, network: str, backend: str = "auto") -> dict[str, Tensor | list[Tensor]]:
    return results(STREAMS[kind](depth, network), backend=backend)


@every_pair(count=[2, 4], network=["residual_norm", "plain"], depth=[1, 2, 3, 4], kind=STREAMS)
def test_parts_together_are_the_whole_memory(kind: str, depth: int, network: str, count: int) -> None:
    stream = STREAMS[kind](depth, network)
    found = Meeting(count, in_place=count == 4).run(lambda shard: results(stream, shard))
    assert_parts(found, unsharded(kind, depth, network), count)


@every_pair(kind=["large", "too large"], network=["residual_norm", "plain"], depth=[1, 2, 3, 4])
def test_parts_together_are_the_oracle(depth: int, network: str, kind: str) -> None:
    stream = STREAMS[kind](depth, network)
    found = Meeting(2).run(lambda shard: results(stream, shard))
    assert_parts(found, unsharded(kind, depth, network, "oracle"), 2)


@every_pair(documents__padding=[(True, False), (True, True)], kind=["gentle", "emptied"], depth=[1, 2, 3])
def test_documents_in_pieces_are_shared(depth: int, kind: str, documents: bool, padding: bool) -> None:
    stream = STREAMS[kind](depth, "residual_norm")
    rows = masks(2, LENGTH, depth, documents=documents, padding=padding)
    first = first_state(stream, 2)
    whole = results(stream, rows=rows, first=first)
    found = Meeting(2).run(lambda shard: results(stream, shard, pieces=(6, 1, 8), rows=rows, first=first))
    assert_parts(found, whole, 2)


@pytest.mark.parametrize("network", ["residual_norm", "plain"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gradient_reaches_a_carried_state_through_parts(depth: int, network: str) -> None:
    stream = make_stream(LENGTH, depth, network, theta=0.3, **SIZES)
    first = first_state(stream, 2)
    found = Meeting(4).run(lambda shard: results(stream, shard, pieces=(5, 10), first=first))
    assert_parts(found, results(stream, first=first, backend="oracle"), 4)


@every_pair(kind=STREAMS, network=["residual_norm", "plain"], depth=[1, 2, 3])
def test_forgetting_by_channel_is_shared(depth: int, network: str, kind: str) -> None:
    stream = by_channel(STREAMS[kind](depth, network))
    found = Meeting(2).run(lambda shard: results(stream, shard, pieces=(6, 9)))
    assert_parts(found, results(stream), 2)


@pytest.mark.parametrize("kind", ["gentle", "emptied"])
def test_parts_without_gradients_read_what_they_read_with_them(kind: str) -> None:
    stream = STREAMS[kind](2, "residual_norm")

    def read(shard: TPShard) -> Tensor:
        mine = part_of(stream, shard)
        with torch.no_grad():
            return memory_scan(*mine.tokens, mine.weights, **mine.settings, chunk_size=CHUNK, shard=shard)[0]

    with_gradients = Meeting(2).run(lambda shard: results(stream, shard)["reads"])
    assert all(torch.equal(a, b) for a, b in zip(Meeting(2).run(read), with_gradients, strict=True))


@pytest.mark.parametrize("network", ["residual_norm", "plain"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_reading_a_memory_that_stands_still_is_shared(depth: int, network: str) -> None:
    stream = make_stream(5, depth, network, **SIZES)

    def read(shard: WholeMatrices = WHOLE) -> dict[str, Tensor | list[Tensor]]:
        mine = part_of(stream, shard)
        leaves = [x.requires_grad_() for x in (mine.queries, *mine.weights, *mine.norm.values())]
        reads = memory_read(mine.queries, mine.weights, **mine.settings, shard=shard)
        of_queries, *gradients = torch.autograd.grad(reads.sin().sum(), leaves)
        of_norm = dict(zip(stream.norm, gradients[depth:], strict=True))
        return {"reads": reads, "of queries": of_queries, "of weights": gradients[:depth], **of_norm}

    assert_parts(Meeting(4).run(read), read(), 4)


def sums(stream: Stream, rule: str) -> list[int]:
    """Elements of the sums that a scan makes."""
    meeting = Meeting(2)

    def work(shard: TPShard) -> None:
        mine = part_of(stream, shard)
        memory_scan(*mine.tokens, mine.weights, **mine.settings, chunk_size=CHUNK, shard=shard, rule=rule)

    meeting.run(work)
    return meeting.elements


@pytest.mark.parametrize("rule", ["stable", "literal"])
@pytest.mark.parametrize("network", ["residual_norm", "plain"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_chunk_needs_one_sum_for_its_prediction_and_a_group_one_for_its_reads(
    depth: int, network: str, rule: str
) -> None:
    """Two more where a hidden layer is whole, and small ones: squares of what is held, mean squares for the shell."""
    stream = gentle(depth, network, CHUNKS * CHUNK)
    tokens, hidden = MEMORIES * CHUNK, [2 * PREDICTION] * (depth > 2)
    if rule == "stable":
        last = [tokens] * (network == "plain")
        lower = [tokens] * (depth - 1 + depth // 2)
        chunk = [*hidden, *last, PREDICTION + tokens * CHUNK, *hidden, *lower, *[MEMORIES] * 2 * depth]
    else:
        chunk = [*hidden, PREDICTION, *hidden]
    reads = [GROUPS * size for size in (*hidden, PREDICTION)]
    assert sums(stream, rule) == [*chunk * GROUPS, *reads] * GROUPS


def test_what_cannot_be_shared_is_said() -> None:
    stream, shard = gentle(1, "plain"), TPShard(0, 3, lambda x: x)
    with pytest.raises(ValueError, match="the memories are 8 wide; 3 parts need a multiple of 3"):
        memory_scan(*stream.tokens, stream.weights, network="plain", shard=shard)
    for backend, sentence in (("oracle", "the oracle computes whole memories"), ("fused", "compute whole memories")):
        with pytest.raises(ValueError, match=sentence):
            memory_scan(
                *stream.tokens,
                part(stream.weights, TPShard(0, 2, lambda x: x)),
                network="plain",
                backend=backend,
                shard=TPShard(0, 2, lambda x: x),
            )
    with pytest.raises(ValueError, match=r"it must be \(H, d_in, d_out\) = \(2, 8, 8\), or the process's part"):
        memory_scan(*stream.tokens, stream.weights, network="plain", shard=TPShard(0, 2, lambda x: x))
    with pytest.raises(ValueError, match="index is 2; of 2 parts"):
        TPShard(2, 2, lambda x: x)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_matrices_are_cut_by_rows_and_columns_in_turn_from_the_last(depth: int) -> None:
    assert [split_axis(layer, depth) for layer in range(depth)] == [2, 1, 2, 1][4 - depth :]
