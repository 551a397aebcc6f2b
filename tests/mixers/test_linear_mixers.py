"""RetNet, Mamba, Mamba2, DeltaNet, Gated DeltaNet and TTT are the published layers: functions, sizes, beginnings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.linear.naive import ttt_scan_naive
from titans_mcore.attention import rotate
from titans_mcore.config import TitansConfig
from titans_mcore.division import check_divisible
from titans_mcore.mixers import MIXERS
from titans_mcore.mixers.linear import LinearSpec
from titans_mcore.mixers.parts import Parts

from .test_mixers import LENGTH, inputs, mixer_of

LINEAR = [name for name, mixer in MIXERS.items() if isinstance(mixer, LinearSpec)]
HEADS = 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def mixer_to_compare(variant: str) -> Any:
    """A mixer with a weight of every kind that says something."""
    mixer = mixer_of(variant, linear_heads=HEADS)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return mixer


def by_head(weight: Tensor, *widths: int) -> list[Tensor]:
    """What stands in a column map head by head, (H * sum(widths), E), as maps of all heads, (H * width, E) each."""
    return [part.flatten(0, 1) for part in weight.unflatten(0, (HEADS, -1)).split(list(widths), 1)]


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """With all of their weights as given, and not for want of an answer."""
    assert state.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(state)
    found = ours(inputs(), None)[0]
    assert found.std() > 0.1
    torch.testing.assert_close(found, theirs(inputs()), **CLOSE)


@torch.no_grad()
def test_mamba2_is_that_of_transformers() -> None:
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = mamba2.Mamba2Config(
        hidden_size=24, num_heads=HEADS, head_dim=16, expand=2, state_size=128, n_groups=1, chunk_size=16, vocab_size=8
    )
    ours, theirs = mixer_to_compare("mamba2"), mamba2.Mamba2Mixer(config, 0)
    z, u, dt = by_head(ours.projection.weight, 16, 16, 1)
    convolution = [torch.cat(pair) for pair in zip(*[
        [ours.kernel.flatten(0, 1), ours.bias.flatten()],
        [ours.shared_kernel[0], ours.shared_bias[0]],
    ], strict=True)]  # fmt: skip
    state = {
        "in_proj.weight": torch.cat([z, u, ours.shared.weight, dt]),
        "conv1d.weight": convolution[0].unsqueeze(1),
        "conv1d.bias": convolution[1],
        "norm.weight": ours.output_norm.flatten(),
        "out_proj.weight": ours.output.weight,
        **{name: ours.get_parameter(name) for name in ("A_log", "D", "dt_bias")},
    }
    assert_same(ours, theirs, state)


@torch.no_grad()
def test_mamba_is_that_of_transformers() -> None:
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(hidden_size=24, state_size=16, expand=2, time_step_rank=2, vocab_size=8)
    ours, theirs = mixer_to_compare("mamba"), mamba.MambaMixer(config, 0)
    u, z = ours.projection.weight.unflatten(0, (-1, 2)).unbind(1)
    state = {
        "in_proj.weight": torch.cat([u, z]),
        "conv1d.weight": ours.kernel,
        "conv1d.bias": ours.bias[:, 0],
        "x_proj.weight": ours.selection.weight,
        "dt_proj.weight": ours.steps.weight,
        "dt_proj.bias": ours.steps.bias,
        "out_proj.weight": ours.output.weight,
        "A_log": ours.A_log,
        "D": ours.D,
    }
    assert_same(ours, theirs, state)


@torch.no_grad()
def test_gated_deltanet_is_that_of_transformers() -> None:
    olmo = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    config = olmo.OlmoHybridConfig(
        hidden_size=24,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=6,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=4,
        linear_allow_neg_eigval=False,
        vocab_size=8,
        num_hidden_layers=2,
        pad_token_id=None,
        layer_types=["linear_attention", "full_attention"],
    )
    ours, theirs = mixer_to_compare("gated_deltanet"), olmo.OlmoHybridGatedDeltaNet(config, 0)
    ours.output_norm.copy_(ours.output_norm[:1].expand_as(ours.output_norm))  # theirs is one for all heads
    names = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
    maps = by_head(ours.projection.weight, 6, 6, 12, 12, 1, 1)
    q, k, v = (part.flatten(0, 1) for part in ours.kernel.split([6, 6, 12], 1))
    state = {
        **{f"{name}.weight": each for name, each in zip(names, maps, strict=True)},
        "conv1d.weight": torch.cat([q, k, v]).unsqueeze(1),
        "o_norm.weight": ours.output_norm[0],
        "o_proj.weight": ours.output.weight,
        "A_log": ours.A_log,
        "dt_bias": ours.dt_bias,
    }
    assert_same(ours, theirs, state)


@torch.no_grad()
def test_retnet_is_attention_with_decays_in_place_of_the_softmax() -> None:
    """The paper's parallel form, equation 5: (Q K^T * D) V with D_tj = gamma^(t - j)."""
    mixer = mixer_to_compare("retnet").double()
    x = inputs(torch.float64)
    q, k, v, gate = (
        (x @ weight.T).unflatten(-1, (HEADS, -1)) for weight in by_head(mixer.projection.weight, 8, 8, 16, 16)
    )
    q, k = rotate(q, 0, 10_000.0), rotate(k, 0, 10_000.0)
    token = torch.arange(LENGTH)
    between = (token[:, None] - token).clamp_min(0)
    gammas = 1.0 - torch.tensor([2.0**-5, 2.0**-6, 2.0**-7], dtype=torch.float64)
    decay = (gammas[:, None, None] ** between).tril()
    read = torch.einsum("bthk,bjhk,htj,bjhv->bthv", q, k, decay, v) / math.sqrt(8)
    normed = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.output_norm
    expected = (normed * nn.functional.silu(gate)).flatten(2) @ mixer.output.weight.T
    torch.testing.assert_close(mixer(x, None)[0], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", ["ttt_linear", "ttt_mlp"])
@torch.no_grad()
def test_ttt_is_its_rule_in_the_papers_backbone(variant: str) -> None:
    """The released code's layer, written out around the oracle, with the residual convolution in front of the norm."""
    mixer = mixer_to_compare(variant).mixer.double()
    x = inputs(torch.float64)

    def convolved(given: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """A causal convolution of (B, T, C) by channel."""
        padded = nn.functional.pad(given.mT, (3, 0))
        return nn.functional.conv1d(padded, kernel.flatten(0, 1).unsqueeze(1), bias.flatten(), groups=24).mT

    front = mixer.front
    normed = nn.functional.rms_norm(x, (24,), front.norm, 1e-5)
    expected_front = x + convolved(normed, front.kernel, front.bias)
    found_front, state = front(x, None)
    torch.testing.assert_close(found_front, expected_front, rtol=1e-9, atol=1e-10)

    shared, v, gate, rate = (x @ weight.T for weight in by_head(mixer.projection.weight, 8, 8, 8, 1))
    q = convolved(shared, mixer.query_kernel, mixer.query_bias)
    k = convolved(shared, mixer.key_kernel, mixer.key_bias)
    base = {"ttt_linear": 1.0, "ttt_mlp": 0.1}[variant]
    read, _ = ttt_scan_naive(
        *(each.unflatten(-1, (HEADS, 8)) for each in (q, k, v)),
        base / 8 * torch.sigmoid(rate + mixer.rate_bias),
        (1.0 / torch.arange(1, 17, dtype=torch.float64) + mixer.places).clamp_min(0.0),
        mixer.norm_weight,
        mixer.norm_bias,
        list(mixer.initial_weights),
        rope_base=10_000.0,
    )
    scale, shift = mixer.output_norm.flatten(), mixer.output_bias.flatten()
    answer = nn.functional.layer_norm(read.flatten(2), (24,), scale, shift, 1e-6)
    answer = answer * nn.functional.gelu(gate, approximate="tanh")
    expected = answer @ mixer.output.weight.T
    torch.testing.assert_close(mixer(x, state)[0], expected, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_ttt_begins_as_published() -> None:
    torch.manual_seed(0)
    config = TitansConfig(variant="ttt_mlp", dim=1024)
    mixer: Any = MIXERS["ttt_mlp"].module(config, Parts(config))
    matrices, biases = list(mixer.initial_weights)[::2], list(mixer.initial_weights)[1::2]
    assert [x.std().item() for x in matrices] == pytest.approx([0.02, 0.02], rel=0.02)
    zeros = [*biases, mixer.norm_bias, mixer.output_bias, mixer.rate_bias, mixer.places]
    assert not any(bool(x.any()) for x in zeros)
    assert all(bool((x == 1.0).all()) for x in (mixer.norm_weight, mixer.output_norm, mixer.front.norm))


@torch.no_grad()
def test_retnets_positions_keep_their_precision_far_into_a_text() -> None:
    """A state turned on by 64 pieces of 2^18 tokens, and back by 2^24 at once, which float32 hardly counts, stays."""
    mixer, x = mixer_of("retnet"), inputs()[:, :20]
    _, state = mixer(x, None)
    near, _ = mixer(x, state)
    turned = state
    for _ in range(2**6):
        turned = type(state)(mixer._turned(turned.matrix, torch.full((2,), -(2**18))))
    back = type(state)(mixer._turned(turned.matrix, torch.full((2,), 2**24)))
    torch.testing.assert_close(mixer(x, back)[0], near, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixer(x, turned)[0], near, rtol=1e-2, atol=1e-2)


PUBLISHED = {
    "mamba": [(1536, 16, 1), (2048, 16, 1), (3072, 16, 1), (4096, 16, 1)],
    "retnet": [(3, 256, 512), (4, 256, 512), (6, 256, 512), (8, 256, 512)],
    "mamba2": [(24, 128, 64), (32, 128, 64), (48, 128, 64), (64, 128, 64)],
    "deltanet": [(6, 128, 128), (8, 128, 128), (12, 128, 128), (16, 128, 128)],
    "gated_deltanet": [(6, 96, 192), (6, 128, 256), (9, 128, 256), (12, 128, 256)],
    "ttt_linear": [(12, 64, 64), (16, 64, 64), (24, 64, 64), (32, 64, 64)],
    "ttt_mlp": [(12, 64, 64), (16, 64, 64), (24, 64, 64), (32, 64, 64)],
}
SQUARES = {"retnet": 8.0, "mamba": 6.3, "mamba2": 6.2, "deltanet": 4.0, "gated_deltanet": 6.0}  # parameters over E^2
SQUARES |= {"ttt_linear": 4.0, "ttt_mlp": 4.0}
CHANNELS = {"ttt_linear": 64.0, "ttt_mlp": 8 * 64.0}  # over E: the weights that a sequence begins with


@pytest.mark.parametrize("variant", LINEAR)
def test_heads_and_parameters_are_as_many_as_published(variant: str) -> None:
    mixer = MIXERS[variant]
    assert isinstance(mixer, LinearSpec)
    for dim, shape in zip((768, 1024, 1536, 2048), PUBLISHED[variant], strict=True):
        config = TitansConfig(variant=variant, dim=dim)
        assert mixer.shape(config) == shape
        with torch.device("meta"):
            made = mixer.module(config, Parts(config))
        numbers = sum(p.numel() for p in made.parameters())
        assert numbers == pytest.approx(SQUARES[variant] * dim**2 + CHANNELS.get(variant, 0.0) * dim, rel=0.03)


@pytest.mark.parametrize("variant", ["mamba", "mamba2", "gated_deltanet"])
@torch.no_grad()
def test_time_steps_and_rates_begin_as_published(variant: str) -> None:
    torch.manual_seed(0)
    config = TitansConfig(variant=variant, dim=1024, linear_heads=256)
    mixer = MIXERS[variant].module(config, Parts(config))
    steps = nn.functional.softplus(mixer.get_parameter("steps.bias" if variant == "mamba" else "dt_bias"))
    assert (1e-3 * 0.999 < steps.min() < 1.2e-3, 0.08 < steps.max() < 1e-1 * 1.001) == (True, True)
    assert steps.log().mean() == pytest.approx(math.log(1e-2), abs=0.2)  # the middle of both ends' logarithms
    if variant == "mamba":
        weight = mixer.get_parameter("steps.weight")
        assert 0.99 * 64**-0.5 < weight.abs().max() <= 64**-0.5
    rates = mixer.get_parameter("A_log").exp()
    low = {"gated_deltanet": 0.01}.get(variant, 1.0)
    assert (low * 0.999 <= rates.min() < low + 0.5, 15.5 < rates.max() <= 16.001) == (True, True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"variant": "deltanet", "dim": 96, "linear_heads": 5},
            "linear_heads is 5, and deltanet has 96 channels of keys",
        ),
        (
            {"variant": "gated_deltanet", "dim": 96, "linear_heads": 7},
            "linear_heads is 7, and gated_deltanet has 72 channels of keys at dim 96, which 7 does not divide",
        ),
        ({"variant": "mamba2", "dim": 96, "linear_heads": 5}, "mamba2 has 192 channels of values"),
        ({"variant": "retnet", "dim": 96, "linear_heads": 32}, "retnet's heads are 3 wide at dim 96; rotary positions"),
        ({"variant": "ttt_mlp", "dim": 96, "linear_heads": 32}, "ttt_mlp's heads are 3 wide at dim 96; rotary"),
        ({"variant": "retnet", "linear_heads": -1}, "linear_heads is -1; it must be 0 or more"),
    ],
)
def test_heads_that_do_not_fit_are_refused_in_a_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TitansConfig(**{"num_heads": 8, **settings})


def test_heads_that_ranks_cannot_share_are_refused_in_a_sentence() -> None:
    config = TitansConfig(variant="mamba2+retnet", dim=768, num_heads=16)
    check_divisible(config, 1)
    with pytest.raises(ValueError, match="linear_heads 3 cannot be divided by tensor parallel size 2; choose"):
        check_divisible(config, 2)
