"""The baseline Transformer++: attention alone."""

from torch import Tensor, nn

from ..config import TitansConfig
from ..memory import PackedRows
from .attention import Attention, AttentionState
from .parts import Parts


class TransformerMixer(nn.Module):
    """The baseline Transformer++: attention alone."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.attention = Attention(config, parts)
        self.output = parts.last_row(config.dim, config.dim)

    def forward(
        self, x: Tensor, state: AttentionState | None, rows: PackedRows | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        state = self.attention.begin(len(x)) if state is None else state
        attention, state = self.attention(self.parts.open(x), state, rows)
        return self.parts.finish(self.output, attention.flatten(2)), state
