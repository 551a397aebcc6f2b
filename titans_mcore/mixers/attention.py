"""Multi-head attention with rotary positions, a sliding window and, where asked, persistent tokens in front."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import attend, rotate
from ..attention.attend import Prefix
from ..config import TitansConfig
from ..memory import TensorTree
from .parts import Parts, heads_of, linear


@dataclass
class AttentionState(TensorTree):
    """What attention carries through time; constant size when there is a window.

    Attributes:
        keys: Keys that later tokens still see, without positions, (B, P, heads, D).
        values: Their values.
        prefix_keys: Keys of the persistent tokens, (B, N, heads, D); None without any.
        prefix_values: Their values.
    """

    keys: Tensor
    values: Tensor
    prefix_keys: Tensor | None
    prefix_values: Tensor | None


class Attention(nn.Module):
    """Projections to queries, keys and values, and attention over the window.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.config, self.heads = config, parts.heads
        self.query_key_value = parts.column(config.dim, 3 * config.head_dim)

    def forward(self, x: Tensor, state: AttentionState | None, prefix: int = 0) -> tuple[Tensor, AttentionState]:
        """Attend within x (B, T, E), which has passed Parts.enter(), and to what the state holds.

        Args:
            x: The piece. When the state is None, its first `prefix` tokens are the persistent ones.
            state: What an earlier piece returned.
            prefix: Persistent tokens at the front of the first piece.

        Returns:
            (B, T, heads, D) for the piece's ordinary tokens, and the state after them.
        """
        queries, keys, values = heads_of(linear(self.query_key_value, x), self.heads).chunk(3, -1)
        if state is None:
            state = self._begin(keys, values, prefix)
            queries, keys, values = (part[:, prefix:] for part in (queries, keys, values))
        keys, values = torch.cat([state.keys, keys], 1), torch.cat([state.values, values], 1)
        # Only differences of positions count: counted from the oldest key still seen, they never grow large.
        past = keys.shape[1] - queries.shape[1]
        base, window = self.config.rope_base, self.config.window
        always = None
        if state.prefix_keys is not None:
            assert state.prefix_values is not None
            always = Prefix(queries, state.prefix_keys, state.prefix_values)
        out = attend(
            rotate(queries, past, base),
            rotate(keys, 0, base),
            values,
            window=window,
            prefix=always,
            backend=self.config.attention_backend,
        )
        kept = max(keys.shape[1] - (window - 1), 0) if window else 0
        return out, AttentionState(keys[:, kept:], values[:, kept:], state.prefix_keys, state.prefix_values)

    @staticmethod
    def _begin(keys: Tensor, values: Tensor, prefix: int) -> AttentionState:
        always = (keys[:, :prefix], values[:, :prefix]) if prefix else (None, None)
        return AttentionState(keys[:, :0], values[:, :0], *always)
