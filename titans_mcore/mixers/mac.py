"""Memory as context (paper, section 4.1): attention within segments, over what the memory recalls of earlier ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import attend, rotate
from ..attention.attend import Prefix
from ..config import TitansConfig
from ..memory import TensorTree
from .neural_memory import NeuralMemory, NeuralMemoryState, Recall
from .parts import Parts, heads_of, linear
from .simple import PersistentTokens, combine


@dataclass
class MacState(TensorTree):
    """What MAC carries through time; constant size.

    Attributes:
        written: The memory after the last token; None before the first.
        recall: The memory after the last whole segment, which this segment's tokens recall.
        keys: Keys of the open segment, rotated, recalled memory and token in turn, (B, 2 t, heads, D).
        values: Their values.
    """

    written: NeuralMemoryState | None
    recall: Recall
    keys: Tensor
    values: Tensor


class MacMixer(nn.Module):
    """For each segment S of C tokens, with M the memory after the segment before:

    h = M(q), a read; y = Attn([p || h || S]), causal; M is updated with y, token by token; o = y (x) M(y).

    Two readings of the equations would leak the future and are not taken: h_j, a function of token j, is visible from
    j on only, and the last read uses each token's own memory, not the memory after the whole segment.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.config, self.parts, self.heads = config, parts, parts.heads
        width = config.head_dim
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.memory_output = parts.row(width, config.dim)
        self.query = parts.column(config.dim, width)
        self.key_value = parts.column(config.dim, 2 * width)
        self.attention_output = parts.row(width, config.dim)
        self.attention_norm = parts.replicated(torch.ones(config.dim))
        self.memory_norm = parts.replicated(torch.ones(config.dim))

    def forward(self, x: Tensor, state: MacState | None) -> tuple[Tensor, MacState]:
        """Mix x (B, T, E); the state of None begins a sequence."""
        # The persistent tokens are the same for every row and every segment.
        prefix = self.parts.enter(self.persistent(x[:1, :0]))
        prefix_kv = heads_of(linear(self.key_value, prefix), self.heads).expand(x.shape[0], -1, -1, -1)
        x = self.parts.enter(x)
        queries = heads_of(linear(self.query, x), self.heads)
        keys_values = heads_of(linear(self.key_value, x), self.heads)
        if state is None:
            nothing = queries[:, :0]
            state = MacState(None, Recall(), nothing, nothing)
        outputs, start = [], 0
        while start < x.shape[1]:
            stop = min(x.shape[1], start + self.config.segment_length - state.keys.shape[1] // 2)
            piece = slice(start, stop)
            output, state = self._within_segment(
                x[:, piece], queries[:, piece], keys_values[:, piece], prefix_kv, state
            )
            outputs.append(output)
            start = stop
        return torch.cat(outputs, 1), state

    def _within_segment(
        self, x: Tensor, queries: Tensor, keys_values: Tensor, prefix_kv: Tensor, state: MacState
    ) -> tuple[Tensor, MacState]:
        """A piece that ends before or with the open segment."""
        recalled, recall = self.memory(x, recall=state.recall)
        recalled = self.parts.enter(linear(self.memory_output, recalled.flatten(2)))
        recalled_kv = heads_of(linear(self.key_value, recalled), self.heads)
        past, base = state.keys.shape[1] // 2, self.config.rope_base
        both = [pair.chunk(2, -1) for pair in (recalled_kv, keys_values)]
        keys = _in_turn(*(rotate(key, past, base) for key, _ in both))
        values = _in_turn(*(value for _, value in both))
        keys, values = torch.cat([state.keys, keys], 1), torch.cat([state.values, values], 1)
        attention = attend(
            rotate(queries, past, base),
            keys,
            values,
            keys_per_token=2,
            prefix=Prefix(queries, *prefix_kv.chunk(2, -1)) if prefix_kv.shape[1] else None,
            backend=self.config.attention_backend,
        )
        y = linear(self.attention_output, attention.flatten(2))
        memory, written = self.memory(self.parts.enter(y), state.written)
        m = linear(self.memory_output, memory.flatten(2))
        output = combine(y, m, self.attention_norm, self.memory_norm, self.config.norm_eps)
        if keys.shape[1] // 2 < self.config.segment_length:
            return output, MacState(written, recall, keys, values)
        # The segment is full: the next one recalls the memory as it is now.
        return output, MacState(written, Recall(written.memory.weights, recall.query_tail), keys[:, :0], values[:, :0])


def _in_turn(first: Tensor, second: Tensor) -> Tensor:
    """(B, T, H, D) twice to (B, 2 T, H, D): first_0, second_0, first_1, ..."""
    return torch.stack([first, second], 2).flatten(1, 2)
