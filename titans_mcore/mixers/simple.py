"""Mixers without a segment loop: LMM, MAG, MAL and the attention baseline (paper, sections 4.2 to 4.4)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TitansConfig
from ..memory import TensorTree
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) to (B, N + T, E)."""
        return torch.cat([self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)


class LmmMixer(nn.Module):
    """The memory alone: o = M([p || x])."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts, self.prefix = parts, config.persistent_tokens
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.output = parts.row(config.head_dim, config.dim)

    def forward(self, x: Tensor, state: NeuralMemoryState | None) -> tuple[Tensor, NeuralMemoryState]:
        """Mix x (B, T, E); the state of None begins a sequence."""
        first = self.prefix if state is None else 0
        x = self.parts.enter(x if state is not None else self.persistent(x))
        heads, state = self.memory(x, state)
        return linear(self.output, heads[:, first:].flatten(2)), state


@dataclass
class BranchesState(TensorTree):
    """State of a memory and of an attention beside or behind it."""

    memory: NeuralMemoryState
    attention: AttentionState


class MagMixer(nn.Module):
    """Memory as gate: y = window attention, o = y (x) M([p || x]), both sides normalised by head."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts, self.prefix, self.eps = parts, config.persistent_tokens, config.norm_eps
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.attention = Attention(config, parts)
        self.attention_norm = parts.per_head(torch.ones(config.num_heads, config.head_dim))
        self.memory_norm = parts.per_head(torch.ones(config.num_heads, config.head_dim))
        self.output = parts.row(config.head_dim, config.dim)

    def forward(self, x: Tensor, state: BranchesState | None) -> tuple[Tensor, BranchesState]:
        """Mix x (B, T, E); the state of None begins a sequence."""
        first = self.prefix if state is None else 0
        x = self.parts.enter(x if state is not None else self.persistent(x))
        memory, memory_state = self.memory(x, None if state is None else state.memory)
        attention, attention_state = self.attention(x, None if state is None else state.attention, self.prefix)
        mixed = combine(attention, memory[:, first:], self.attention_norm, self.memory_norm, self.eps)
        return linear(self.output, mixed.flatten(2)), BranchesState(memory_state, attention_state)


class MalMixer(nn.Module):
    """Memory as layer: y = M([p || x]), o = window attention over y."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts, self.prefix = parts, config.persistent_tokens
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.memory_output = parts.row(config.head_dim, config.dim)
        self.attention = Attention(config, parts)
        self.output = parts.row(config.head_dim, config.dim)

    def forward(self, x: Tensor, state: BranchesState | None) -> tuple[Tensor, BranchesState]:
        """Mix x (B, T, E); the state of None begins a sequence."""
        x = self.parts.enter(x if state is not None else self.persistent(x))
        memory, memory_state = self.memory(x, None if state is None else state.memory)
        y = self.parts.enter(linear(self.memory_output, memory.flatten(2)))
        attention, attention_state = self.attention(y, None if state is None else state.attention, self.prefix)
        return linear(self.output, attention.flatten(2)), BranchesState(memory_state, attention_state)


class TransformerMixer(nn.Module):
    """The baseline Transformer++: attention alone."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.attention = Attention(config, parts)
        self.output = parts.row(config.head_dim, config.dim)

    def forward(self, x: Tensor, state: AttentionState | None) -> tuple[Tensor, AttentionState]:
        """Mix x (B, T, E); the state of None begins a sequence."""
        attention, state = self.attention(self.parts.enter(x), state)
        return linear(self.output, attention.flatten(2)), state


def combine(y: Tensor, m: Tensor, y_norm: Tensor, m_norm: Tensor, eps: float) -> Tensor:
    """The paper's y (x) m: both sides normalised with learned scales, the memory's through a sigmoid."""
    return rms_norm(y, y_norm, eps) * torch.sigmoid(rms_norm(m, m_norm, eps))
