"""The baseline Transformer++: attention alone."""

from torch import Tensor

from ..config import TitansConfig
from ..memory import PackedRows
from .attention import AROUND, Attention, AttentionState
from .parts import FromParts, Parts
from .spec import MixerSpec, register


class TransformerMixer(FromParts):
    """The baseline Transformer++: attention alone."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.attention = Attention(config, parts)
        self.output = parts.last_row(config.dim, config.dim)

    def with_room(self, state: AttentionState) -> AttentionState:
        """See FromParts."""
        return self.attention.with_room(state)

    def forward(
        self, x: Tensor, state: AttentionState | None, rows: PackedRows | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        state = self.attention.begin(len(x)) if state is None else state
        attention, state = self.attention(self.parts.gather_from_sp_region(x), state, rows)
        return self.parts.finish(self.output, attention.flatten(2)), state


@register
class Transformer(MixerSpec):
    """Attention without a memory."""

    name = "transformer"
    title = "Transformer++, the attention baseline"
    paper = "Transformer++"
    module = TransformerMixer
    state = AttentionState
    attention = AROUND
