"""Every attention backend is the dense-mask oracle."""

import math

import pytest
import torch

from titans_mcore.attention import attend, rotate
from titans_mcore.attention.attend import Prefix, visible
from titans_mcore.attention.flash import PrefixMerge


def tensors(length: int, past: int, prefix: int, keys_per_token: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length + past)

    def normal(tokens: int) -> torch.Tensor:
        return torch.randn(2, tokens, 3, 8, generator=generator, dtype=torch.float64).requires_grad_()

    keys = (past + length) * keys_per_token
    return [normal(length), normal(keys), normal(keys), normal(length), normal(prefix), normal(prefix)]


def run(parts: list[torch.Tensor], backend: str, window: int, keys_per_token: int = 1) -> list[torch.Tensor]:
    queries, keys, values, plain, prefix_keys, prefix_values = parts
    prefix = Prefix(plain, prefix_keys, prefix_values) if prefix_keys.shape[1] else None
    out = attend(queries, keys, values, window=window, keys_per_token=keys_per_token, prefix=prefix, backend=backend)
    used = parts if prefix else parts[:3]
    return [out, *torch.autograd.grad(out.square().sum(), used)]


@pytest.mark.parametrize("keys_per_token", [1, 2])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("window", [0, 1, 7, 600])
@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 9), (33, 0), (20, 13), (700, 3)])
def test_sdpa_equals_the_dense_mask(length: int, past: int, window: int, prefix: int, keys_per_token: int) -> None:
    parts = tensors(length, past, prefix, keys_per_token)
    expected = run(parts, "dense", window, keys_per_token)
    for ours, dense in zip(run(parts, "sdpa", window, keys_per_token), expected, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


def window_kernel(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What FlashAttention's forward kernel returns, written out."""
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
    if window >= 0:
        past = keys.shape[1] - queries.shape[1]
        mask = visible(past, queries.shape[1], 0, keys.shape[1], window, 1, queries.device)
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values), scores.logsumexp(-1)


def window_backward_kernel(
    grad: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What FlashAttention's backward kernel computes from the output and log-sum-exp it is given, written out."""
    scale = 1.0 / math.sqrt(queries.shape[-1])
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * scale
    if window >= 0:
        past = keys.shape[1] - queries.shape[1]
        mask = visible(past, queries.shape[1], 0, keys.shape[1], window, 1, queries.device)
        scores = scores.masked_fill(~mask, -math.inf)
    weights = (scores - lse.unsqueeze(-1)).exp()
    of_weights = torch.einsum("bqhd,bkhd->bhqk", grad, values)
    of_scores = weights * (of_weights - (grad * output).sum(-1).transpose(1, 2).unsqueeze(-1)) * scale
    return (
        torch.einsum("bhqk,bkhd->bqhd", of_scores, keys),
        torch.einsum("bhqk,bqhd->bkhd", of_scores, queries),
        torch.einsum("bhqk,bqhd->bkhd", weights, grad),
    )


@pytest.mark.parametrize("window", [0, 7])
def test_window_and_prefix_merge_exactly_whatever_kernels_compute_them(window: int) -> None:
    parts = tensors(20, 13, 5)
    out = PrefixMerge.apply(*parts, window, window_kernel, window_backward_kernel)
    ours = [out, *torch.autograd.grad(out.square().sum(), parts)]
    for merged, dense in zip(ours, run(parts, "dense", window), strict=True):
        torch.testing.assert_close(merged, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a CUDA device")
@pytest.mark.parametrize("prefix", [0, 5])
def test_flash_equals_the_dense_mask(prefix: int) -> None:
    pytest.importorskip("flash_attn", reason="the gpu extra is not installed")
    parts = tensors(70, 13, prefix)
    halves = [part.detach().to("cuda", torch.bfloat16).repeat(1, 1, 1, 8).requires_grad_() for part in parts]
    for ours, dense in zip(run(halves, "flash", 32), run(halves, "dense", 32), strict=True):
        torch.testing.assert_close(ours, dense, rtol=3e-2, atol=3e-2)


def test_flash_without_its_package_or_device_says_what_to_install() -> None:
    queries, keys, values, *_ = tensors(4, 0, 0)
    with pytest.raises(ValueError, match="flash"):
        attend(queries, keys, values, backend="flash")


def test_scores_depend_on_distances_only_two_million_tokens_in() -> None:
    x, y = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    near = (rotate(x, 5, 10_000.0) * rotate(y, 0, 10_000.0)).sum()
    far = (rotate(x, 2_000_005, 10_000.0) * rotate(y, 2_000_000, 10_000.0)).sum()
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
