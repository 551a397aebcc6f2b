"""Every attention backend is the dense-mask oracle."""

import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.library import Library

from titans_mcore.attention import attend, flash, rotate
from titans_mcore.attention.attend import Documents, Prefix, visible
from titans_mcore.attention.flash import PrefixMerge, document_bounds, flash_installed

from ..matrices import every_pair


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


@every_pair(
    keys_per_token=[1, 2],
    prefix=[0, 5],
    window=[0, 1, 7, 600],
    length__past=[(1, 0), (1, 9), (33, 0), (20, 13), (700, 3)],
)
def test_sdpa_equals_the_dense_mask(length: int, past: int, window: int, prefix: int, keys_per_token: int) -> None:
    parts = tensors(length, past, prefix, keys_per_token)
    expected = run(parts, "dense", window, keys_per_token)
    for ours, dense in zip(run(parts, "sdpa", window, keys_per_token), expected, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


@every_pair(keys_per_token=[1, 2], prefix=[0, 5], window=[0, 1, 7], length__past=[(1, 9), (33, 0), (20, 13), (700, 3)])
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


def pieces_of(bounds: torch.Tensor | None, *tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Rows (T, H, D) of (B, T, H, D), or documents of (B T, H, D)."""
    if bounds is None:
        yield from (list(row) for row in zip(*tensors, strict=True))
    else:
        yield from ([x[begin:end] for x in tensors] for begin, end in pairwise(bounds))


def scores_of(queries: torch.Tensor, keys: torch.Tensor, scale: float, left: int, right: int) -> torch.Tensor:
    """(H, T, S) as the operator counts: query i stands at key i + S - T and sees so many to its left and its right."""
    place = torch.arange(len(keys)) - (torch.arange(len(queries)) + len(keys) - len(queries))[:, None]
    hidden = ((place < -left) & (left >= 0)) | ((place > right) & (right >= 0))
    return (torch.einsum("qhd,khd->hqk", queries, keys) * scale).masked_fill(hidden, -math.inf)


def operator_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Any, key_bounds: Any, max_q: int, max_k: int,
    dropout: float, causal: bool, debug: bool, *, scale: float, window_size_left: int, window_size_right: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What aten::_flash_attention_forward computes on CUDA, written out."""
    assert (dropout, debug, bounds is None) == (0.0, False, key_bounds is None)
    longest = query.shape[1] if bounds is None else int((bounds[1:] - bounds[:-1]).max())
    assert max_q >= longest
    assert max_k == (key.shape[1] if bounds is None else max_q)
    right, outputs, sums = 0 if causal else window_size_right, [], []
    for q, k, v in pieces_of(bounds, query, key, value):
        scores = scores_of(q, k, scale, window_size_left, right)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))
    nothing = query.new_empty(0)
    together = (torch.stack if bounds is None else torch.cat)(outputs)
    lse = torch.stack(sums) if bounds is None else torch.cat(sums, 1)
    return together, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), nothing


def operator_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, bounds: Any, key_bounds: Any, max_q: int, max_k: int, dropout: float, causal: bool, state: Any,
    unused: Any, *, scale: float, window_size_left: int, window_size_right: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What aten::_flash_attention_backward computes on CUDA, written out; the softmax is that of lse."""
    right, found = 0 if causal else window_size_right, []
    assert lse.is_contiguous()
    sums = list(lse) if bounds is None else [lse[:, b:e] for b, e in pairwise(bounds)]
    pieces = pieces_of(bounds, grad, query, key, value, out)
    for (g, q, k, v, o), of_piece in zip(pieces, sums, strict=True):
        weights = (scores_of(q, k, scale, window_size_left, right) - of_piece.unsqueeze(-1)).exp()
        of_scores = weights * (torch.einsum("qhd,khd->hqk", g, v) - (g * o).sum(-1).T.unsqueeze(-1)) * scale
        products = (("hqk,khd->qhd", of_scores, k), ("hqk,qhd->khd", of_scores, q), ("hqk,qhd->khd", weights, g))
        found.append([torch.einsum(*product) for product in products])
    return tuple((torch.stack if bounds is None else torch.cat)(parts) for parts in zip(*found, strict=True))


@pytest.fixture
def torch_flash_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's FlashAttention operators, which are there for CUDA alone."""
    library = Library("aten", "IMPL")
    library.impl("_flash_attention_forward", operator_forward, "CPU")
    library.impl("_flash_attention_backward", operator_backward, "CPU")
    monkeypatch.setattr(flash, "why_not_flash", lambda *_: "")
    monkeypatch.setattr(flash, "flash_installed", lambda: False)
    yield
    library._destroy()


