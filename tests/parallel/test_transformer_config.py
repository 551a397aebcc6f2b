"""Megatron's configuration of a Titans model."""

import dataclasses

import pytest
import torch

from titans_mcore.config import TitansConfig
from titans_mcore.parallel import padded_vocab_size, transformer_config

SMALL = TitansConfig(num_layers=8, dim=64, num_heads=4, ffn_dim=96, vocab_size=1000, init_std=0.05)


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (32_000, 32_000), (2_048, 2_048)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert padded_vocab_size(vocab_size) == padded


@pytest.mark.parametrize(
    ("change", "tensor_parallel", "message"),
    [
        ({}, 8, "num_heads 4 cannot be divided by tensor parallel size 8"),
        ({"ffn_dim": 98, "memory_heads": 4}, 4, "ffn_dim 98 cannot be divided by tensor parallel size 4"),
        ({"num_heads": 3, "dim": 66, "ffn_dim": 96}, 3, "vocab_size 1000, padded 1024 cannot be divided"),
        ({}, 0, "tensor parallel size is 0"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_with_the_number(change, tensor_parallel, message):
    with pytest.raises(ValueError, match=message):
        transformer_config(dataclasses.replace(SMALL, **change), tensor_parallel=tensor_parallel)


def test_heads_of_memory_and_attention_are_divided_each():
    three = dataclasses.replace(SMALL, dim=48, memory_heads=3)
    with pytest.raises(ValueError, match="memory_heads 3 cannot be divided by tensor parallel size 2"):
        transformer_config(three, tensor_parallel=2, memory_parallel="heads")
    transformer_config(three, tensor_parallel=2)  # ranks share the matrices of each head
    memory_alone = dataclasses.replace(SMALL, variant="lmm", num_heads=5, memory_heads=4)
    assert transformer_config(memory_alone, tensor_parallel=4).num_attention_heads % 4 == 0


def test_matrices_that_write_to_the_residual_stream_start_smaller():
    torch.manual_seed(0)
    config = transformer_config(SMALL)
    inner, outer = torch.empty(400, 400), torch.empty(400, 400)
    config.init_method(inner)
    config.output_layer_init_method(outer)
    assert inner.std().item() == pytest.approx(0.05, rel=0.02)
    assert outer.std().item() == pytest.approx(0.05 / (2 * 8) ** 0.5, rel=0.02)


def test_numbers_drawn_on_a_device_are_a_function_of_the_seed():
    config = transformer_config(SMALL, draw_on=torch.device("cpu"))
    torch.manual_seed(0)
    drawn = [config.init_method(torch.empty(400, 400, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    torch.manual_seed(0)
    again = config.init_method(torch.empty(400, 400))
    assert torch.equal(drawn[0], again)
    assert not torch.equal(drawn[0].bfloat16(), drawn[1])  # every matrix has a seed of its own
    assert again.std().item() == pytest.approx(0.05, rel=0.02)


def test_megatron_sees_the_model_without_biases_or_fusions():
    config = transformer_config(SMALL, tensor_parallel=2, dtype=torch.bfloat16)
    assert (config.hidden_size, config.num_attention_heads, config.ffn_hidden_size) == (64, 4, 96)
    assert config.use_cpu_initialization
    assert config.gated_linear_unit
    assert not config.add_bias_linear
    assert config.params_dtype == torch.bfloat16
    assert config.tensor_model_parallel_size == 2
