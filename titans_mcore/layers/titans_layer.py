"""One block: x += Mixer(RMSNorm(x)); x += SwiGLU(RMSNorm(x)); some mixers add something before."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ..config import TitansConfig
from ..memory import PackedRows
from ..mixers.parts import rms_norm
from .parts import MegatronParts, MixerSubmodules


@dataclass
class TitansLayerSubmodules:
    """Parts of a block, each a ModuleSpec or a class."""

    input_norm: ModuleSpec | type
    mixer: MixerSubmodules
    pre_mlp_norm: ModuleSpec | type
    mlp: ModuleSpec | type


class TitansLayer(MegatronModule):
    """A block, with Megatron's layout outside: hidden states are (T', B, E).

    T' are all tokens T, or T / TP of them under sequence parallelism.

    Args:
        config: Megatron's configuration.
        submodules: Parts of the block.
        titans_config: The model's settings, which choose the mixer.
        pg_collection: Megatron's process groups.
        block: Which block of the model it is.
        memory_parallel: What tensor-parallel ranks share of the memory, "heads" or "hidden".
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TitansLayerSubmodules,
        titans_config: TitansConfig,
        pg_collection: ProcessGroupCollection,
        block: int = 0,
        memory_parallel: str = "heads",
    ) -> None:
        super().__init__(config=config)
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.input_norm = build_module(submodules.input_norm, config=config, hidden_size=size, eps=eps)
        parts = MegatronParts(config, submodules.mixer, titans_config, pg_collection, memory_parallel)
        spec = titans_config.blocks[block]
        self.mixer, self.fronted = spec.module(titans_config, parts), spec.front
        self.pre_mlp_norm = build_module(submodules.pre_mlp_norm, config=config, hidden_size=size, eps=eps)
        self.mlp = build_module(submodules.mlp, config=config, tp_group=pg_collection.tp)

    def forward(self, hidden_states: Tensor, state: Any = None, rows: PackedRows | None = None) -> tuple[Tensor, Any]:
        """Hidden states (T', B, E) and the mixer's state after them.

        Args:
            hidden_states: The piece.
            state: What an earlier piece returned; None begins the sequences.
            rows: Documents and padding of the whole piece, T tokens.
        """
        if self.fronted:
            added, state = self.mixer.get_submodule("front")(hidden_states.transpose(0, 1), state, rows)
            hidden_states = added.transpose(0, 1)
        mixed, state = self.mixer(self.input_norm(hidden_states).transpose(0, 1), state, rows)
        hidden_states = hidden_states + mixed.transpose(0, 1)
        output, _ = self.mlp(self.pre_mlp_norm(hidden_states))
        return hidden_states + output, state


class RMSNorm(nn.Module):
    """RMSNorm over the last axis.

    Args:
        config: Megatron's configuration.
        hidden_size: Width of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # It may see a share of the tokens only: its gradient is then a part too (parallel.sequence).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x normalised, same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def titans_layer_spec(config: TitansConfig, block: int = 0, memory_parallel: str = "heads") -> ModuleSpec:
    """Spec of one block; build it with Megatron's configuration and process groups.

    Args:
        config: The model's settings.
        block: Which one, from 0.
        memory_parallel: What tensor-parallel ranks share of the memory, "heads" or "hidden".
    """
    return ModuleSpec(
        module=TitansLayer,
        params={"titans_config": config, "block": block, "memory_parallel": memory_parallel},
        submodules=TitansLayerSubmodules(
            input_norm=RMSNorm,
            mixer=MixerSubmodules(column=ColumnParallelLinear, row=RowParallelLinear),
            pre_mlp_norm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                params={"ffn_hidden_size": config.ffn_dim},
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
        ),
    )
