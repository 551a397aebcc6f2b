"""ModuleSpecs of the blocks: what is built of what, without Transformer Engine or Apex."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from .config import TitansConfig
from .layers import MixerSubmodules, TitansLayer, TitansLayerSubmodules
from .layers.norm import RMSNorm


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
