"""The four variants and the baseline: causal, the same in pieces, every parameter learning, constant state."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from titans_mcore.config import TitansConfig
from titans_mcore.memory import TensorTree
from titans_mcore.mixers import MIXERS
from titans_mcore.mixers.parts import Parts, causal_conv, rms_norm, unit_silu

from ..matrices import by_kind

LENGTH = 75
WITH_MEMORY = [name for name, mixer in MIXERS.items() if mixer.memory]


def mixer_of(variant: str, dtype: torch.dtype = torch.float32, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = TitansConfig(
        **{  # type: ignore[arg-type]
            "variant": variant,
            "dim": 24,
            "num_heads": 3,
            "memory_heads": 2,
            "linear_heads": 3,
            "memory_expansion": 2,
            "chunk_size": 8,
            "persistent_tokens": 5,
            "segment_length": 16,
            "window": 12,
            **settings,
        }
    )
    mixer = config.blocks[0].module(config, Parts(config)).to(dtype)
    return WithFront(mixer) if config.blocks[0].front else mixer


class WithFront(torch.nn.Module):
    """A mixer behind what it adds in front, as in a block but for the norm between them."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Any, state: Any, rows: Any = None) -> Any:
        x, state = self.mixer.front(x, state, rows)
        return self.mixer(x, state, rows)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, LENGTH, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("variant", "position"), by_kind([16, 0, 7, 8, 15, 40, LENGTH - 1]))
def test_nothing_before_a_changed_token_moves(variant: str, position: int) -> None:
    mixer, x = mixer_of(variant), inputs()
    changed = x.clone()
    changed[:, position] = 3.0 * torch.randn(24)
    with torch.no_grad():
        before, after = mixer(x, None)[0], mixer(changed, None)[0]
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize(("variant", "position"), by_kind([16, 0, 8, 15, 40]))
def test_no_gradient_reaches_a_later_token(variant: str, position: int) -> None:
    mixer, x = mixer_of(variant), inputs().requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x, None)[0][:, position].square().sum(), x)
    assert not gradient[:, position + 1 :].any()
    assert gradient[:, position].any()


@pytest.mark.parametrize(("variant", "pieces"), by_kind([[5, 1, 30, 2, 37], [1] * LENGTH, [16] * 4 + [11], [74, 1]]))
def test_pieces_of_any_length_give_one_pass(variant: str, pieces: list[int]) -> None:
    mixer, x = mixer_of(variant), inputs()
    state, outputs = None, []
    with torch.no_grad():
        whole = mixer(x, None)[0]
        for piece in x.split(pieces, 1):
            output, state = mixer(piece, state)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", MIXERS)
def test_gradients_cross_pieces_through_the_state(variant: str) -> None:
    mixer, x = mixer_of(variant, torch.float64), inputs(torch.float64)
    parameters = list(mixer.parameters())
    whole = torch.autograd.grad(mixer(x, None)[0].square().sum(), parameters)
    first, state = mixer(x[:, :30], None)
    second, _ = mixer(x[:, 30:], state)
    pieces = torch.autograd.grad(first.square().sum() + second.square().sum(), parameters)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variant", MIXERS)
