"""The fused kernels are the oracle: reads, end states and every gradient, at each border between chunks."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from titans_mcore.memory import memory_scan

from .problems import Problem, Sizes, by_kernels, by_oracle, differences, kernels_differ, make_problem, with_gradients

FLOAT32 = 1e-4
BFLOAT16 = 5e-2  # of the norm: gradients at gates are sums that cancel

# Plain networks of two matrices reach the kernels under the literal rule alone.
RULES = [
    {"network": network, "rule": rule}
    for network, rule in (("residual_norm", "stable"), ("residual_norm", "literal"), ("plain", "literal"))
]
# The interpreter takes as long as there are rows, heads and chunks: one size has two rows of two heads each.
ONE = {"batch": 1, "heads": 1}
PLAIN = [
    Sizes(depth=1, **rule, **size)
    for rule in (*RULES, {"network": "plain"})
    for size in ({} if rule is RULES[0] else ONE, {**ONE, "width": 32}, {**ONE, "length": 64, "block": 32})
]
DEEP = [
    Sizes(**rule, **size)
    for rule in RULES
    for size in ({"batch": 1, "length": 32}, {"heads": 1, "hidden": 32, "length": 32}, {**ONE, "hidden": 128})
]
WIDE = [
    Sizes(batch=1, heads=1, width=32, hidden=64, length=64, block=32),
    Sizes(batch=1, heads=1, width=32, hidden=128, length=32),
    Sizes(batch=1, heads=1, width=16, length=16, forgets=False),
    Sizes(batch=1, heads=1, width=128, depth=1, length=32),
]
SMALL = [
    Sizes(heads=1, depth=1),
    Sizes(heads=1, depth=1, **RULES[2]),
    Sizes(**ONE),
    Sizes(**ONE, **RULES[2]),
]
TILED = Sizes(**ONE, hidden=128)


def slowly(sizes: Sizes) -> object:
    """Tiles several times over, which take long in the interpreter."""
    return pytest.param(sizes, marks=pytest.mark.slow, id=str(sizes))


@pytest.mark.parametrize("sizes", PLAIN + DEEP + WIDE, ids=str)
def test_kernels_equal_the_oracle(sizes: Sizes, device: str) -> None:
    assert kernels_differ(make_problem(sizes), device) < FLOAT32


LARGE_STEPS = [
    Sizes(**ONE, depth=1),
    Sizes(**ONE, depth=1, network="plain"),
    Sizes(**ONE, length=32),
    Sizes(batch=1, heads=1, length=64, block=32),
    Sizes(batch=1, heads=1, width=32, depth=1, length=32, block=32, forgets=False),
    replace(TILED, length=32, forgets=False),
]


@pytest.mark.parametrize("sizes", LARGE_STEPS, ids=str)
def test_errors_are_those_at_the_tokens_own_last_matrix(sizes: Sizes, device: str) -> None:
    problem = make_problem(sizes, theta=1.0)
    moved = problem.cast(torch.float32, device)
    assert max(differences(by_kernels(moved, exact=False), by_oracle(problem))) > 0.1
    assert kernels_differ(problem, device) < FLOAT32


HELD = [Sizes(heads=1), slowly(replace(TILED, batch=2)), Sizes(heads=1, width=32, hidden=64, length=64, block=32)]


@pytest.mark.parametrize("sizes", HELD, ids=str)
def test_lower_steps_are_held(sizes: Sizes, device: str) -> None:
    problem = make_problem(sizes, theta=2.0)
    problem.restarts = torch.zeros(problem.chunks, sizes.batch, dtype=torch.bool)
    problem.restarts[1, 1] = True
    problem.closed = torch.ones(problem.chunks, sizes.batch, dtype=torch.bool)
    problem.closed[-1] = False
    leave_empty(problem, torch.arange(sizes.length) >= sizes.length - 5)
    moved, expected = problem.cast(torch.float32, device), by_oracle(problem)
    assert max(differences(by_kernels(moved, holds=False), expected)) > 0.01
    assert kernels_differ(problem, device) < FLOAT32


@pytest.mark.parametrize("sizes", [Sizes(**ONE, length=112), slowly(replace(TILED, length=80))], ids=str)
def test_gradient_goes_through_several_groups_of_chunks(sizes: Sizes, device: str) -> None:
    assert kernels_differ(make_problem(sizes), device) < FLOAT32


@pytest.mark.parametrize("sizes", [Sizes(**ONE, depth=1), Sizes(**ONE), TILED], ids=str)
def test_kernels_equal_the_chunked_form(sizes: Sizes, device: str) -> None:
    problem = make_problem(sizes)
    problem.momentum = [torch.zeros_like(x) for x in problem.momentum]
    problem.weights = [x.expand(sizes.batch, *x.shape) for x in problem.initial]
    names = ("norm_weight", "norm_bias")
    reads, state = memory_scan(
        *problem.tokens, problem.initial, **dict(zip(names, problem.norm, strict=True)), backend="chunked"
    )
    ours = by_kernels(problem.cast(torch.float32, device))
    assert max(differences(ours, [reads, *state.weights, *state.momentum])) < FLOAT32


def leave_empty(problem: Problem, slots: torch.Tensor) -> None:
    """Make slots (B or 1, T) ones without a token: theta 0, eta 1, alpha 0, and nothing happens to the state."""
    fill = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    mask = slots.expand(problem.sizes.batch, -1)[..., None, None]
    problem.tokens = [x.masked_fill(mask, value) for x, value in zip(problem.tokens, fill, strict=True)]


def outside_the_shell(sizes: Sizes) -> Problem:
    """The first matrix and, in one row, the last momentum begin too large."""
    problem = make_problem(sizes, theta=2e-4)
    problem.tokens[5] = 0.01 * problem.tokens[5]
    problem.weights[0] = 3.6 / problem.weights[0].square().mean().sqrt() * problem.weights[0]
    problem.momentum[-1][0] *= 1e3
    problem.tokens[4] = 1.0 - 0.01 * (1.0 - problem.tokens[4])
    return problem


def driven_out_of_the_shell(sizes: Sizes) -> Problem:
    """All matrices begin within it, and large steps take them out."""
    problem = make_problem(sizes, theta=4.0)
    if sizes.rule == "stable":  # without a shell they would take them to infinity
        problem.tokens[5] = 0.01 * problem.tokens[5]
        problem.weights = [2.99 / w.square().mean().sqrt() * w for w in problem.weights]
    return problem


SHELL = [
    *((outside_the_shell, sizes) for sizes in SMALL[:3]),
    *((driven_out_of_the_shell, sizes) for sizes in (*SMALL[2:], replace(TILED, length=32), WIDE[-1])),
]
MORE_SHELL = [(outside_the_shell, TILED), (driven_out_of_the_shell, SMALL[0])]


@pytest.mark.parametrize(
    ("make", "sizes"),
    [*SHELL, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_SHELL)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_state_shell_acts_as_in_the_oracle(make: Callable[[Sizes], Problem], sizes: Sizes, device: str) -> None:
    problem = make(sizes)
    acts = max(differences(by_oracle(problem), by_oracle(replace(problem, closed=False)))) > 1e-3
    assert acts == (sizes.rule == "stable")
    assert kernels_differ(problem, device) < FLOAT32


@pytest.mark.parametrize("sizes", [Sizes(heads=1, depth=1), Sizes(heads=1), slowly(replace(TILED, batch=2))], ids=str)
def test_documents_begin_in_the_fresh_state(sizes: Sizes, device: str) -> None:
    problem = make_problem(sizes)
    problem.restarts = torch.zeros(problem.chunks, sizes.batch, dtype=torch.bool)
    problem.restarts[0, 0] = problem.restarts[1, 1] = problem.restarts[2, 0] = True
    assert kernels_differ(problem, device) < FLOAT32


@pytest.mark.parametrize("sizes", [Sizes(heads=1, depth=1), Sizes(heads=1), slowly(replace(TILED, batch=2))], ids=str)
def test_chunks_that_are_not_full_write_what_they_hold_and_meet_no_shell(sizes: Sizes, device: str) -> None:
    problem = outside_the_shell(sizes)
    problem.closed = torch.ones(problem.chunks, sizes.batch, dtype=torch.bool)
    problem.closed[-1] = problem.closed[0, 1] = False
    problem.restarts = torch.zeros(problem.chunks, sizes.batch, dtype=torch.bool)
    problem.restarts[1, 1] = True
    empty = torch.zeros(sizes.batch, sizes.length, dtype=torch.bool)
    empty[:, -5:] = empty[1, 3 : sizes.block] = True
    leave_empty(problem, empty)
    assert kernels_differ(problem, device) < FLOAT32


@pytest.mark.parametrize("sizes", [Sizes(**ONE, depth=1), Sizes(**ONE)], ids=str)
def test_open_chunks_meet_no_shell(sizes: Sizes, device: str) -> None:
    assert kernels_differ(replace(outside_the_shell(sizes), closed=False), device) < FLOAT32


@pytest.mark.parametrize(
    "sizes", [*SMALL, Sizes(heads=1, depth=1, network="plain"), replace(TILED, length=32)], ids=str
)
def test_products_in_bfloat16_stay_near_the_oracle(sizes: Sizes, device: str) -> None:
    problem = make_problem(sizes)
    problem.tokens[:3] = [x.bfloat16().double() for x in problem.tokens[:3]]
    ours = with_gradients(by_kernels, problem.cast(torch.bfloat16, device))
    for a, b in zip(ours, with_gradients(by_oracle, problem), strict=True):
        assert float((a.cpu().double() - b).norm()) <= BFLOAT16 * float(b.norm())


def test_tokens_may_have_any_strides(device: str) -> None:
    problem = make_problem(Sizes(depth=1, length=32, rule="literal")).cast(torch.float32, device)
    expected = with_gradients(by_kernels, problem)
    packed = torch.cat([x.detach() for x in problem.tokens[:3]], -1)  # one projection's output
    problem.tokens[:3] = packed.chunk(3, -1)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(by_kernels, problem), expected, strict=True))
    problem.tokens[1] = problem.tokens[1].detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(by_kernels, problem), expected, strict=True))


def test_nothing_is_kept_without_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_mcore.kernels import launch

    kept = []
    scan = launch.scan
    monkeypatch.setattr(launch, "scan", lambda *arguments: kept.append(scan(*arguments)) or kept[-1])
    problem = make_problem(Sizes(**ONE, depth=1)).cast(torch.float32, device)
    outputs = by_kernels(problem)
    problem.leaves()
    with torch.no_grad():
        by_kernels(problem)
    assert [states for _, _, states in kept] == [None, None]
    assert all(bool(x.isfinite().all()) for x in outputs)
