"""The long-term memory alone, without attention (paper, section 4.4)."""

from torch import Tensor, nn

from ..config import TitansConfig
from ..memory import PackedRows
from .branches import PersistentTokens, begins, read_persistent
from .neural_memory import NeuralMemory, NeuralMemoryState
from .parts import Parts


class LmmMixer(nn.Module):
    """The memory alone: o = M([p || x])."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.output = parts.last_row(config.memory_shape.channels, config.dim)

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None, rows: PackedRows | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        tokens = self.persistent(x) if begins(state, rows) else None
        persistent = read_persistent(tokens, self.memory, self.parts)
        reads, state = self.memory(self.parts.open(x), state, start=persistent.start, rows=rows)
        return self.parts.finish(self.output, self.parts.memory.leave(reads)), state
