"""Parameters by name, shape and purpose, from the model as it is built, without its memory."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from titans_mcore.config import TitansConfig
from titans_mcore.model import TitansModel
from titans_mcore.parallel import transformer_config
from titans_mcore.weights import split_of

PARTS = ("memory", "attention", "feed_forward", "embedding", "rest")
# Matrices of a block into and out of attention; what carries the memory's answers out is of the rest.
_AROUND = ("mixer.attention.", "mixer.output.")
_ATTENTION: dict[str, tuple[str, ...]] = {
    "mac": ("mixer.query.", "mixer.key_value.", "mixer.attention_output."),
    "mag": _AROUND,
    "mal": _AROUND,
    "lmm": (),
    "transformer": _AROUND,
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model.

    Attributes:
        name: As in the built model.
        part: One of PARTS.
        shape: Whole, over all tensor-parallel ranks.
        on_rank: Numbers of it that each tensor-parallel rank holds.
        decayed: Whether weight decay acts on it, which decides its group in the optimizer.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    on_rank: int
    decayed: bool

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


class _FirstOf:
    """A group of so many ranks, seen from its first."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


def parameters_of(config: TitansConfig, tensor: int = 1, memory_parallel: str = "heads") -> list[Parameter]:
    """Every parameter of a model; building it takes a fraction of a second and no memory.

    Args:
        config: The model.
        tensor: Tensor-parallel ranks.
        memory_parallel: What they share of the memory, "heads" or "hidden".
    """
    whole = _built(config, 1, memory_parallel)
    # Shapes from the whole model: without torch.distributed Megatron's maps are whole whatever the group says.
    divided = {name for name, p in _built(config, tensor, memory_parallel) if split_of(p) is not None}
    return [
        Parameter(
            name=name,
            part=_part(name, config.variant),
            shape=tuple(p.shape),
            on_rank=p.numel() // tensor if name in divided else p.numel(),
            decayed=p.ndim >= 2 and not getattr(p, "no_weight_decay", False),
        )
        for name, p in whole
    ]


def _built(config: TitansConfig, tensor: int, memory_parallel: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a model on the first of so many ranks, without their memory."""
    groups: Any = SimpleNamespace(tp=_FirstOf(tensor))
    megatron = transformer_config(config, tensor_parallel=tensor, memory_parallel=memory_parallel)
    with FakeTensorMode():
        model = TitansModel(config, megatron, groups, memory_parallel=memory_parallel)
    return list(model.named_parameters())


def count_by_part(parameters: list[Parameter]) -> dict[str, int]:
    """Numbers in the whole model, `total` and by part."""
    parts = {part: sum(p.count for p in parameters if p.part == part) for part in PARTS}
    return {"total": sum(parts.values()), **parts}


def _part(name: str, variant: str) -> str:
    """What a parameter is for: the memory is everything in the NeuralMemory module."""
    if ".mixer.memory." in name:
        return "memory"
    if name.startswith(("embedding.", "output_layer.")):
        return "embedding"
    if ".mlp." in name:
        return "feed_forward"
    return "attention" if name.split(".", 2)[-1].startswith(_ATTENTION[variant]) else "rest"
