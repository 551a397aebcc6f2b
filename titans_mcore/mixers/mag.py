"""Memory as gate (paper, section 4.2): attention and memory side by side, each gating the other."""

import torch
from torch import Tensor, nn

from ..config import TitansConfig
from ..memory import PackedRows
from .attention import Attention
from .branches import BranchesState, PersistentTokens, begins, combine, lacks_persistent, read_persistent
from .neural_memory import NeuralMemory
from .parts import Parts, rms_norm


class MagMixer(nn.Module):
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

    def forward(
        self, x: Tensor, state: BranchesState | None, rows: PackedRows | None = None
    ) -> tuple[Tensor, BranchesState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        tokens = self.persistent(x) if begins(state, rows) or lacks_persistent(state) else None
        persistent = read_persistent(tokens, self.memory, self.parts)
        if state is not None and not lacks_persistent(state):
            attended = state.attention
        else:
            attended = self.attention.begin(len(x), persistent.tokens, None if state is None else state.attention.kept)
        x = self.parts.open(x)
        memory, memory_state = self.memory(
            x, None if state is None else state.memory, start=persistent.start, rows=rows
        )
        attention, attended = self.attention(x, attended, rows)
        memory = self.parts.memory.leave(rms_norm(memory, self.memory_norm, self.eps))
        mixed = combine(rms_norm(attention, self.attention_norm, self.eps).flatten(2), memory)
        return self.parts.finish(self.output, mixed), BranchesState(memory_state, attended)
