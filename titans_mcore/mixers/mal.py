"""Memory as layer (paper, section 4.3): attention over what the memory answers."""

from torch import Tensor, nn

from ..config import TitansConfig
from ..memory import PackedRows
from .attention import Attention
from .branches import BranchesState, PersistentTokens, begins, lacks_persistent, read_persistent
from .neural_memory import NeuralMemory
from .parts import Parts, linear


class MalMixer(nn.Module):
    """Memory as layer: y = M([p || x]), o = window attention over y."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.memory_output = parts.row(config.memory_shape.channels, config.dim)
        self.attention = Attention(config, parts)
        self.output = parts.last_row(config.dim, config.dim)

    def forward(
        self, x: Tensor, state: BranchesState | None, rows: PackedRows | None = None
    ) -> tuple[Tensor, BranchesState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        tokens = self.persistent(x) if begins(state, rows) or lacks_persistent(state) else None
        persistent = read_persistent(tokens, self.memory, self.parts)
        if state is not None and not lacks_persistent(state):
            attended = state.attention
        else:
            prefix = None if persistent.reads is None else self._answer(persistent.reads)
            attended = self.attention.begin(len(x), prefix, None if state is None else state.attention.kept)
        memory, memory_state = self.memory(
            self.parts.open(x), None if state is None else state.memory, start=persistent.start, rows=rows
        )
        attention, attended = self.attention(self._answer(memory), attended, rows)
        return self.parts.finish(self.output, attention.flatten(2)), BranchesState(memory_state, attended)

    def _answer(self, reads: Tensor) -> Tensor:
        """y, as input of the attention's maps."""
        return self.parts.enter(linear(self.memory_output, self.parts.memory.leave(reads)))
