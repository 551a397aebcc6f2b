"""Where memories begin: with memory_init "next_token" they recall untrained, and closed gates are closed."""

import pytest
import torch

from titans_mcore.config import TitansConfig
from titans_mcore.memory import memory_scan
from titans_mcore.mixers import neural_memory
from titans_mcore.mixers.linear import DeltaMixer, convolved
from titans_mcore.mixers.mac import MacMixer
from titans_mcore.mixers.neural_memory import NeuralMemory, initial_gate_bias
from titans_mcore.mixers.parts import Parts, heads_of

from .test_mixers import mixer_of


def memory_of(**settings: object) -> NeuralMemory:
    torch.manual_seed(0)
    plain = {"dim": 128, "memory_heads": 1, "memory_depth": 1, "memory_network": "plain", "chunk_size": 8}
    config = TitansConfig(**{**plain, "memory_init": "next_token", **settings})  # type: ignore[arg-type]
    return NeuralMemory(config, Parts(config)).double()


def queries_and_keys(memory: NeuralMemory, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query, _ = heads_of(memory.qg_proj(x), memory.heads).chunk(2, -1)
    return memory._queries(query, None, None, None)[0], memory._keys_values_gates(x, None, None, None)[0]


@pytest.mark.parametrize("taps", [2, 4, 7])
def test_the_key_of_a_token_is_the_query_of_the_token_before(taps: int) -> None:
    memory, x = memory_of(conv_kernel=taps), torch.randn(2, 30, 128, dtype=torch.float64)
    queries, keys = queries_and_keys(memory, x)
    torch.testing.assert_close(keys[:, 1:], queries[:, :-1], rtol=0, atol=1e-12)
    random_queries, random_keys = queries_and_keys(memory_of(conv_kernel=taps, memory_init="random"), x)
    assert (random_keys[:, 1:] - random_queries[:, :-1]).abs().max() > 0.1


def recalled(memory_init: str) -> float:
    """How often an untrained memory, at a token's second time, reads the value of what followed its first time."""
    memory, generator = memory_of(memory_init=memory_init), torch.Generator().manual_seed(3)
    words = torch.randn(12, 128, generator=generator, dtype=torch.float64)
    heard = words[torch.arange(24) % 12].unsqueeze(0)  # twice
    memory.output_norm.data.fill_(1.0)
    captured = {}

    def scanned(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *rest, **named):
        captured["values"] = values
        captured["reads"], state = memory_scan(queries, keys, values, *rest, **named)
        return captured["reads"], state

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(neural_memory, "memory_scan", scanned)
        memory(heard)
    reads, values = captured["reads"][0, 12:23], captured["values"][0, :12]
    # What all words have in common, behind a SiLU, says nothing of any of them.
    reads, values = reads - reads.mean(0), torch.nn.functional.normalize(values - values.mean(0), dim=-1)
    likeness = torch.einsum("thd,whd->htw", reads, values)
    return float((likeness.argmax(-1) == torch.arange(1, 12)).double().mean())


def test_an_untrained_memory_answers_a_token_with_what_followed_it_before() -> None:
    assert recalled("next_token") > 0.9
    assert recalled("random") < 0.5


def test_attention_of_mac_begins_with_keys_like_queries() -> None:
    mixer = mixer_of("mac", memory_init="next_token")
    assert isinstance(mixer, MacMixer)
    query, key_value = mixer.q_proj.weight.unflatten(0, (3, -1)), mixer.kv_proj.weight.unflatten(0, (3, -1))
    assert torch.equal(key_value[:, :8], query)
    assert not torch.equal(key_value[:, 8:], query)


@pytest.mark.parametrize("variant", ["deltanet", "gated_deltanet"])
def test_the_delta_rule_begins_with_the_key_of_a_token_as_the_query_of_the_one_before(variant: str) -> None:
    mixer, x = mixer_of(variant, memory_init="next_token"), torch.randn(2, 30, 8 * 3)
    assert isinstance(mixer, DeltaMixer)
    heads, width, values = mixer.shape
    tokens, _ = convolved(heads_of(mixer.projection(x), heads)[..., : 2 * width + values], None, mixer.kernel, None)
    queries, keys, _ = tokens.split([width, width, values], -1)
    torch.testing.assert_close(keys[:, 1:], queries[:, :-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["lmm", "gated_deltanet"])
def test_next_token_needs_a_convolution_that_sees_the_token_before(variant: str) -> None:
    with pytest.raises(ValueError, match=r"memory_init 'next_token' .* conv_kernel is 1; make it 2 or more"):
        TitansConfig(memory_init="next_token", conv_kernel=1, variant=variant)
    TitansConfig(memory_init="next_token", conv_kernel=1, variant="transformer")


def gates_of(memory: NeuralMemory, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    theta, _, alpha = memory._gates(memory._keys_values_gates(x, None, None, None)[2])
    assert isinstance(alpha, torch.Tensor)
    return theta, alpha


@pytest.mark.parametrize("margin", [0.05, 0.5])
def test_a_margin_leaves_the_gates_where_they_begin(margin: float) -> None:
    zero = torch.zeros(1, 5, 128, dtype=torch.float64)  # the biases alone
    for plain, widened in zip(gates_of(memory_of(), zero), gates_of(memory_of(gate_margin=margin), zero), strict=True):
        torch.testing.assert_close(widened, plain, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(initial_gate_bias(TitansConfig(gate_margin=margin))).all()


def test_behind_closed_gates_the_memory_stays_as_it_was_bit_for_bit() -> None:
    memory = memory_of(gate_margin=0.05, memory_momentum=False)
    x = torch.randn(2, 40, 128, dtype=torch.float64)
    with torch.no_grad():
        _, state = memory(x)
        memory.gate_bias.fill_(-12.0)
        _, after = memory(torch.randn(2, 400, 128, dtype=torch.float64), state)
    for before, now in zip(state.memory.weights, after.memory.weights, strict=True):
        assert before.abs().max() > 0
        assert torch.equal(before, now)
    plain = memory_of(memory_momentum=False)  # a sigmoid is never 0
    with torch.no_grad():
        _, state = plain(x)
        plain.gate_bias.fill_(-12.0)
        _, after = plain(torch.randn(2, 400, 128, dtype=torch.float64), state)
    assert not torch.equal(state.memory.weights[0], after.memory.weights[0])


@pytest.mark.parametrize("margin", [-0.1, 1.0])
def test_a_margin_out_of_range_is_one_sentence(margin: float) -> None:
    with pytest.raises(ValueError, match=r"gate_margin is .*; it must be 0 or more, and below 1"):
        TitansConfig(gate_margin=margin)
