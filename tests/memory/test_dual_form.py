"""The chunked dual form is the oracle: outputs, states and every outer gradient, in float64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from titans_mcore.memory import MemoryState, memory_read, memory_scan

from ..matrices import every_pair
from .streams import Stream, by_channel, make_stream


def results(
    stream: Stream, backend: str, chunk_size: int, pieces: list[int], rule: str = "stable"
) -> list[torch.Tensor]:
    """Reads, end state and gradients of a random functional of them, by a scan in the given pieces."""
    leaves = stream.leaves()
    reads, state, start = [], None, 0
    for length in pieces:
        piece = stream.piece(start, start + length)
        read, state = memory_scan(
            *piece.tokens,
            stream.weights,
            **stream.settings,
            rule=rule,
            chunk_size=chunk_size,
            state=state,
            close=start + length == sum(pieces),
            backend=backend,
        )
        reads.append(read)
        start += length
    outputs = [torch.cat(reads, 1), *state.weights, *state.momentum]
    generator = torch.Generator().manual_seed(1)
    functional = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(functional, leaves)]


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(ours, theirs, strict=True))


@every_pair(length=[1, 7, 16, 37], depth=[1, 2, 3, 4], network=["residual_norm", "plain"], rule=["stable", "literal"])
def test_dual_form_equals_the_oracle(rule: str, network: str, depth: int, length: int) -> None:
    stream = make_stream(length, depth, network)
    ours = results(stream, "chunked", 16, [length], rule)
    assert largest_difference(ours, results(stream, "oracle", 16, [length], rule)) < 1e-10


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_dual_form_equals_the_oracle_from_a_carried_state(network: str, depth: int) -> None:
    stream = make_stream(45, depth, network)
    ours = results(stream, "chunked", 8, [13, 32])  # the first piece leaves a chunk open
    assert largest_difference(ours, results(stream, "oracle", 8, [13, 32])) < 1e-10


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_dual_form_equals_the_oracle_where_shell_and_held_steps_act(network: str, depth: int) -> None:
    stream = make_stream(20, depth, network, theta=1.0)
    within = make_stream(20, depth, network, theta=1e-3)
    ours, oracle = results(stream, "chunked", 8, [20]), results(stream, "oracle", 8, [20])
    assert largest_difference(ours, oracle) < 1e-10
    assert largest_difference(ours[:1], results(within, "oracle", 8, [20])[:1]) > 1e-3


@pytest.mark.parametrize("pieces", [[37], [16, 21], [1] * 37, [5, 11, 3, 18], [20, 17]])
@pytest.mark.parametrize("backend", ["chunked", "oracle"])
def test_any_split_gives_the_result_of_one_pass(backend: str, pieces: list[int]) -> None:
    stream = make_stream(37, 2)
    whole = results(stream, backend, 8, [37])
    assert largest_difference(results(stream, backend, 8, pieces), whole) < 1e-10


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_a_key_of_zeros_leaves_every_gradient_finite(network: str, depth: int) -> None:
    stream = make_stream(8, depth, network, dtype=torch.float32)
    stream.keys[:, 0] = 0.0
    assert all(bool(x.isfinite().all()) for x in results(stream, "chunked", 8, [8]))


def test_outer_gradient_is_the_derivative_of_the_scan() -> None:
    stream = make_stream(5, 2, batch=1, heads=1, width=3, theta=2.0)  # out of the shell
    leaves = stream.leaves()

    def scan(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        norm = dict(zip(("norm_weight", "norm_bias"), leaves[8:], strict=True))
        reads, state = memory_scan(*leaves[:6], list(leaves[6:8]), **norm, chunk_size=4)
        return (reads, *state.weights, *state.momentum)

    assert torch.autograd.gradcheck(scan, tuple(leaves), atol=1e-6)


def test_states_are_not_kept_for_every_chunk() -> None:
    """L = 2, width 64, expansion 4, 4,096 tokens in chunks of 16: the states saved for the backward pass."""
    length, width, hidden = 4_096, 64, 256
    stream = make_stream(length, 2, batch=1, heads=1, width=width, dtype=torch.float32)
    weights = [torch.randn(1, width, hidden), torch.randn(1, hidden, width)]
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    inputs = [x.requires_grad_() for x in stream.tokens]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        memory_scan(*inputs, weights, network="plain")
    every_state = length // 16 * 2 * 2 * width * hidden * 4  # weights and momentum of two matrices
    assert sum(saved.values()) < every_state / 8


@pytest.mark.parametrize("network", ["residual_norm", "plain"])
@pytest.mark.parametrize("backend", ["chunked", "native", "oracle"])
def test_autocast_around_a_scan_changes_nothing(backend: str, network: str) -> None:
    """Forward and backward, with a chunk that is left open and gone on in."""
    stream = make_stream(45, 2, network, dtype=torch.float32)

    def found() -> list[torch.Tensor]:
        scanned = results(stream, backend, 8, [13, 32])
        reads = memory_read(stream.queries, stream.weights, **stream.settings)
        return [*scanned, reads, *torch.autograd.grad(reads.square().sum(), [stream.queries, *stream.weights])]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        assert largest_difference(found(), expected) < 1e-6  # bf16 alone is off by 1e-2; sums may come in another order


def test_full_forgetting_leads_to_the_initial_memory_and_literally_to_zero() -> None:
    stream = make_stream(12, 1, "plain")
    stream.alpha[:, 5] = 1.0
    stream.eta[:, 5] = 0.0
    stream.theta[:, 5] = 0.0
    for rule, left in (("stable", stream.weights), ("literal", [torch.zeros_like(stream.weights[0])])):
        tokens, settings = stream.piece(0, 6).tokens, {"network": "plain", "rule": rule, "chunk_size": 4, "close": True}
        _, after_clear = memory_scan(*tokens, stream.weights, **settings)
        torch.testing.assert_close(after_clear.weights[0], left[0].expand(2, -1, -1, -1))
        assert float(after_clear.momentum[0].abs().max()) < 1e-200


def test_without_momentum_the_past_surprise_is_forgotten() -> None:
    stream = make_stream(12, 1, "plain")
    stream.eta[:] = 0.0
    settings = {"network": "plain", "chunk_size": 4, "close": True}
    _, state = memory_scan(*stream.tokens, stream.weights, **settings)
    _, other = memory_scan(*stream.piece(0, 11).tokens, stream.weights, **settings)
    moved = [x.weights[0] - stream.weights[0] for x in (state, other)]
    stepped = moved[0] - (1 - stream.alpha[:, 11, :, 0, None, None]) * moved[1]
    torch.testing.assert_close(stepped, state.momentum[0])


def test_a_read_does_not_depend_on_later_tokens_of_its_chunk() -> None:
    stream, changed = make_stream(16, 2, theta=1.0), make_stream(16, 2, theta=1.0)
    changed.keys[:, 9:] += 1.0
    changed.values[:, 9:] *= 3.0
    reads, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings)
    moved, _ = memory_scan(*changed.tokens, stream.weights, **stream.settings)
    assert torch.equal(reads[:, :9], moved[:, :9])
    assert not torch.equal(reads[:, 9:], moved[:, 9:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_state_stays_float32_and_reads_keep_their_dtype(dtype: torch.dtype) -> None:
    stream = make_stream(20, 2, dtype=dtype)
    reads, state = memory_scan(*stream.tokens, stream.weights, **stream.settings)
    assert reads.dtype == dtype
    assert {x.dtype for x in (*state.weights, *state.momentum)} == {torch.float32}


@every_pair(theta=[0.05, 1.0], pieces=[[37], [13, 24]], depth=[1, 2, 3], network=["residual_norm", "plain"])
def test_forgetting_by_channel_equals_the_oracle(network: str, depth: int, pieces: list[int], theta: float) -> None:
    stream = by_channel(make_stream(37, depth, network, theta=theta))
    assert largest_difference(results(stream, "auto", 8, pieces), results(stream, "oracle", 8, [37])) < 1e-10


def test_forgetting_by_channel_with_equal_channels_is_forgetting_by_head() -> None:
    stream, equal = make_stream(37, 2), by_channel(make_stream(37, 2))
    equal.alpha = [stream.alpha[..., i : i + 1].expand_as(a) for i, a in enumerate(equal.alpha)]
    by_head, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8)
    reads, _ = memory_scan(*equal.tokens, equal.weights, **equal.settings, chunk_size=8)
    torch.testing.assert_close(reads, by_head, rtol=1e-11, atol=1e-11)


def test_state_has_the_size_it_had_whatever_was_read() -> None:
    stream = make_stream(400, 2)
    _, after_16 = memory_scan(*stream.piece(0, 16).tokens, stream.weights, **stream.settings)
    _, after_400 = memory_scan(*stream.tokens, stream.weights, **stream.settings)
    assert after_400.bytes() == after_16.bytes()


def test_state_selects_expands_and_detaches_rows() -> None:
    stream = make_stream(21, 2)
    stream.leaves()
    _, state = memory_scan(*stream.tokens, stream.weights, **stream.settings)
    beams: MemoryState = state.detach().select(torch.tensor([1, 1, 0]))
    assert beams.open_chunk is not None
    assert torch.equal(beams.weights[0][1], state.weights[0][1])
    assert torch.equal(beams.open_chunk.tokens.keys[2], state.open_chunk.tokens.keys[0])
    assert not beams.weights[0].requires_grad


def test_a_saved_state_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    stream = make_stream(40, 2, dtype=torch.float32)
    settings = {**stream.settings, "chunk_size": 8}
    whole, _ = memory_scan(*stream.tokens, stream.weights, **settings)
    _, state = memory_scan(*stream.piece(0, 21).tokens, stream.weights, **settings)
    save_file({name: x.contiguous() for name, x in state.state_dict().items()}, tmp_path / "state.safetensors")
    loaded = MemoryState.from_state_dict(load_file(tmp_path / "state.safetensors"))
    assert loaded.state_dict().keys() == state.state_dict().keys()
    reads, _ = memory_scan(*stream.piece(21, 40).tokens, stream.weights, **settings, state=loaded)
    torch.testing.assert_close(reads, whole[:, 21:])


def test_a_saved_state_of_something_else_is_named() -> None:
    with pytest.raises(ValueError, match=r"MemoryState has no momentum in weights\.0"):
        MemoryState.from_state_dict({"weights.0": torch.zeros(1)})
    with pytest.raises(ValueError, match="MemoryState does not hold bias"):
        MemoryState.from_state_dict({name: torch.zeros(1) for name in ("weights.0", "momentum.0", "bias")})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"keys": torch.zeros(2, 5, 3, 6)}, "keys have shape"),
        ({"theta": torch.zeros(2, 4, 3, 2)}, "theta has shape"),
        ({"alpha": [torch.zeros(2, 4, 3, 5)]}, "alpha by channel has shapes"),
        ({"weights": []}, "1 to 4"),
        ({"weights": [torch.zeros(3, 6, 5)]}, r"weights\[0\]"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"network": "mlp"}, "network is 'mlp'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"network": "plain"}, "norm_weight was given"),
        ({"norm_bias": torch.zeros(6)}, "norm_bias has shape"),
        ({"queries": torch.zeros(2, 0, 3, 6)}, "T >= 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], sentence: str) -> None:
    stream = make_stream(4, 1)
    names = ("queries", "keys", "values", "theta", "eta", "alpha")
    arguments = {**dict(zip(names, stream.tokens, strict=True)), "weights": stream.weights, **stream.settings}
    with pytest.raises(ValueError, match=sentence):
        memory_scan(**{**arguments, **change})
