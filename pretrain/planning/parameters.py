"""Parameters by name, shape and purpose, from the model as it is built, without its memory."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

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
        divided: Whether tensor-parallel ranks hold a share each; else every rank holds the whole.
        decayed: Whether weight decay acts on it, which decides its group in the optimizer.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    divided: bool
    decayed: bool

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def count_on_rank(self, tensor: int) -> int:
        """Numbers that one of `tensor` ranks holds."""
        return self.count // tensor if self.divided else self.count


class _OneRank:
    """A group of one: the shapes of a whole model, from which every other division follows."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def parameters_of(config: TitansConfig) -> list[Parameter]:
    """Every parameter of a model; building it takes a fraction of a second and no memory."""
    groups: Any = SimpleNamespace(tp=_OneRank())
    with FakeTensorMode():
        model = TitansModel(config, transformer_config(config), groups)
        return [
            Parameter(
                name=name,
                part=_part(name, config.variant),
                shape=tuple(parameter.shape),
                divided=split_of(parameter) is not None,
                decayed=parameter.ndim >= 2 and not getattr(parameter, "no_weight_decay", False),
            )
            for name, parameter in model.named_parameters()
        ]


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
