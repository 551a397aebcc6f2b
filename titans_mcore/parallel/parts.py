"""Mixers' parameters as Megatron-core keeps them, split over tensor-parallel ranks."""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ..config import TitansConfig
from ..memory import WHOLE, WholeMatrices
from ..mixers.parts import MemoryParts, Parts, fits_onednn, linear, product
from .memory_shard import TPShard, split_axis


class _LocalProduct:
    """Megatron's linear map, by mixers.parts.product on a CPU where nothing is sent along with it."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **settings: Any) -> Tensor:
        sends = settings["sequence_parallel"] or settings["allreduce_dgrad"]
        if not sends and settings["bias"] is None and fits_onednn(input, weight):
            return product(input, weight)
        return super()._forward_impl(input, weight, *args, **settings)  # type: ignore[misc]


class ColumnLinear(_LocalProduct, tensor_parallel.ColumnParallelLinear):
    """Splits its output over ranks."""


class RowLinear(_LocalProduct, tensor_parallel.RowParallelLinear):
    """Splits its input over ranks."""


@dataclass
class MixerSubmodules:
    """What a mixer's linear maps are made of.

    Attributes:
        column: Splits its output over ranks, a ColumnLinear.
        row: Splits its input over ranks, a RowLinear.
    """

    column: ModuleSpec | type
    row: ModuleSpec | type


class OwnedHeads(MemoryParts):
    """mixers.parts.MemoryParts on Megatron-core: a tensor-parallel rank owns H / TP heads whole.

    Args:
        config: Megatron's configuration.
        submodules: The linear maps' classes.
        heads: H of the whole model.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MixerSubmodules, heads: int, pg_collection: ProcessGroupCollection
    ) -> None:
        self.config, self.submodules, self.group = config, submodules, pg_collection.tp
        # Behind gather_from_sp_region() a mixer's tokens are whole, also under sequence parallelism.
        self.inner_config = copy.copy(config)
        self.inner_config.sequence_parallel = False
        self.ranks, self.rank = self.group.size(), self.group.rank()
        self.all_heads, self.heads = heads, heads // self.ranks
        self.shard: WholeMatrices = WHOLE

    def column(self, d_in: int, *per_head: int) -> nn.Module:
        """See mixers.parts.MemoryParts."""
        module = build_module(
            self.submodules.column,
            d_in,
            self.all_heads * sum(per_head),
            config=self.inner_config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            disable_grad_reduce=True,  # copy_to_tp_region() reduces once for all maps of one input
            tp_group=self.group,
        )
        module.weight.rows_per_head = per_head  # what an optimizer of whole matrices takes for one
        return module

    def per_head(self, full: Tensor) -> nn.Parameter:
        """See mixers.parts.MemoryParts."""
        return _part(self.config, full, 0, self.rank, self.ranks)


