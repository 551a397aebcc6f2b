"""What looks into a scan say, against the oracle's own steps, token by token in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from titans_mcore.memory import Looked, Looks, PackedRows, memory_scan
from titans_mcore.memory.network import Network
from titans_mcore.memory.recurrence import _inner_gradient, _load, recurrent_scan
from titans_mcore.memory.stability import FREE_LOAD, load_mass

HEADS, WIDTH, CHUNK = 2, 6, 4
MEMORIES = [("residual_norm", 1), ("residual_norm", 2), ("plain", 1), ("plain", 3)]


def problem(
    depth: int, length: int, batch: int = 2, theta: float = 0.2, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys, values and gates, and initial weights."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (random(batch, length, HEADS, WIDTH) for _ in range(3))
    gates = [torch.sigmoid(random(batch, length, HEADS, depth)) * scale for scale in (theta, 0.9, 0.2)]
    widths = [WIDTH, *[2 * WIDTH] * (depth - 1), WIDTH]
    weights = [random(HEADS, m, n) / m**0.5 for m, n in itertools.pairwise(widths)]
    return [q, torch.nn.functional.normalize(k, dim=-1), v, *gates], weights


def looked_at(tokens: list[Tensor], weights: list[Tensor], every_tokens: int = 1, **arguments) -> list[Looked]:
    seen: list[Looked] = []
    with torch.no_grad():
        memory_scan(*tokens, weights, chunk_size=CHUNK, looks=Looks(every_tokens, seen.append), **arguments)
    return seen


def by_the_oracle(network: Network, tokens: list[Tensor], initial: list[Tensor], begin: int, end: int) -> Looked:
    """The same of tokens begin to end, a chunk, from the weights that the oracle has before it."""
    batch, length = tokens[0].shape[:2]
    weights = [w.expand(batch, *w.shape) for w in initial]
    if begin:
        momentum = [torch.zeros_like(w) for w in weights]
        before = [x[:, :begin] for x in tokens]
        _, weights, _ = recurrent_scan(network, before, weights, momentum, initial, CHUNK)
    chunk, surprise, bounded = [], [], []
    for t in range(begin, min(end, length)):
        token = _inner_gradient(network, weights, tokens[1][:, t], tokens[2][:, t])
        token.masses = list(load_mass(tokens[3][:, t], tokens[4][:, t]).unbind(-1))
        chunk.append(token)
        own, before_it = _load(chunk)
        bounded.append(own + before_it > FREE_LOAD)
        surprise.append(sum(g.square().sum((-1, -2)) for g in token.gradients).sqrt())
    drift = [(w - m).square().mean((-1, -2)).sqrt().flatten() for w, m in zip(weights, initial, strict=True)]
    every = torch.ones(batch * HEADS, len(chunk), dtype=torch.bool)
    rows = (torch.stack(x, -1).flatten(0, 1) for x in (surprise, bounded))
    return Looked(*rows, torch.stack(drift), every)


@pytest.mark.parametrize(("network", "depth"), MEMORIES)
@pytest.mark.parametrize("theta", [1e-4, 2.0])
def test_every_chunk_is_seen_as_the_oracle_goes_through_it(network, depth, theta):
    length = 4 * CHUNK + 2  # the last chunk stays open and is left out
    tokens, weights = problem(depth, length, theta=theta)
    seen = looked_at(tokens, weights, network=network)
    assert len(seen) == 4
    for number, found in enumerate(seen):
        begin = number * CHUNK
        expected = by_the_oracle(Network(network == "residual_norm"), tokens, weights, begin, begin + CHUNK)
        torch.testing.assert_close(found.surprise, expected.surprise, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.drift, expected.drift, rtol=1e-9, atol=1e-12)
        assert torch.equal(found.bounded, expected.bounded)
        assert torch.equal(found.real, expected.real)
    shares = torch.cat([found.bounded.flatten() for found in seen]).double().mean()
    assert (shares > 0.2) == (theta == 2.0)  # the bound is seen to act, and not to act


@pytest.mark.parametrize("backend", ["oracle", "chunked"])
def test_what_is_seen_does_not_depend_on_the_backend_nor_on_where_the_piece_began(backend):
    tokens, weights = problem(2, 6 * CHUNK)
    whole = looked_at(tokens, weights)
    with torch.no_grad():
        _, state = memory_scan(*(x[:, : 2 * CHUNK] for x in tokens), weights, chunk_size=CHUNK)
    rest = looked_at([x[:, 2 * CHUNK :] for x in tokens], weights, state=state, backend=backend)
    for found, expected in zip(rest, whole[2:], strict=True):
        torch.testing.assert_close(found.surprise, expected.surprise)
        torch.testing.assert_close(found.drift, expected.drift)


def test_forgetting_by_channel_is_seen_too():
    tokens, weights = problem(2, 3 * CHUNK)
    by_channel = [tokens[5][..., i, None].expand(*tokens[5].shape[:3], w.shape[-2]) for i, w in enumerate(weights)]
    seen = looked_at([*tokens[:5], by_channel], weights)
    for found, expected in zip(seen, looked_at(tokens, weights), strict=True):
        torch.testing.assert_close(found.surprise, expected.surprise)
        torch.testing.assert_close(found.drift, expected.drift)


def values(seen: list[Looked]) -> Tensor:
    """Surprise of all tokens that are there, in the order of size."""
    return torch.cat([found.surprise[found.real] for found in seen]).sort().values


def test_documents_and_padding_are_seen_as_they_are_alone():
    length = 23
    tokens, weights = problem(2, length, batch=1)
    starts, real = torch.zeros(1, length, dtype=torch.bool), torch.ones(1, length, dtype=torch.bool)
    starts[0, 7] = starts[0, 12] = True
    real[0, 20:] = False
    packed = looked_at(tokens, weights, rows=PackedRows(starts, real))
    alone = [
        by_the_oracle(Network(True), [x[:, begin:end] for x in tokens], weights, chunk, chunk + CHUNK)
        for begin, end in ((0, 7), (7, 12), (12, 20))
        for chunk in range(0, end - begin, CHUNK)
    ]
    torch.testing.assert_close(values(packed), values(alone))
    assert len(values(packed)) == 20 * HEADS
    # Each document begins with the initial weights.
    assert sum(int((found.drift[0] < 1e-12).all()) for found in packed) == 3


def test_rare_looks_are_at_the_same_chunks_and_see_the_same():
    tokens, weights = problem(1, 12 * CHUNK)
    all_chunks = looked_at(tokens, weights)
    for chunks in (2, 3, 5, 12, 99):
        few = looked_at(tokens, weights, every_tokens=chunks * CHUNK)
        expected = all_chunks[chunks - 1 :: chunks] or all_chunks[-1:]
        assert len(few) == len(expected)
        for found, wanted in zip(few, expected, strict=True):
            torch.testing.assert_close(found.surprise, wanted.surprise)


def test_a_chunk_that_two_pieces_fill_is_seen_once():
    tokens, weights = problem(2, 4 * CHUNK)
    with torch.no_grad():
        _, state = memory_scan(*(x[:, : CHUNK + 1] for x in tokens), weights, chunk_size=CHUNK)
    seen = looked_at([x[:, CHUNK + 1 :] for x in tokens], weights, state=state)
    torch.testing.assert_close(values(seen), values(looked_at(tokens, weights)[1:]))


def test_a_scan_that_is_looked_at_gives_what_it_gives():
    tokens, weights = problem(2, 5 * CHUNK + 3)
    with torch.no_grad():
        reads, state = memory_scan(*tokens, weights, chunk_size=CHUNK)
        same, end = memory_scan(*tokens, weights, chunk_size=CHUNK, looks=Looks(2 * CHUNK, lambda _: None))
    torch.testing.assert_close(same, reads)
    torch.testing.assert_close(end.weights, state.weights)
    torch.testing.assert_close(end.momentum, state.momentum)
