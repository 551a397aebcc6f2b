"""Gradients of the chunk form: where the shell acts, through carried states, and what it keeps in memory."""

from collections.abc import Callable

import pytest
import torch

from titans_mcore.memory import MemoryState, memory_scan
from titans_mcore.memory.rule import Rule
from titans_mcore.memory.scan import NETWORKS

from ..matrices import every_pair
from .streams import Stream, make_stream
from .test_dual_form import largest_difference, results

LIMITS = {name: Rule.of("stable", 1, residual_norm=name == "residual_norm").rms_limit for name in NETWORKS}


def largest_rms(matrices: list[torch.Tensor]) -> float:
    return max(float(x.detach().square().mean((-1, -2)).sqrt().max()) for x in matrices)


def leaving_the_shell(length: int, network: str, depth: int = 2, **sizes: int) -> Stream:
    """A stream on which the shell acts: the first matrix begins outside it and is hardly forgotten."""
    stream = make_stream(length, depth, network, theta=0.002, **sizes)
    stream.eta = 1.0 - 0.1 * (1.0 - stream.eta)
    stream.alpha = 0.01 * stream.alpha
    stream.values = 300.0 * stream.values
    stream.weights[0] = 1.1 * LIMITS[network] / stream.weights[0].square().mean().sqrt() * stream.weights[0]
    return stream


def gradients(
    functional: Callable[[torch.Tensor, MemoryState], torch.Tensor],
    stream: Stream,
    backend: str = "chunked",
    **settings: int,
) -> list[torch.Tensor]:
    leaves = stream.leaves()
    reads, state = memory_scan(*stream.tokens, stream.weights, **stream.settings, **settings, backend=backend)
    found = torch.autograd.grad(functional(reads, state), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if x is None else x for leaf, x in zip(leaves, found, strict=True)]


@every_pair(length=[33, 63], depth=[1, 2, 3, 4], network=["residual_norm", "plain"])
def test_gradient_is_the_oracles_over_several_groups_of_chunks(network: str, depth: int, length: int) -> None:
    stream = make_stream(length, depth, network, batch=1, heads=2, width=4)
    ours = results(stream, "chunked", 4, [length])
    assert largest_difference(ours, results(stream, "oracle", 4, [length])) < 1e-10


@every_pair(
    theta=[0.3, 3.0],  # within the shell and on it; for plain networks steps are held
    depth=[1, 2, 3],
    network=["residual_norm", "plain"],
)
def test_gradient_is_the_oracles_however_large_the_step(network: str, depth: int, theta: float) -> None:
    stream = make_stream(37, depth, network, theta=theta)
    ours = results(stream, "chunked", 8, [37])
    assert largest_difference(ours, results(stream, "oracle", 8, [37])) < 1e-10


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_gradient_is_the_oracles_where_the_shell_acts(network: str, depth: int) -> None:
    stream = leaving_the_shell(36, network, depth)
    ours, oracle = results(stream, "chunked", 4, [36]), results(stream, "oracle", 4, [36])
    assert abs(largest_rms(ours[1 : 1 + depth]) / LIMITS[network] - 1.0) < 1e-3  # it began a tenth above
    assert largest_difference(ours, oracle) < 1e-10


@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_gradient_reaches_a_carried_state_and_comes_from_the_returned_one(network: str) -> None:
    def run(backend: str) -> list[torch.Tensor]:
        stream = make_stream(21, 2, network)
        generator = torch.Generator().manual_seed(3)
        shapes = [(2, *w.shape) for w in stream.weights] * 2
        carried = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
        state = MemoryState(carried[:2], carried[2:])
        leaves = [*stream.leaves()[:6], *carried]
        reads, end = memory_scan(
            *stream.tokens, stream.weights, **stream.settings, chunk_size=8, state=state, backend=backend
        )
        assert end.open_chunk is not None
        outputs = [reads, *end.weights, *end.momentum]
        return [*outputs, *torch.autograd.grad(sum(x.sin().sum() for x in outputs), leaves)]

    assert largest_difference(run("chunked"), run("oracle")) < 1e-10


@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_gradient_is_the_oracles_where_a_carried_momentum_comes_into_the_shell(network: str) -> None:
    def run(backend: str) -> list[torch.Tensor]:
        stream = leaving_the_shell(4, network)
        weights = [torch.stack([w, 0.5 * w]).requires_grad_() for w in stream.weights]
        momentum = [(1.5 * LIMITS[network] * torch.ones_like(w)).requires_grad_() for w in weights]
        leaves = [*stream.leaves()[:6], *weights, *momentum]
        state = MemoryState(weights, momentum)
        reads, end = memory_scan(
            *stream.tokens, stream.weights, **stream.settings, chunk_size=4, state=state, backend=backend
        )
        assert abs(largest_rms(end.momentum) / LIMITS[network] - 1.0) < 1e-6
        outputs = [reads, *end.weights, *end.momentum]
        generator = torch.Generator().manual_seed(1)
        draws = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
        functional = sum((x * draw).sum() for x, draw in zip(outputs, draws, strict=True))
        return [*outputs, *torch.autograd.grad(functional, leaves)]

    assert largest_difference(run("chunked"), run("oracle")) < 1e-10


