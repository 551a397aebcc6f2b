"""Sequence parallelism: what the ranks' shares of the tokens mean for the gradients of parameters that all hold."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def reduce_shared_gradients(model: nn.Module, group: dist.ProcessGroup) -> int:
    """Sums, over the tensor-parallel ranks, the gradients of parameters that see one rank's share of the tokens.

    Those are marked `sequence_parallel`, as Megatron-core's are. A hook on the parameter does it in the backward pass,
    before DeepSpeed takes the gradient away, at every ZeRO stage.

    Args:
        model: Before it is given to DeepSpeed.
        group: Megatron's tensor-parallel group.

    Returns:
        How many parameters these are.
    """
    if group.size() == 1:
        return 0

    def summed(gradient: Tensor) -> Any:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    shared = [p for p in model.parameters() if getattr(p, "sequence_parallel", False)]
    for parameter in shared:
        parameter.register_hook(summed)
    return len(shared)