def test_every_parameter_learns(variant: str) -> None:
    mixer = mixer_of(variant)
    mixer(inputs(), None)[0].square().sum().backward()
    silent = [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("backend", ["oracle", "chunked"])
@pytest.mark.parametrize("variant", WITH_MEMORY)
def test_backends_compute_the_same_function(variant: str, backend: str) -> None:
    x = inputs(torch.float64)
    ours = mixer_of(variant, torch.float64, memory_backend=backend, attention_backend="dense")(x, None)[0]
    expected = mixer_of(variant, torch.float64)(x, None)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", MIXERS)
def test_state_is_constant_size(variant: str) -> None:
    mixer, x = mixer_of(variant), inputs()
    sizes = []
    with torch.no_grad():
        state: TensorTree | None = None
        for _ in range(6):
            _, state = mixer(x[:, :32], state)
            sizes.append(held_bytes(state))
    assert sizes[1:] == sizes[1:2] * 5


def held_bytes(state: TensorTree) -> int:
    total = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    state.map(count)
    return total


ABLATIONS = [
    {"memory_heads": 3},
    {"persistent_tokens": 0},
    {"conv_kernel": 1},
    {"gate_convolution": True},
    {"memory_network": "plain"},
    {"memory_depth": 1},
    {"memory_depth": 3},
    {"memory_gates": "shared"},
    {"memory_alpha": "channel"},
    {"memory_momentum": False},
    {"memory_forgetting": False},
    {"memory_gates": "shared", "memory_momentum": False, "memory_forgetting": False},
]


@pytest.mark.parametrize(("variant", "settings"), by_kind(ABLATIONS, WITH_MEMORY))
def test_ablations_run_and_stay_causal_in_pieces(variant: str, settings: dict[str, object]) -> None:
    mixer, x = mixer_of(variant, **settings), inputs()
    mixer(x, None)[0].square().sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())] == []
    with torch.no_grad():
        whole = mixer(x, None)[0]
        first, state = mixer(x[:, :21], None)
        second, _ = mixer(x[:, 21:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, 300)])
def test_convolution_in_float32_is_that_in_float64(batch: int, length: int) -> None:
    """The former is oneDNN's on a CPU, the latter a sum over taps; with first and second gradients."""
    generator = torch.Generator().manual_seed(2)
    shapes = (batch, length, 3, 70), (batch, 3, 3, 64), (3, 64, 4)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        x, tail, kernel = leaves = [tensor.to(dtype).requires_grad_() for tensor in drawn]
        out, after = causal_conv(x[..., :64], tail, kernel)
        first = torch.autograd.grad(out.sin().sum() + after.cos().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.sin().sum() for gradient in first), leaves)
        return [out, after, *first, *second]

    for ours, wide in zip(run(torch.float32), run(torch.float64), strict=True):
        assert (ours.double() - wide).detach().abs().max() < 2e-5 * wide.detach().abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norms_have_the_gradients_of_their_formulas(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, gradient = (torch.randn(shape, generator=generator) for shape in ((2, 5, 3, 8), (3, 8), (2, 5, 3, 8)))
    x[0, :2, 0] = torch.tensor([[0.0], [1e-8]])  # nothing, and less than the least norm
    wide = torch.promote_types(dtype, torch.float32)

    def by_root(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.to(wide), (8,), eps=1e-5).to(x.dtype) * weight

    def by_length(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.silu(x).to(wide), dim=-1, eps=1e-6).to(x.dtype) * weight

    pairs = (lambda x, w: rms_norm(x, w, 1e-5), by_root), (lambda x, w: unit_silu(x) * w, by_length)
    for ours, formula in pairs:
        found = []
        for function in (ours, formula):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
            out = function(*leaves)
            found.append([out, *torch.autograd.grad(out, leaves, gradient.to(dtype))])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=1e-12)


def test_persistent_tokens_keep_their_weight_however_far_a_query_stands() -> None:
    """Two equal windows of tokens, far apart: the same attention output, since the prefix has no position."""
    mixer = mixer_of("mag").attention
    x = inputs()[:1]
    prefix = torch.randn(1, 5, 24)
    with torch.no_grad():
        _, state = mixer(x[:, :20], mixer.begin(1, prefix))
        near, _ = mixer(x[:, 20:40], state)
        for _ in range(10):
            _, state = mixer(x[:, :20], state)
        far, _ = mixer(x[:, 20:40], state)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)


def test_recalled_memory_of_a_mac_token_comes_from_the_segment_before() -> None:
    """Within a segment recall reads a memory that stands still, across the border it has moved on."""
    mixer, x = mixer_of("mac"), inputs()
    with torch.no_grad():
        _, inside = mixer(x[:, :15], None)
        _, border = mixer(x[:, :16], None)
    start = list(mixer.memory.initial_weights)
    assert torch.equal(inside.recall.weights[0][0], start[0])
    assert not torch.equal(border.recall.weights[0][0], start[0])
    assert torch.equal(border.recall.weights[0], border.written.memory.weights[0])
