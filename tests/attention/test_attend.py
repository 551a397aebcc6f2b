"""Every attention backend is the dense-mask oracle."""

import math

import pytest
import torch

from titans_mcore.attention import attend, rotate
from titans_mcore.attention.attend import Documents, Prefix, visible
from titans_mcore.attention.flash import PrefixMerge, document_bounds


def tensors(length: int, past: int, prefix: int, keys_per_token: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length + past)

    def normal(tokens: int) -> torch.Tensor:
        return torch.randn(2, tokens, 3, 8, generator=generator, dtype=torch.float64).requires_grad_()

    keys = (past + length) * keys_per_token
    return [normal(length), normal(keys), normal(keys), normal(length), normal(prefix), normal(prefix)]


def documents_of(length: int, past: int) -> Documents:
    """Two rows with documents of their own; the second ends in padding."""
    generator = torch.Generator().manual_seed(length * past)
    numbers = (torch.rand(2, length, generator=generator) < 0.15).cumsum(1)
    numbers[1, length - length // 4 :] = -1
    earlier = torch.zeros(2, past, dtype=torch.long)
    earlier[0, : past // 2] = -1
    return Documents(numbers, torch.cat([earlier, numbers], 1))


def run(
    parts: list[torch.Tensor],
    backend: str,
    window: int,
    keys_per_token: int = 1,
    documents: Documents | None = None,
) -> list[torch.Tensor]:
    queries, keys, values, plain, prefix_keys, prefix_values = parts
    prefix = Prefix(plain, prefix_keys, prefix_values) if prefix_keys.shape[1] else None
    options = {"window": window, "keys_per_token": keys_per_token, "documents": documents}
    out = attend(queries, keys, values, prefix=prefix, backend=backend, **options)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("keys_per_token", [1, 2])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize(("length", "past"), [(1, 9), (33, 0), (20, 13), (700, 3)])
def test_sdpa_keeps_documents_apart_as_the_dense_mask_does(
    length: int, past: int, window: int, prefix: int, keys_per_token: int
) -> None:
    parts, documents = tensors(length, past, prefix, keys_per_token), documents_of(length, past)
    expected = run(parts, "dense", window, keys_per_token, documents)
    for ours, dense in zip(run(parts, "sdpa", window, keys_per_token, documents), expected, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_a_document_attends_as_it_does_alone(backend: str) -> None:
    queries, keys, values, *_ = tensors(30, 0, 0)
    numbers = torch.zeros(2, 30, dtype=torch.long)
    numbers[:, 9:] = 1
    packed = attend(queries, keys, values, documents=Documents(numbers, numbers), backend=backend)
    alone = attend(queries[:, 9:], keys[:, 9:], values[:, 9:], backend=backend)
    torch.testing.assert_close(packed[:, 9:], alone, rtol=1e-10, atol=1e-10)


def bounded_mask(bounds: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | bool:
    """Pairs of tokens of one document, (B, 1, T, T)."""
    if bounds is None:
        return True
    number = torch.zeros(batch * length).index_fill_(0, bounds[:-1].long(), 1.0).cumsum(0).view(batch, length)
    return (number[:, :, None] == number[:, None]).unsqueeze(1)


def window_kernel(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int, bounds: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What FlashAttention's forward kernel returns, written out."""
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
    if window >= 0:
        past = keys.shape[1] - queries.shape[1]
        mask = visible(past, queries.shape[1], 0, keys.shape[1], window, 1, queries.device)
        mask = mask & bounded_mask(bounds, *queries.shape[:2])
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
    bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What FlashAttention's backward kernel computes from the output and log-sum-exp it is given, written out."""
    scale = 1.0 / math.sqrt(queries.shape[-1])
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * scale
    if window >= 0:
        past = keys.shape[1] - queries.shape[1]
        mask = visible(past, queries.shape[1], 0, keys.shape[1], window, 1, queries.device)
        mask = mask & bounded_mask(bounds, *queries.shape[:2])
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
@pytest.mark.parametrize("packed", [False, True])
def test_window_and_prefix_merge_exactly_whatever_kernels_compute_them(window: int, packed: bool) -> None:
    parts, documents = tensors(20, 0 if packed else 13, 5), documents_of(20, 0) if packed else None
    bounds = None if documents is None else document_bounds(documents.queries)
    out = PrefixMerge.apply(*parts, window, bounds, window_kernel, window_backward_kernel)
    ours = [out, *torch.autograd.grad(out.square().sum(), parts)]
    for merged, dense in zip(ours, run(parts, "dense", window, documents=documents), strict=True):
        torch.testing.assert_close(merged, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a CUDA device")
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_equals_the_dense_mask(packed: bool, prefix: int) -> None:
    pytest.importorskip("flash_attn", reason="the gpu extra is not installed")
    parts = tensors(70, 0 if packed else 13, prefix)
    halves = [part.detach().to("cuda", torch.bfloat16).repeat(1, 1, 1, 8).requires_grad_() for part in parts]
    numbers = documents_of(70, 0).queries.cuda()
    documents = Documents(numbers, numbers) if packed else None
    flash, expected = (run(halves, backend, 32, documents=documents) for backend in ("flash", "dense"))
    for ours, dense in zip(flash, expected, strict=True):
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
