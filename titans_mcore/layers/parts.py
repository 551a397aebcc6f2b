"""Mixers' parameters as Megatron-core keeps them: linears split by heads over tensor-parallel ranks."""

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


@dataclass
class MixerSubmodules:
    """What a mixer's linear maps are made of.

    Attributes:
        column: Splits its output over ranks, Megatron's ColumnParallelLinear.
        row: Splits its input over ranks, Megatron's RowParallelLinear.
    """

    column: ModuleSpec | type
    row: ModuleSpec | type


class MegatronParts:
    """mixers.parts.Parts on Megatron-core: a tensor-parallel rank owns H / TP heads whole.

    Args:
        config: Megatron's configuration; its num_attention_heads is H.
        submodules: The linear maps' classes.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MixerSubmodules, pg_collection: ProcessGroupCollection
    ) -> None:
        self.config, self.submodules, self.group = config, submodules, pg_collection.tp
        self.ranks, self.rank = self.group.size(), self.group.rank()
        self.heads = config.num_attention_heads // self.ranks

    def column(self, d_in: int, per_head: int) -> nn.Module:
        """See mixers.parts.Parts."""
        return build_module(
            self.submodules.column,
            d_in,
            self.config.num_attention_heads * per_head,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            disable_grad_reduce=True,  # enter() reduces once for all maps of one input
            tp_group=self.group,
        )

    def row(self, per_head: int, d_out: int) -> nn.Module:
        """See mixers.parts.Parts."""
        return build_module(
            self.submodules.row,
            self.config.num_attention_heads * per_head,
            d_out,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=self.group,
        )

    def enter(self, x: Tensor) -> Tensor:
        """See mixers.parts.Parts."""
        return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.group)

    def per_head(self, full: Tensor) -> nn.Parameter:
        """See mixers.parts.Parts."""
        own = full[self.rank * self.heads : (self.rank + 1) * self.heads]
        parameter = self.replicated(own)
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def replicated(self, full: Tensor) -> nn.Parameter:
        """See mixers.parts.Parts."""
        device = torch.device("cpu") if self.config.use_cpu_initialization else torch.cuda.current_device()
        parameter = nn.Parameter(full.clone().to(device=device, dtype=self.config.params_dtype))
        parameter.no_weight_decay = True  # type: ignore[attr-defined]
        return parameter
