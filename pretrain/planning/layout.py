"""How many processes share what, refused where a run would refuse it."""

from dataclasses import dataclass, replace

import torch

from pretrain.config import RunConfig
from pretrain.engine import resolve_precision
from titans_mcore.parallel import transformer_config


@dataclass(frozen=True)
class Layout:
    """The processes of a run.

    Attributes:
        gpus: All of them, one process each.
        tensor: Ranks that share one copy of the model.
        data: Ranks, or groups of `tensor` ranks, that see different samples.
        zero_stage: What the data ranks share, 0 to 3.
        dtype: Type of the weights in forward and backward.
        micro_batches: Micro-batches n of each data rank in one step.
    """

    gpus: int
    tensor: int
    data: int
    zero_stage: int
    dtype: torch.dtype
    micro_batches: int

    @property
    def precision(self) -> str:
        """bf16 or fp32."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def bytes_per_weight(self) -> int:
        """Bytes w of a weight, an activation or a gradient as the backward pass makes it."""
        return self.dtype.itemsize


def for_gpus(config: RunConfig) -> RunConfig:
    """The settings as they are resolved where there are GPUs, whatever machine plans."""
    if config.train.precision != "auto":
        return config
    return replace(config, train=replace(config.train, precision="bf16"))


def layout_of(config: RunConfig, gpus: int) -> Layout:
    """The layout of a run on so many processes.

    Args:
        config: From `for_gpus`.
        gpus: Processes.

    Raises:
        ValueError: A run with these settings would not start; the message is the run's.
    """
    tensor = config.parallel.tensor
    transformer_config(config.model, tensor_parallel=tensor)
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}; it must be at least 1")
    if gpus % tensor:
        raise ValueError(
            f"{gpus} process{'es' if gpus > 1 else ''} cannot be divided into tensor-parallel groups of {tensor}; "
            f"start a multiple of {tensor} processes or change the tensor-parallel size"
        )
    data = gpus // tensor
    dtype = resolve_precision(config)
    return Layout(gpus, tensor, data, config.parallel.zero_stage, dtype, config.accumulation(data))
