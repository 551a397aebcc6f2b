"""Memory as layer (paper, section 4.3): attention over what the memory answers."""

from torch import Tensor

from ..config import TitansConfig
from ..memory import PackedRows
from .attention import Attention
from .branches import BranchesMixer, BranchesSpec, BranchesState, Persistent
from .costs import Workload
from .neural_memory import NeuralMemory, PersistentTokens
from .parts import Parts, linear
from .spec import register


class MalMixer(BranchesMixer):
    """Memory as layer: y = M([p || x]), o = window attention over y."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.memory_output = parts.row(config.memory_shape.channels, config.dim)
        self.attention = Attention(config, parts)
        self.output = parts.last_row(config.dim, config.dim)

    def prefix(self, persistent: Persistent) -> Tensor | None:
        """What the memory answers to them."""
        return None if persistent.reads is None else self._answer(persistent.reads)

    def forward(
        self, x: Tensor, state: BranchesState | None, rows: PackedRows | None = None
    ) -> tuple[Tensor, BranchesState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        _, memory, memory_state, attended = self.recall(x, state, rows)
        attention, attended = self.attention(self._answer(memory), attended, rows)
        return self.parts.finish(self.output, attention.flatten(2)), BranchesState(memory_state, attended)

    def _answer(self, reads: Tensor) -> Tensor:
        """y, as input of the attention's maps."""
        return self.parts.copy_to_tp_region(linear(self.memory_output, self.parts.memory.merge_heads(reads)))


@register
class Mal(BranchesSpec):
    """Attention behind a memory."""

    name = "mal"
    title = "Titans, memory as layer (MAL)"
    paper = "Titans MAL"
    module = MalMixer
    uses = BranchesSpec.uses | {"memory_output": (1, 1)}

    def kept(self, work: Workload) -> float:
        """Beside both parts y, what attention reads."""
        return super().kept(work) + work.w * work.config.dim