class MegatronParts(OwnedHeads, Parts):
    """mixers.parts.Parts on Megatron-core: a tensor-parallel rank owns its part of the attention's heads whole.

    Args:
        config: Megatron's configuration.
        submodules: The linear maps' classes.
        titans_config: The model's settings.
        pg_collection: Megatron's process groups.
        memory_parallel: What ranks share of the memory, "heads" or "hidden".
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerSubmodules,
        titans_config: TitansConfig,
        pg_collection: ProcessGroupCollection,
        memory_parallel: str = "heads",
    ) -> None:
        super().__init__(config, submodules, titans_config.num_heads, pg_collection)
        heads = titans_config.memory_shape.heads
        self.memory: MemoryParts
        if memory_parallel == "hidden" and self.ranks > 1:
            self.memory = HiddenParts(config, heads, pg_collection)
        else:
            self.memory = OwnedHeads(config, submodules, heads, pg_collection)

    def with_heads(self, heads: int) -> Self:
        """See mixers.parts.Parts."""
        parts = copy.copy(self)
        parts.all_heads, parts.heads = heads, heads // self.ranks
        return parts

    def whole(self, d_in: int, d_out: int) -> nn.Module:
        """See mixers.parts.Parts."""
        return WholeLinear(self.config, d_in, d_out, self.ranks)

    def row(self, d_in: int, d_out: int, *, residual: bool = True) -> nn.Module:
        """See mixers.parts.Parts."""
        return self._row(d_in, d_out, self.inner_config, residual)

    def last_row(self, d_in: int, d_out: int) -> nn.Module:
        """See mixers.parts.Parts."""
        return self._row(d_in, d_out, self.config)

    def _row(self, d_in: int, d_out: int, config: TransformerConfig, residual: bool = True) -> nn.Module:
        return build_module(
            self.submodules.row,
            d_in,
            d_out,
            config=config,
            init_method=self.config.output_layer_init_method if residual else self.config.init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=self.group,
        )

    def gather_from_sp_region(self, x: Tensor, *, tensor_parallel_output_grad: bool = True) -> Tensor:
        """See mixers.parts.Parts."""
        if not self.config.sequence_parallel:
            return self.copy_to_tp_region(x) if tensor_parallel_output_grad else x
        share = x.transpose(0, 1).contiguous()
        whole = tensor_parallel.gather_from_sequence_parallel_region(share, tensor_parallel_output_grad, self.group)
        return whole.transpose(0, 1)

    def copy_to_tp_region(self, x: Tensor) -> Tensor:
        """See mixers.parts.Parts."""
        return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.group)

    def finish(self, row: nn.Module, x: Tensor) -> Tensor:
        """See mixers.parts.Parts."""
        if not self.config.sequence_parallel:
            return linear(row, x)
        return linear(row, x.transpose(0, 1).contiguous()).transpose(0, 1)  # Megatron scatters along the first axis

    def scatter_to_sp_region(self, x: Tensor) -> Tensor:
        """See mixers.parts.Parts."""
        if not self.config.sequence_parallel:
            return x
        return tensor_parallel.scatter_to_sequence_parallel_region(x.transpose(0, 1), group=self.group).transpose(0, 1)

    def replicated(self, full: Tensor) -> nn.Parameter:
        """See mixers.parts.Parts."""
        return _whole(self.config, full)

    def own(self, full: Tensor) -> Tensor:
        """See mixers.parts.Parts."""
        return full.chunk(self.ranks)[self.rank]

    def sum_over_tp_region(self, x: Tensor) -> Tensor:
        """See mixers.parts.Parts."""
        return self.copy_to_tp_region(tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=self.group))


class HiddenParts(MemoryParts):
    """mixers.parts.MemoryParts of memories that all tensor-parallel ranks hold together.

    Every rank knows the queries, keys, values and gates of all heads, from maps that it holds whole, and a part of
    every head's matrices.

    Args:
        config: Megatron's configuration.
        heads: H of the whole model.
        pg_collection: Megatron's process groups.
    """

    def __init__(self, config: TransformerConfig, heads: int, pg_collection: ProcessGroupCollection) -> None:
        self.config, self.heads, self.group = config, heads, pg_collection.tp
        self.shard: WholeMatrices = TPShard(self.group.rank(), self.group.size(), self._add)

    def column(self, d_in: int, *per_head: int) -> nn.Module:
        """See mixers.parts.MemoryParts."""
        return WholeLinear(self.config, d_in, self.heads * sum(per_head), self.group.size())

    def per_head(self, full: Tensor) -> nn.Parameter:
        """See mixers.parts.MemoryParts; every rank computes all heads."""
        return _whole(self.config, full)

    def matrix(self, full: Tensor, layer: int, depth: int) -> nn.Parameter:
        """See mixers.parts.MemoryParts."""
        return _part(self.config, full, split_axis(layer, depth), self.group.rank(), self.group.size())

    def merge_heads(self, x: Tensor) -> Tensor:
        """See mixers.parts.MemoryParts."""
        return tensor_parallel.scatter_to_tensor_model_parallel_region(x.flatten(2), group=self.group)

    def _add(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x


class WholeLinear(nn.Module):
    """A linear map that every tensor-parallel rank holds whole and applies to all tokens.

    What arrives at its output is the whole gradient on every rank. At its input it goes on as one share of as many:
    Parts.gather_from_sp_region() and copy_to_tp_region() add them up, together with those of the split maps beside it.

    Args:
        config: Megatron's configuration.
        d_in: Width of the input.
        d_out: Width of the output.
        ranks: Tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, d_in: int, d_out: int, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        weight = torch.empty(d_out, d_in)  # float32 on the CPU and then cast, like Megatron's split maps
        config.init_method(weight)
        self.weight = nn.Parameter(weight.to(device=_device(config), dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        return product(_SharedGradient.apply(x, self.ranks), self.weight)


class _SharedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


def _device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


def _whole(config: TransformerConfig, full: Tensor) -> nn.Parameter:
    """A parameter that every rank holds whole."""
    parameter = nn.Parameter(full.clone().to(device=_device(config), dtype=config.params_dtype))
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def _part(config: TransformerConfig, full: Tensor, axis: int, rank: int, ranks: int) -> nn.Parameter:
    """A rank's part of a parameter that is cut along an axis."""
    parameter = _whole(config, full.chunk(ranks, axis)[rank])
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=axis, stride=1)
    return parameter
