"""Sequence parallelism: what the ranks' shares of the tokens mean for the gradients of parameters that all hold."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


_SHARES_TOKENS = ("sequence_parallel", "reduce_scatter_embeddings")  # as Megatron-core's modules and settings say it


@contextmanager
def tokens_unshared(model: nn.Module) -> Iterator[None]:
    """Tensor-parallel ranks see all tokens everywhere, and each context rank is a model of its own.

    No weight moves: under sequence parallelism every rank has all norms, and context ranks have the whole model. For
    passes without gradients alone: those of replicated weights would be reduced as if tokens were shared.

    Args:
        model: A TitansModel; all ranks enter and leave together.
    """
    with ExitStack() as undo:
        for module in model.modules():
            for owner in (module, getattr(module, "config", None)):
                for name in _SHARES_TOKENS:
                    if getattr(owner, name, False) is True:
                        _set(undo, owner, name, False)
        _set(undo, model, "relay", None)
        yield


def _set(undo: ExitStack, owner: Any, name: str, value: object) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
