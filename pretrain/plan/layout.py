"""How many processes share what, refused where a run would refuse it."""

from dataclasses import dataclass, replace

import torch

from pretrain.config.run_config import RunConfig
from pretrain.engine import megatron_config
from titans_mcore.mixers.costs import Workload
from titans_mcore.parallel import check_world, memory_split


@dataclass(frozen=True)
class Layout:
    """The processes of a run.

    Attributes:
        gpus: All of them, one process each.
        tensor: Ranks that share one copy of the model.
        data: Ranks, or groups of `tensor` x `context` ranks, that see different samples.
        zero_stage: What the data x context ranks share, 0 to 3.
        precision: Of the weights in forward and backward, "bf16" or "fp32".
        micro_batches: Micro-batches n of each data rank in one step.
        context: Ranks, or groups of `tensor` ranks, that share the tokens of a row.
        sequence: Whether tensor-parallel ranks share the tokens between the blocks' parallel parts.
        memory_parallel: What tensor-parallel ranks share of the memory, "heads" or "hidden".
        offload_optimizer: Whether masters and moments are on the host.
        recompute: What the backward pass computes again, "none", "block" or "except_memory".
    """

    gpus: int
    tensor: int
    data: int
    zero_stage: int
    precision: str
    micro_batches: int
    context: int = 1
    sequence: bool = False
    memory_parallel: str = "heads"
    offload_optimizer: bool = False
    recompute: str = "none"

    @property
    def sharing(self) -> int:
        """Ranks d that share optimizer, gradients or parameters: data x context."""
        return self.data * self.context

    @property
    def hidden(self) -> bool:
        """Whether every tensor-parallel rank computes all heads with a part of every matrix."""
        return self.memory_parallel == "hidden" and self.tensor > 1

    @property
    def token_ranks(self) -> int:
        """Tensor-parallel ranks that share the tokens between the blocks' parallel parts."""
        return self.tensor if self.sequence else 1

    @property
    def bytes_per_weight(self) -> int:
        """Bytes w of a weight, an activation or a gradient as the backward pass makes it."""
        return 2 if self.precision == "bf16" else 4


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
    parallel = config.parallel
    data = check_world(gpus, parallel.tensor, parallel.context)
    return Layout(
        gpus=gpus,
        tensor=parallel.tensor,
        data=data,
        zero_stage=parallel.zero_stage,
        precision="bf16" if megatron_config(config).params_dtype == torch.bfloat16 else "fp32",
        micro_batches=config.accumulation(data),
        context=parallel.context,
        sequence=parallel.sequence,
        memory_parallel=memory_split(config.model, parallel.memory_parallel, parallel.tensor),
        offload_optimizer=parallel.offload_optimizer,
        recompute=config.train.recompute,
    )


def workload_of(config: RunConfig, layout: Layout) -> Workload:
    """A micro-batch as each rank computes it."""
    length = config.train.sequence_length // layout.context
    return Workload(
        config.model,
        rows=config.train.micro_batch,
        length=length,
        before=length * (layout.context - 1),
        ranks=layout.tensor,
        hidden=layout.hidden,
        w=layout.bytes_per_weight,
        documents=config.data.reset_documents,
    )
