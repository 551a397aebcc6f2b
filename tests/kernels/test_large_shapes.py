"""On a GPU, at the sizes that are trained: the kernels against the chunked form."""

import pytest
import torch

from titans_mcore.memory import memory_scan

from .problems import Problem, Sizes, by_kernels, make_problem, with_gradients

LARGE = [
    Sizes(batch=1, length=4096, heads=24, width=64, depth=2, hidden=256),
    Sizes(batch=1, length=4096, heads=24, width=64, depth=1),
    Sizes(batch=1, length=4096, heads=24, width=64, depth=2, hidden=64, block=64),
    Sizes(batch=1, length=4096, heads=8, width=128, depth=1, block=32),
    Sizes(batch=1, length=4096, heads=8, width=128, depth=2, hidden=256, block=16),
]


def by_chunked_form(problem: Problem) -> list[torch.Tensor]:
    names = ("norm_weight", "norm_bias")
    tokens = [x.float() for x in problem.tokens]
    norm = dict(zip(names, problem.norm, strict=True))
    reads, state = memory_scan(*tokens, problem.initial, **norm, chunk_size=problem.sizes.block, backend="chunked")
    return [reads, *state.weights, *state.momentum]


def learned_start(problem: Problem) -> Problem:
    """Without a carried state, so that both begin alike: weights M_0, no momentum."""
    problem.weights = [w.unsqueeze(0).clone() for w in problem.initial]
    problem.momentum = [torch.zeros_like(w) for w in problem.weights]
    return problem


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_kernels_equal_the_chunked_form_at_full_size(sizes: Sizes, dtype: torch.dtype) -> None:
    problem = learned_start(make_problem(sizes)).cast(dtype, "cuda")
    ours = with_gradients(by_kernels, problem)
    theirs = with_gradients(by_chunked_form, problem)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    tokens = slice(0, 1 + 2 * sizes.depth + 6)  # outputs, and gradients at tokens and gates
    for a, b in zip(ours[tokens], theirs[tokens], strict=True):
        assert float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())
