"""Memory as layer (paper, section 4.3): attention over what the memory answers."""

from typing import Any

from torch import Tensor

from ..config import TitansConfig
from ..memory import PackedRows
from .attention import AROUND, Attention
from .branches import (
    ATTENTION_USES,
    MEMORY_USES,
    BranchesState,
    begins,
    lacks_persistent,
    read_persistent,
    window_alone,
)
from .costs import Workload
from .neural_memory import BEGINNINGS, NeuralMemory, PersistentTokens
from .parts import FromParts, Parts, linear
from .spec import MixerSpec, register


class MalMixer(FromParts):
    """Memory as layer: y = M([p || x]), o = window attention over y."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.memory_output = parts.row(config.memory_shape.channels, config.dim)
        self.attention = Attention(config, parts)
        self.output = parts.last_row(config.dim, config.dim)

    def with_room(self, state: BranchesState) -> BranchesState:
        """See FromParts."""
        return BranchesState(self.memory.with_room(state.memory), self.attention.with_room(state.attention))

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
            self.parts.gather_from_sp_region(x),
            None if state is None else state.memory,
            start=persistent.start,
            rows=rows,
        )
        attention, attended = self.attention(self._answer(memory), attended, rows)
        return self.parts.finish(self.output, attention.flatten(2)), BranchesState(memory_state, attended)

    def _answer(self, reads: Tensor) -> Tensor:
        """y, as input of the attention's maps."""
        return self.parts.copy_to_tp_region(linear(self.memory_output, self.parts.memory.merge_heads(reads)))


@register
class Mal(MixerSpec):
    """Attention behind a memory."""

    name = "mal"
    title = "Titans, memory as layer (MAL)"
    paper = "Titans MAL"
    module = MalMixer
    state = BranchesState
    attention = AROUND
    memory = persistent = True
    beginnings = BEGINNINGS
    uses = MEMORY_USES | ATTENTION_USES | {"memory_output": (1, 1)}

    def without_memory(self, state: Any) -> Any:
        """The window stays."""
        return window_alone(state)

    def kept(self, work: Workload) -> float:
        """Beside both parts y, what attention reads."""
        return super().kept(work) + work.w * work.config.dim
