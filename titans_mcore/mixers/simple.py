"""Mixers without a segment loop: LMM, MAG, MAL and the attention baseline (paper, sections 4.2 to 4.4)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import TitansConfig
from ..memory import PackedRows, TensorTree
from .attention import Attention, AttentionState
from .neural_memory import NeuralMemory, NeuralMemoryState
from .parts import Parts, linear, rms_norm


class PersistentTokens(nn.Module):
    """N learned, input-independent tokens in front of a sequence (paper, section 3.3).

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        # They stand beside normalised activations, so they start at their size.
        self.tokens = parts.replicated(torch.randn(config.persistent_tokens, config.dim))

    def forward(self, x: Tensor) -> Tensor | None:
        """(1, N, E) in the dtype of x; None if there are none."""
        return self.tokens.to(x.dtype).unsqueeze(0) if len(self.tokens) else None


class Persistent(NamedTuple):
    """What persistent tokens leave for the sequences behind them, the same for all.

    Attributes:
        tokens: The tokens, (1, N, E), which have passed Parts.enter(); None without any.
        reads: What the memory answers to them, (1, N, heads, D); None without any.
        start: The memory after them, in which every sequence begins; None without any.
    """

    tokens: Tensor | None
    reads: Tensor | None
    start: NeuralMemoryState | None


def read_persistent(tokens: Tensor | None, memory: NeuralMemory, parts: Parts) -> Persistent:
    """Let the memory run over the persistent tokens, once for all rows and documents."""
    if tokens is None:
        return Persistent(None, None, None)
    tokens = parts.enter(tokens)
    reads, state = memory(tokens, close=True)
    return Persistent(tokens, reads, state)


def begins(state: Any, rows: PackedRows | None) -> bool:
    """Whether some sequence begins in a piece."""
    return state is None or (rows is not None and rows.starts is not None)


class LmmMixer(nn.Module):
    """The memory alone: o = M([p || x])."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.output = parts.last_row(config.memory_shape.channels, config.dim)

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None, rows: PackedRows | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        tokens = self.persistent(x) if begins(state, rows) else None
        persistent = read_persistent(tokens, self.memory, self.parts)
        reads, state = self.memory(self.parts.open(x), state, start=persistent.start, rows=rows)
        return self.parts.finish(self.output, self.parts.memory.leave(reads)), state


@dataclass
class BranchesState(TensorTree):
    """State of a memory and of an attention beside or behind it."""

    memory: NeuralMemoryState
    attention: AttentionState

    def carried(self) -> "BranchesState":
        """Without what the persistent tokens are to the attention: the next step has other ones, and trains them."""
        return BranchesState(self.memory.carried(), AttentionState(self.attention.kept.carried(), None, None))


def lacks_persistent(state: BranchesState | None) -> bool:
    """Whether the attention is without the keys of persistent tokens."""
    return state is None or state.attention.prefix_keys is None


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


def combine(y: Tensor, m: Tensor) -> Tensor:
    """The paper's y (x) m for sides that are normalised with learned scales: each gates the other through a sigmoid.

    With one sigmoid alone, y * sigmoid(m), what the memory answers reaches the output only times y, whose sign is as
    good as random before training: the quickstart's MAG ends at 4.52 nats instead of 3.97.
    """
    return y * torch.sigmoid(m) + m * torch.sigmoid(y)
