"""What a probe of a scan says, against the oracle's own steps, token by token in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from titans_mcore.memory import PackedRows, Probe, Probed, memory_scan
from titans_mcore.memory.inputs import Matrices, Tokens
from titans_mcore.memory.naive import held_steps, inner_gradient, naive_scan
from titans_mcore.memory.rule import Memory, Network, Rule

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


def probed(tokens: list[Tensor], weights: list[Tensor], every_tokens: int = 1, **arguments) -> list[Probed]:
    seen: list[Probed] = []
    with torch.no_grad():
        memory_scan(*tokens, weights, chunk_size=CHUNK, probe=Probe(every_tokens, seen.append), **arguments)
    return seen


def by_the_oracle(network: str, tokens: list[Tensor], initial: list[Tensor], begin: int, end: int) -> Probed:
    """The same of tokens begin to end, a chunk, one step of the oracle after the other."""
    net = Network(network == "residual_norm")
    rule, length = Rule.of("stable", CHUNK, residual_norm=net.residual_norm), tokens[0].shape[1]

    def after(count: int) -> Matrices:
        weights = [w.expand(len(tokens[0]), *w.shape) for w in initial]
        start = Matrices(weights, [torch.zeros_like(w) for w in weights])
        piece = Tokens(*(x[:, :count] for x in tokens))
        return naive_scan(Memory(net, rule, initial), piece, start)[1] if count else start

    first, surprise, written, held = after(begin).weights, [], [], []
    ends = range(begin, min(end, length))
    for t in ends:
        last = after(t).weights[-1] if rule.exact else None
        found = inner_gradient(net, first, tokens[1][:, t], tokens[2][:, t], last)
        steps = theta = tokens[3][:, t]
        if rule.exact:
            steps = held_steps(rule, theta, tokens[4][:, t], *found)
        squares = torch.stack([g.square().sum((-1, -2)) for g in found[0]], -1)
        surprise.append(squares.sum(-1).sqrt())
        written.append((squares * steps.square()).sum(-1).sqrt())
        held.append((steps < theta).any(-1))
    scaled_back = torch.zeros_like(held[0])
    if len(ends) == CHUNK:
        state = after(end)
        sizes = torch.stack([x.square().mean((-1, -2)).sqrt() for x in (*state.weights, *state.momentum)])
        scaled_back = ((sizes - rule.rms_limit).abs() < 1e-9).any(0)
    drift = [(w - m).square().mean((-1, -2)).sqrt().flatten() for w, m in zip(first, initial, strict=True)]
    rows = (torch.stack(x, -1).flatten(0, 1) for x in (surprise, written, [h | scaled_back for h in held]))
    return Probed(*rows, torch.stack(drift), torch.ones(scaled_back.numel(), len(ends), dtype=torch.bool))


@pytest.mark.parametrize(("network", "depth"), MEMORIES)
@pytest.mark.parametrize("theta", [1e-4, 40.0])
def test_every_chunk_is_seen_as_the_oracle_goes_through_it(network, depth, theta):
    length = 4 * CHUNK + 2  # the last chunk stays open and is left out
    tokens, weights = problem(depth, length, theta=theta)
    seen = probed(tokens, weights, network=network)
    assert len(seen) == 4
    for number, found in enumerate(seen):
        begin = number * CHUNK
        expected = by_the_oracle(network, tokens, weights, begin, begin + CHUNK)
        for name in ("surprise", "written", "drift"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
        assert torch.equal(found.held, expected.held)
        assert torch.equal(found.real, expected.real)
    shares = torch.cat([found.held.flatten() for found in seen]).double().mean()
    assert (shares > 0.2) == (theta == 40.0)  # the rule is seen to act, and not to act


@pytest.mark.parametrize("backend", ["oracle", "chunked"])
def test_what_is_seen_does_not_depend_on_the_backend_nor_on_where_the_piece_began(backend):
    tokens, weights = problem(2, 6 * CHUNK)
    whole = probed(tokens, weights)
    with torch.no_grad():
        _, state = memory_scan(*(x[:, : 2 * CHUNK] for x in tokens), weights, chunk_size=CHUNK)
    rest = probed([x[:, 2 * CHUNK :] for x in tokens], weights, state=state, backend=backend)
    for found, expected in zip(rest, whole[2:], strict=True):
        torch.testing.assert_close(found.surprise, expected.surprise)
        torch.testing.assert_close(found.drift, expected.drift)


def test_forgetting_by_channel_is_seen_too():
    tokens, weights = problem(2, 3 * CHUNK)
    by_channel = [tokens[5][..., i, None].expand(*tokens[5].shape[:3], w.shape[-2]) for i, w in enumerate(weights)]
    seen = probed([*tokens[:5], by_channel], weights)
    for found, expected in zip(seen, probed(tokens, weights), strict=True):
        torch.testing.assert_close(found.surprise, expected.surprise)
        torch.testing.assert_close(found.drift, expected.drift)


def values(seen: list[Probed]) -> Tensor:
    """Surprise of all tokens that are there, in the order of size."""
    return torch.cat([found.surprise[found.real] for found in seen]).sort().values


def test_documents_and_padding_are_seen_as_they_are_alone():
    length = 23
    tokens, weights = problem(2, length, batch=1)
    starts, real = torch.zeros(1, length, dtype=torch.bool), torch.ones(1, length, dtype=torch.bool)
    starts[0, 7] = starts[0, 12] = True
    real[0, 20:] = False
    packed = probed(tokens, weights, rows=PackedRows(starts, real))
    alone = [
        by_the_oracle("residual_norm", [x[:, begin:end] for x in tokens], weights, chunk, chunk + CHUNK)
        for begin, end in ((0, 7), (7, 12), (12, 20))
        for chunk in range(0, end - begin, CHUNK)
    ]
    torch.testing.assert_close(values(packed), values(alone))
    assert len(values(packed)) == 20 * HEADS
    # Each document begins with the initial weights.
    assert sum(int((found.drift[0] < 1e-12).all()) for found in packed) == 3


def test_a_rare_probe_sees_the_same_of_the_chunks_it_looks_at():
    tokens, weights = problem(1, 12 * CHUNK)
    all_chunks = probed(tokens, weights)
    for chunks in (2, 3, 5, 12, 99):
        few = probed(tokens, weights, every_tokens=chunks * CHUNK)
        expected = all_chunks[chunks - 1 :: chunks] or all_chunks[-1:]
        assert len(few) == len(expected)
        for found, wanted in zip(few, expected, strict=True):
            torch.testing.assert_close(found.surprise, wanted.surprise)


def test_a_chunk_that_two_pieces_fill_is_seen_once():
    tokens, weights = problem(2, 4 * CHUNK)
    with torch.no_grad():
        _, state = memory_scan(*(x[:, : CHUNK + 1] for x in tokens), weights, chunk_size=CHUNK)
    seen = probed([x[:, CHUNK + 1 :] for x in tokens], weights, state=state)
    torch.testing.assert_close(values(seen), values(probed(tokens, weights)[1:]))


@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_a_probe_changes_no_bit_of_the_scan(network):
    tokens, weights = problem(2, 5 * CHUNK + 3)
    settings = {"network": network, "chunk_size": CHUNK}
    with torch.no_grad():
        reads, state = memory_scan(*tokens, weights, **settings)
        same, end = memory_scan(*tokens, weights, **settings, probe=Probe(2 * CHUNK, lambda _: None))
    assert torch.equal(same, reads)
    for a, b in zip(state.tensors(), end.tensors(), strict=True):
        assert torch.equal(a, b)
