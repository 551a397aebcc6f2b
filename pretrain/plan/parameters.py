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
            part=_part(name, config),
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


def inside_block(name: str) -> tuple[int, str] | None:
    """Which block a parameter belongs to, and its name in there; None outside of blocks."""
    if not name.startswith("layers."):
        return None
    _, block, inside = name.split(".", 2)
    return int(block), inside


def _part(name: str, config: TitansConfig) -> str:
    """What a parameter is for: the memory is everything in the NeuralMemory module.

    Attention's are the matrices into it and out of it; what carries the memory's answers out is of the rest.
    """
    place = inside_block(name)
    if place is None:
        return "embedding" if name.startswith(("embedding.", "output_layer.")) else "rest"
    (block, inside), mixers = place, config.blocks
    if inside.startswith("mlp."):
        return "feed_forward"
    if mixers[block].memory and inside.startswith("mixer.memory."):
        return "memory"
    return "attention" if inside.removeprefix("mixer.").startswith(mixers[block].attention) else "rest"