@pytest.mark.parametrize(
    "functional",
    [
        lambda reads, state: reads[:, 3].sum(),
        lambda reads, state: state.weights[1].sin().sum(),
        lambda reads, state: state.momentum[0].sin().sum(),
    ],
    ids=["one read", "weights", "momentum"],
)
def test_gradient_of_a_part_of_the_result_is_the_oracles(functional: Callable[..., torch.Tensor]) -> None:
    stream = make_stream(24, 2)
    ours = gradients(functional, stream, chunk_size=8)
    assert largest_difference(ours, gradients(functional, stream, "oracle", chunk_size=8)) < 1e-10


@pytest.mark.parametrize("network", ["residual_norm", "plain"])
def test_gradient_without_scale_and_shift_is_the_oracles(network: str) -> None:
    stream = make_stream(19, 2, network, theta=1.0)
    stream.norm = {}
    ours = results(stream, "chunked", 8, [19])
    assert largest_difference(ours, results(stream, "oracle", 8, [19])) < 1e-10


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_stream(7, 2, batch=1, heads=1, width=3, theta=2.0),
        lambda: make_stream(7, 3, "plain", batch=1, heads=2, width=2),
        lambda: leaving_the_shell(6, "residual_norm"),
        lambda: leaving_the_shell(6, "plain"),
    ],
    ids=["large steps", "depth 3", "shell", "shell of a plain network"],
)
def test_gradient_is_the_derivative(make: Callable[[], Stream]) -> None:
    stream = make()
    depth, names = len(stream.weights), list(stream.norm)

    def scan(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        norm = dict(zip(names, leaves[6 + depth :], strict=True))
        reads, state = memory_scan(*leaves[:6], leaves[6 : 6 + depth], network=stream.network, **norm, chunk_size=3)
        return (reads, *state.weights, *state.momentum)

    assert torch.autograd.gradcheck(scan, tuple(stream.leaves()), atol=1e-5, rtol=1e-3, fast_mode=True)


def test_gradients_in_float32_are_those_of_float64_within_rounding() -> None:
    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        def functional(reads: torch.Tensor, state: MemoryState) -> torch.Tensor:
            return sum((x.sin().sum() for x in (reads, *state.weights, *state.momentum)), reads.new_zeros(()))

        return [x.double() for x in gradients(functional, make_stream(100, 2, dtype=dtype), chunk_size=16)]

    assert largest_difference(run(torch.float32), run(torch.float64)) < 1e-4


@pytest.mark.parametrize("theta", [0.05, 2.0])
def test_training_and_inference_compute_the_same_bits(theta: float) -> None:
    stream = make_stream(150, 2, theta=theta)
    without = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8)
    stream.leaves()
    reads, state = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8)
    assert torch.equal(reads, without[0])
    assert not without[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(state.momentum, without[1].momentum, strict=True))


def test_going_back_twice_over_one_graph_gives_the_same_gradient() -> None:
    stream = make_stream(50, 2, theta=1.0)
    leaves = stream.leaves()
    reads, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8)
    first = torch.autograd.grad(reads.sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(reads.sum(), leaves), strict=True))


def test_a_second_derivative_through_the_errors_is_refused() -> None:
    stream = make_stream(16, 2)
    leaves = stream.leaves()
    reads, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8)
    first = torch.autograd.grad(reads.square().sum(), leaves[:3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[1].sum().backward()


def saved_bytes(length: int, width: int, expansion: int, chunk_size: int) -> int:
    """Bytes of all tensors that a scan of one head keeps for its backward, a tensor kept twice counted once."""
    stream = make_stream(length, 2, batch=1, heads=1, width=4)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    tokens = [normal(1, length, 1, width) for _ in range(3)] + [x.float().requires_grad_() for x in stream.tokens[3:]]
    weights = [normal(1, width, expansion * width), normal(1, expansion * width, width)]
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reads, _ = memory_scan(*tokens, weights, chunk_size=chunk_size)
    assert reads.requires_grad
    return sum(kept.values())


def test_backward_keeps_an_eighth_of_the_states_at_most() -> None:
    length, width, expansion, chunk_size = 4_096, 64, 4, 16
    state = 2 * 2 * width * expansion * width * 4  # weights and momentum of two matrices, float32
    assert saved_bytes(length, width, expansion, chunk_size) <= length // chunk_size * state / 8


def test_what_backward_keeps_beside_its_arguments_grows_with_the_root_of_the_length() -> None:
    def states(length: int) -> int:
        arguments = (3 * 32 + 3 * 2) * length * 4
        return saved_bytes(length, 32, 4, 16) - arguments

    assert states(16_384) < 4.5 * states(1_024)