@pytest.mark.usefixtures("torch_flash_on_a_cpu")
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize(("length", "past", "packed"), [(20, 0, False), (20, 13, False), (1, 9, False), (20, 0, True)])
def test_torchs_flash_operators_are_called_so_that_they_give_the_dense_mask(
    length: int, past: int, packed: bool, window: int, prefix: int
) -> None:
    parts, documents = tensors(length, past, prefix), documents_of(length, 0) if packed else None
    expected = run(parts, "dense", window, documents=documents)
    for ours, dense in zip(run(parts, "flash", window, documents=documents), expected, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


def test_torchs_flash_operators_have_the_arguments_and_results_that_are_relied_on() -> None:
    forward = torch.ops.aten._flash_attention_forward.default._schema
    backward = torch.ops.aten._flash_attention_backward.default._schema
    keywords = ["scale", "window_size_left", "window_size_right"]
    limits = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    for schema, before, after in (
        (forward, ["query", "key", "value"], ["return_debug_mask"]),
        (backward, ["grad_out", "query", "key", "value", "out", "logsumexp"], ["rng_state", "unused"]),
    ):
        by_place = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        named = [argument for argument in schema.arguments if argument.kwarg_only]
        assert by_place == [*before, *limits, *after]
        assert [argument.name for argument in named[:3]] == keywords
        assert all(argument.has_default_value() for argument in named)
    # Shapes and autograd, as torch itself says them without a device.
    halves = [part.detach().to("meta", torch.bfloat16).requires_grad_() for part in tensors(20, 0, 0)[:3]]
    for bounds, shape in ((None, (2, 3, 20)), (torch.tensor([0, 5, 40], dtype=torch.int32, device="meta"), (2, 3, 20))):
        output, lse = flash.torch_forward(*halves, 7, bounds)
        assert (output.shape, lse.shape, lse.dtype) == (halves[0].shape, shape, torch.float32)
        assert [x.shape for x in torch.autograd.grad(output.sum(), halves)] == [x.shape for x in halves]
        with torch.no_grad():
            grads = flash.torch_backward(output, *halves, output, lse, 7, bounds)
        assert [x.shape for x in grads] == [x.shape for x in halves]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a CUDA device")
@pytest.mark.parametrize("package", [False, True])
@pytest.mark.parametrize("width", [48, 64, 96, 256])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_equals_the_dense_mask(
    packed: bool, prefix: int, width: int, package: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package and not flash_installed():
        pytest.skip("the gpu extra is not installed")
    monkeypatch.setattr(flash, "flash_installed", lambda: package)
    parts = tensors(70, 0 if packed else 13, prefix)
    halves = [part.detach().to("cuda", torch.bfloat16).repeat(1, 1, 1, width // 8).requires_grad_() for part in parts]
    numbers = documents_of(70, 0).queries.cuda()
    documents = Documents(numbers, numbers) if packed else None
    found, expected = (run(halves, backend, 32, documents=documents) for backend in ("flash", "dense"))
    for ours, dense in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, dense, rtol=3e-2, atol=3e-2)


def test_a_folder_of_flash_attns_name_is_no_flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    package = tmp_path / "flash_attn"
    (package / "cute").mkdir(parents=True)
    assert not flash_installed.__wrapped__()
    (package / "__init__.py").touch()
    assert flash_installed.__wrapped__()


def test_flash_without_its_package_or_device_says_what_to_install() -> None:
    queries, keys, values, *_ = tensors(4, 0, 0)
    with pytest.raises(ValueError, match="flash"):
        attend(queries, keys, values, backend="flash")


def test_scores_depend_on_distances_only_two_million_tokens_in() -> None:
    x, y = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    near = (rotate(x, 5, 10_000.0) * rotate(y, 0, 10_000.0)).sum()
    far = (rotate(x, 2_000_005, 10_000.0) * rotate(y, 2_000_000, 10_000.0)).sum()
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
