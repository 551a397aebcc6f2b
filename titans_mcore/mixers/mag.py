"""Memory as gate (paper, section 4.2): attention and memory side by side, each gating the other."""

import torch
from torch import Tensor

from ..config import TitansConfig
from ..memory import PackedRows
from .attention import Attention
from .branches import BranchesMixer, BranchesSpec, BranchesState, Persistent
from .costs import Workload
from .neural_memory import NeuralMemory, PersistentTokens, combine
from .parts import Parts, rms_norm
from .spec import register


class MagMixer(BranchesMixer):
    """Memory as gate: y = window attention, o = y (x) M([p || x]), each side normalised by heads of its own."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts, self.eps = parts, config.norm_eps
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.attention = Attention(config, parts)
        self.attention_norm = parts.per_head(torch.ones(config.num_heads, config.head_dim))
        self.memory_norm = parts.memory.per_head(torch.ones(config.memory_shape))
        self.output = parts.last_row(config.dim, config.dim)
        self.norm, self.combine = rms_norm, combine

    def prefix(self, persistent: Persistent) -> Tensor | None:
        """The tokens themselves."""
        return persistent.tokens

    def forward(
        self, x: Tensor, state: BranchesState | None, rows: PackedRows | None = None
    ) -> tuple[Tensor, BranchesState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        x, memory, memory_state, attended = self.recall(x, state, rows)
        attention, attended = self.attention(x, attended, rows)
        memory = self.parts.memory.merge_heads(self.norm(memory, self.memory_norm, self.eps))
        mixed = self.combine(self.norm(attention, self.attention_norm, self.eps).flatten(2), memory)
        return self.parts.finish(self.output, mixed), BranchesState(memory_state, attended)


@register
class Mag(BranchesSpec):
    """A memory beside attention."""

    name = "mag"
    title = "Titans, memory as gate (MAG)"
    paper = "Titans MAG"
    module = MagMixer

    def check(self, config: TitansConfig) -> None:
        """The memory's answer and the attention's are multiplied."""
        super().check(config)
        heads, width = config.memory_shape
        if heads * width != config.dim:
            raise ValueError(
                f"memory_heads {heads} of memory_head_dim {width} are {heads * width} channels, and mag multiplies "
                f"them with the dim {config.dim} of the attention; leave one of the two out, or change dim"
            )

    def kept(self, work: Workload) -> float:
        """Beside both branches y (x) m."""
        return super().kept(work) + 2 * work.w * (work.e + work.m)
