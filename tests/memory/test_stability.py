"""The bound: finite and bounded on hostile streams, untouched on ordinary ones, useful afterwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from titans_mcore.memory import MemoryState, memory_scan
from titans_mcore.memory.network import initial_weights
from titans_mcore.memory.shell import below_limit
from titans_mcore.memory.stability import STATE_RMS_LIMIT, step_scale

from . import long_streams

WIDTH = 8


def constant(length: int, depth: int, value: float) -> torch.Tensor:
    return torch.full((1, length, 1, depth), value)


def run(
    keys: torch.Tensor,
    values: torch.Tensor,
    gates: tuple[float, float, float],
    *,
    network: str,
    depth: int,
    chunk_size: int,
    state: MemoryState | None = None,
) -> tuple[torch.Tensor, MemoryState]:
    widths = [WIDTH, *[2 * WIDTH] * (depth - 1), WIDTH]
    generator = torch.Generator().manual_seed(0)
    weights = initial_weights(1, widths, residual_norm=network == "residual_norm", generator=generator)
    constants = [constant(keys.shape[1], depth, gate) for gate in gates]
    with torch.no_grad():
        return memory_scan(keys, keys, values, *constants, weights, network=network, chunk_size=chunk_size, state=state)


def pairs(length: int, distinct: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (1, T, 1, D) drawn from a few pairs."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, distinct, (length,), generator=generator)
    keys = F.normalize(torch.randn(distinct, WIDTH, generator=generator), dim=-1)
    values = torch.randn(distinct, WIDTH, generator=generator)
    return keys[index][None, :, None], values[index][None, :, None]


def largest_rms(state: MemoryState) -> float:
    return max(float(x.square().mean((-1, -2)).sqrt().max()) for x in (*state.weights, *state.momentum))


def learning_error(
    keys: torch.Tensor,
    values: torch.Tensor,
    network: str,
    depth: int,
    chunk_size: int,
    state: MemoryState | None = None,
) -> float:
    """Share of the values that the last 200 reads of a well-behaved stream still miss."""
    gentle = (0.05, 0.5, 2e-3)
    reads, _ = run(keys, values, gentle, network=network, depth=depth, chunk_size=chunk_size, state=state)
    return float((reads - values)[:, -200:].square().sum() / values[:, -200:].square().sum())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_one_key_repeated_100_000_times_at_the_largest_gates_stays_bounded(network: str, depth: int) -> None:
    keys, values = pairs(1, 1)
    state = None
    for _ in range(10):
        repeated = keys.expand(1, 10_000, 1, WIDTH), values.expand(1, 10_000, 1, WIDTH)
        reads, state = run(*repeated, (1.0, 1.0, 0.0), network=network, depth=depth, chunk_size=16, state=state)
    assert reads.isfinite().all()
    assert largest_rms(state) <= STATE_RMS_LIMIT * 1.001


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_one_key_repeated_is_remembered_however_large_the_step(chunk_size: int) -> None:
    keys, values = pairs(1, 1)
    repeated = keys.expand(1, 4_096, 1, WIDTH), values.expand(1, 4_096, 1, WIDTH)
    reads, _ = run(*repeated, (0.3, 0.9, 0.0), network="plain", depth=1, chunk_size=chunk_size)
    assert (reads[:, -1] - values[:, -1]).norm() < 0.1 * values.norm()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_no_hostile_stream_under_any_gates_breaks_the_memory(network: str, depth: int) -> None:
    """36 rows of long_streams.py, ending inside a chunk."""
    found = long_streams.run(4_096 + 37, 64, depth, network)
    assert found["finite"]
    assert found["bounded"]
    if network == "residual_norm":
        assert found["rows_that_learn"] == found["rows"]


STREAMS = {
    "alternating": lambda k, v: (k.clone().index_copy(1, torch.arange(1, k.shape[1], 2), -k[:, 1::2]), v),
    "opposite values": lambda k, v: (
        k[:, :1].expand_as(k),
        v[:, :1] * torch.tensor([1.0, -1.0]).repeat(v.shape[1] // 2)[None, :, None, None],
    ),
    "scaled by 1e4": lambda k, v: (k * 1e4, v * 1e4),
    "zero keys": lambda k, v: (torch.zeros_like(k), v),
    "bfloat16": lambda k, v: (k.bfloat16().float(), v.bfloat16().float()),
}


@pytest.mark.parametrize("gates", [(1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.1, 0.99, 1e-3)])
@pytest.mark.parametrize("network", ["residual_norm", "plain"])
@pytest.mark.parametrize("stream", STREAMS)
def test_hostile_streams_stay_bounded_and_the_next_stream_is_learned(
    stream: str, network: str, gates: tuple[float, float, float]
) -> None:
    keys, values = STREAMS[stream](*pairs(1_024, 8))
    _, state = run(keys, values, gates, network=network, depth=2, chunk_size=16)
    assert largest_rms(state) <= STATE_RMS_LIMIT * 1.001
    after, targets = pairs(4_096, 3, seed=1)
    fresh = learning_error(after, targets, network, 2, 16)
    assert learning_error(after, targets, network, 2, 16, state) < 1.5 * fresh + 0.1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    chunk_size=st.sampled_from([1, 4, 16, 64]),
    depth=st.integers(1, 3),
    network=st.sampled_from(["residual_norm", "plain"]),
    theta=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 100.0]),
    eta=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    alpha=st.sampled_from([0.0, 1e-3, 0.5, 1.0]),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
)
def test_no_stream_leaves_the_shell(
    seed: int, chunk_size: int, depth: int, network: str, theta: float, eta: float, alpha: float, scale: float
) -> None:
    keys, values = pairs(128, 1 + seed % 9, seed)
    reads, state = run(keys, values * scale, (theta, eta, alpha), network=network, depth=depth, chunk_size=chunk_size)
    assert reads.isfinite().all()
    assert largest_rms(state) <= STATE_RMS_LIMIT * 1.001


def test_rounding_does_not_grow_with_the_sequence() -> None:
    """Forgetting shrinks the weights under a LayerNorm, whose derivative grows; the memory must not turn chaotic."""
    keys, values = pairs(1_024, 1_024)
    gates, weights = (0.01, 0.5, 0.03), initial_weights(1, [WIDTH, 2 * WIDTH, WIDTH], residual_norm=True)
    reads = [
        memory_scan(
            *(x.to(dtype) for x in (keys, keys, values, *(constant(1_024, 2, gate) for gate in gates))), weights
        )[0]
        for dtype in (torch.float32, torch.float64)
    ]
    assert (reads[0] - reads[1]).abs().max() < 1e-3


@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_forgetting_never_empties_a_deep_memory(network: str) -> None:
    keys, values = pairs(4_096, 4_096)
    _, state = run(keys, values, (0.0, 0.5, 0.05), network=network, depth=2, chunk_size=16)
    after, targets = pairs(2_048, 3, seed=1)
    assert learning_error(after, targets, network, 2, 16, state) < 1.5 * learning_error(after, targets, network, 2, 16)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_a_cleared_memory_learns_again(network: str, depth: int) -> None:
    """alpha = 1 with nothing written: every matrix is exactly zero until its chunk ends."""
    keys, values = pairs(64, 8)
    _, state = run(keys, values, (0.0, 0.0, 1.0), network=network, depth=depth, chunk_size=16)
    after, targets = pairs(2_048, 3, seed=1)
    fresh = learning_error(after, targets, network, depth, 16)
    assert learning_error(after, targets, network, depth, 16, state) < 1.5 * fresh + 0.01


def test_bound_leaves_ordinary_data_alone_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = pairs(512, 512)
    gates = (0.01, 0.5, 0.001)
    reads, state = run(keys, values, gates, network="plain", depth=2, chunk_size=16)
    monkeypatch.setattr("titans_mcore.memory.chunked.step_scale", lambda own, before: torch.ones_like(own))
    monkeypatch.setattr("titans_mcore.memory.chunked._into_shell", lambda *_: None)
    unbounded, unbounded_state = run(keys, values, gates, network="plain", depth=2, chunk_size=16)
    assert torch.equal(reads, unbounded)
    assert all(torch.equal(a, b) for a, b in zip(state.weights, unbounded_state.weights, strict=True))


@given(st.lists(st.floats(0.0, 1e6, allow_subnormal=False), min_size=1, max_size=50))
def test_allowed_steps_of_a_repeated_key_never_pass_the_target(own: list[float]) -> None:
    steps = torch.tensor(own, dtype=torch.float64)
    allowed = steps * step_scale(steps, steps.cumsum(0) - steps)
    assert float(allowed.sum()) <= 1.0 + 1e-9
    assert (allowed >= 0).all()
    assert (allowed <= steps).all()


@pytest.mark.parametrize("first", [0.4, 0.6, 1e3, 1e9, 1e18])
def test_step_scale_keeps_its_precision_in_float32(first: float) -> None:
    own = torch.tensor([first, 0.3, 1e-6, first, 1e-3 * first], dtype=torch.float64)
    before = torch.tensor([0.0, first, 1e-3, 1e-6, 0.499], dtype=torch.float64)
    exact, rounded = (step_scale(x, y) for x, y in ((own, before), (own.float(), before.float())))
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-37)


def test_shell_keeps_what_is_inside_and_the_direction_of_what_is_not() -> None:
    inside, outside = torch.randn(4, 4), 1e3 * torch.randn(4, 4)
    assert torch.equal(below_limit(inside), inside)
    torch.testing.assert_close(below_limit(outside) / below_limit(outside).norm(), outside / outside.norm())
