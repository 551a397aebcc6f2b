"""From the model's settings to the TransformerConfig that Megatron-core's layers read."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.division import check_divisible


def transformer_config(
    config: TitansConfig,
    *,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    memory_parallel: str = "auto",
    dtype: torch.dtype = torch.float32,
    draw_on: torch.device | None = None,
) -> TransformerConfig:
    """Megatron's view of a Titans model.

    Weights are initialised whole, and then cut on the CPU: they are the same function of the seed at every
    tensor-parallel size. Matrices that write to the residual stream start smaller by sqrt(2 * num_layers).

    Args:
        config: The model.
        tensor_parallel: Ranks that share the model.
        sequence_parallel: Whether they share the tokens between the blocks' parallel parts too.
        memory_parallel: What they share of the memory, "auto", "heads" or "hidden".
        dtype: Type of the parameters when they are built.
        draw_on: Where the numbers of large matrices are drawn; None is the CPU's default generator, at 10 ns a number
            and core. Each kind of device draws its own.

    Raises:
        ValueError: Heads, memory, feed-forward width or vocabulary cannot be divided by `tensor_parallel`.
    """
    check_divisible(config, tensor_parallel, memory_parallel)
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.dim,
        # Megatron wants whole heads on every rank; lmm's number means nothing.
        num_attention_heads=config.num_heads if config.num_heads % tensor_parallel == 0 else tensor_parallel,
        ffn_hidden_size=config.ffn_dim,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=config.init_std,
        init_method=partial(draw, std=config.init_std, device=draw_on),
        output_layer_init_method=partial(
            draw, std=config.init_std / math.sqrt(2.0 * config.num_layers), device=draw_on
        ),
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=sequence_parallel,
        # Megatron's fused kernels come from Apex or Transformer Engine, which we do not require.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],  # the default is a deprecated spelling of the same, with a warning
    )


def draw(weight: Tensor, *, std: float, device: torch.device | None = None) -> Tensor:
    """Fill a weight with N(0, std), in numbers of the default CPU generator or drawn on a device from a seed of its."""
    if device is None:
        return torch.nn.init.normal_(weight, std=std)
    generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
    with torch.no_grad():
        return weight.copy_(torch.empty_like(weight, device=device).normal_(std=std, generator=generator))
