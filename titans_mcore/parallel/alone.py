"""A model that shares tokens over ranks, for a while as one that does not: only such a model reads in pieces."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

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
