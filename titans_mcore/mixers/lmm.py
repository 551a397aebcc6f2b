"""The long-term memory alone, without attention (paper, section 4.4)."""

from typing import Any

from torch import Tensor

from ..config import TitansConfig
from ..memory import PackedRows
from .branches import MEMORY_USES, begins, read_persistent
from .neural_memory import BEGINNINGS, NeuralMemory, NeuralMemoryState, PersistentTokens
from .parts import FromParts, Parts
from .spec import MixerSpec, register


class LmmMixer(FromParts):
    """The memory alone: o = M([p || x])."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.output = parts.last_row(config.memory_shape.channels, config.dim)

    def with_room(self, state: NeuralMemoryState) -> NeuralMemoryState:
        """See FromParts."""
        return self.memory.with_room(state)

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None, rows: PackedRows | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        tokens = self.persistent(x) if begins(state, rows) else None
        persistent = read_persistent(tokens, self.memory, self.parts)
        reads, state = self.memory(self.parts.gather_from_sp_region(x), state, start=persistent.start, rows=rows)
        return self.parts.finish(self.output, self.parts.memory.merge_heads(reads)), state


@register
class Lmm(MixerSpec):
    """A memory without attention."""

    name = "lmm"
    title = "Titans, the long-term memory alone (LMM)"
    paper = "Titans LMM"
    module = LmmMixer
    state = NeuralMemoryState
    memory = persistent = True
    beginnings = BEGINNINGS
    uses = MEMORY_USES

    def without_memory(self, state: Any) -> Any:
        """Nothing is left of it."""
        return None
