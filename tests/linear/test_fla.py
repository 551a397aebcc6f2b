"""fla-core's kernels get rows of documents in their own form, and are refused with a reason where they cannot run."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.linear.naive import linear_scan_naive
from titans_mcore.linear import linear_scan
from titans_mcore.linear.fla import by_sequences, why_not_fla
from titans_mcore.memory import PackedRows

from .test_linear_scan import KINDS, LENGTH, REAL, ROWS, check, packed, problem, with_gradients

LAYOUTS = {
    "whole": None,
    "documents": packed(),
    "padded": packed(starts=False, real=True),
    "both": packed(real=True),
    "a last document of padding": PackedRows(packed().starts, REAL & (torch.arange(LENGTH) < 52)),
}


def each_alone(loop: Any) -> Any:
    """A kernel over sequences end to end, from a loop that takes one: (q, k, v, g, beta, scale, initial_state)."""

    def kernel(*, cu_seqlens: Tensor, initial_state: Tensor, **tokens: Any) -> tuple[Tensor, Tensor]:
        scale, reads, states = tokens.pop("scale"), [], []
        for index, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            own = {name: x[:, begin:end] for name, x in tokens.items()}
            read, state = loop(own, scale, initial_state[index : index + 1])
            reads.append(read)
            states.append(state)
        return torch.cat([tokens["v"][:, :0], *reads], 1), torch.cat([initial_state[:0], *states])

    return kernel


def ours(own: dict[str, Tensor], scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    return linear_scan_naive(own["q"], own["k"], own["v"], own.get("g"), own.get("beta"), scale=scale, state=state)


def theirs(own: dict[str, Tensor], scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    named = {"scale": scale, "initial_state": state, "output_final_state": True}
    if "beta" not in own:
        return naive_recurrent_simple_gla(own["q"], own["k"], own["v"], own["g"], **named)
    decay = own.get("g", torch.zeros_like(own["beta"]))
    return naive_recurrent_gated_delta_rule(own["q"], own["k"], own["v"], own["beta"], decay, **named)


def scanned(loop: Any) -> Any:
    """linear_scan through by_sequences."""

    def scan(
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
        *,
        scale: float = 1.0,
        state: Tensor,
        rows: PackedRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        return by_sequences(each_alone(loop), queries, keys, values, log_decay, beta, scale, state, rows)

    return scan


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_as_sequences_are_the_recurrence_with_all_gradients(kind: str, layout: str) -> None:
    rows, tokens = LAYOUTS[layout], problem(kind)
    check(with_gradients(scanned(ours), tokens, rows=rows), with_gradients(linear_scan_naive, tokens, rows=rows))


def test_without_a_real_token_states_stay() -> None:
    tokens, nothing = problem("retnet"), torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    read, after = scanned(ours)(**tokens, rows=PackedRows(None, nothing))
    assert not read.any()
    assert torch.equal(after, tokens["state"])


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_mean_to_fla_core_what_they_mean_here(kind: str) -> None:
    pytest.importorskip("fla", reason="fla-core is not installed (extra `fla`)")
    tokens = {name: x.detach().float() for name, x in problem(kind).items()}
    read, after = scanned(theirs)(**tokens, scale=0.3, rows=packed())
    check((read, after), linear_scan(**tokens, scale=0.3, rows=packed()), rtol=1e-4, atol=1e-4)


def test_what_cannot_run_is_one_sentence() -> None:
    reason = why_not_fla(torch.bfloat16, torch.device("cpu"))
    assert "fla-core" in reason or "CUDA" in reason
    tokens = {name: x.detach() for name, x in problem("retnet").items()}
    with pytest.raises(ValueError, match="linear_backend is fla"):
        linear_scan(**tokens, backend="fla")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", ["whole", "documents", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_give_what_torch_gives(kind: str, layout: str) -> None:
    generator, rows = torch.Generator().manual_seed(0), LAYOUTS[layout]
    shape = (ROWS, LENGTH, 4, 32)
    names = ("queries", "keys", "values")
    tokens: dict[str, Tensor] = {name: torch.randn(shape, generator=generator) for name in names}
    tokens["keys"] = torch.nn.functional.normalize(tokens["keys"], dim=-1)
    tokens = {name: x.bfloat16() for name, x in tokens.items()}
    if "decay" in KINDS[kind]:
        tokens["log_decay"] = -torch.rand(shape[:3], generator=generator)
    if "beta" in KINDS[kind]:
        tokens["beta"] = torch.rand(shape[:3], generator=generator)
    tokens["state"] = torch.randn(ROWS, 4, 32, 32, generator=generator)
    found, wanted = [], []
    for backend, results in (("fla", found), ("torch", wanted)):
        own = {name: x.cuda().requires_grad_() for name, x in tokens.items()}
        read, after = linear_scan(**own, scale=0.2, rows=rows, backend=backend)
        (read.float().square().sum() + after.square().sum()).backward()
        results += [read, after, *(x.grad for x in own.values())]
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()
