"""Multi-head attention with rotary positions, a sliding window and, where asked, persistent tokens in front."""

from dataclasses import dataclass

from torch import Tensor

from ..attention import attend, rotate
from ..attention.attend import KVCache, Prefix
from ..config import TitansConfig
from ..memory import PackedRows, TensorTree
from .parts import FromParts, Parts, heads_of, linear

AROUND = ("attention.", "output.")  # the maps into and out of attention, in mixers that call them so


@dataclass
class AttentionState(TensorTree):
    """What attention carries through time; constant size when there is a window.

    Attributes:
        kept: Keys and values (B, P, heads, D) that later tokens still see.
        prefix_keys: Keys of the persistent tokens, (B, N, heads, D); None without any.
        prefix_values: Their values.
    """

    kept: KVCache
    prefix_keys: Tensor | None
    prefix_values: Tensor | None


class Attention(FromParts):
    """Projections to queries, keys and values, and attention over the window.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.config, self.heads = config, parts.heads
        self.qkv_proj = parts.column(config.dim, *3 * [config.head_dim])
        self.rotate = rotate

    def begin(self, batch: int, persistent: Tensor | None = None, kept: KVCache | None = None) -> AttentionState:
        """The state before the first token of so many rows.

        Args:
            batch: B.
            persistent: Persistent tokens that every token sees, (1, N, E), which have passed Parts.copy_to_tp_region().
            kept: Keys and values of earlier tokens, where rows go on and only the persistent tokens are read again.
        """
        prefix_keys = prefix_values = None
        if persistent is not None:
            _, *both = heads_of(linear(self.qkv_proj, persistent), self.heads).chunk(3, -1)
            prefix_keys, prefix_values = (part.expand(batch, -1, -1, -1) for part in both)
        if kept is None:
            weight = next(self.qkv_proj.parameters())
            nothing = weight.new_zeros(batch, 0, self.heads, self.config.head_dim)
            kept = KVCache(nothing, nothing)
        return AttentionState(kept, prefix_keys, prefix_values)

    def with_room(self, state: AttentionState) -> AttentionState:
        """See FromParts; without a window every token adds its keys."""
        kept = state.kept.with_room(self.config.window - 1) if self.config.window else state.kept
        return AttentionState(kept, state.prefix_keys, state.prefix_values)

    def forward(
        self, x: Tensor, state: AttentionState, rows: PackedRows | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Attend within x (B, T, E), which has passed Parts.copy_to_tp_region(), and to what the state holds.

        Args:
            x: The piece.
            state: What `begin` or an earlier piece returned.
            rows: Documents and padding of the piece; padding stands behind the real tokens.

        Returns:
            (B, T, heads, D), and the state after the last token.
        """
        queries, keys, values = heads_of(linear(self.qkv_proj, x), self.heads).chunk(3, -1)
        documents = state.kept.documents(rows, x.shape[1])
        kept = state.kept.extended(keys, values)
        # Only differences of positions count: counted from the oldest key still seen, they never grow large.
        past = kept.keys.shape[1] - queries.shape[1]
        base, window = self.config.rope_base, self.config.window
        always = None
        if state.prefix_keys is not None:
            assert state.prefix_values is not None
            always = Prefix(queries, state.prefix_keys, state.prefix_values)
        out = attend(
            self.rotate(queries, past, base),
            self.rotate(kept.keys, 0, base),
            kept.values,
            window=window,
            prefix=always,
            documents=documents,
            backend=self.config.attention_backend,
        )
        after = kept.last(window - 1 if window else kept.keys.shape[1], rows)
        return out, AttentionState(after, state.prefix_keys, state.prefix_values)
