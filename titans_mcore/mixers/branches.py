"""What mixers with a memory have in common: persistent tokens, the state of two branches, and what joins them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import TitansConfig
from ..memory import PackedRows, TensorTree
from .attention import AttentionState
from .neural_memory import NeuralMemory, NeuralMemoryState
from .parts import FromParts, Parts

# What their specs say of the parts that they share.
BEGINNINGS = ("persistent.tokens", "memory.initial_weights.")
MEMORY_USES = {"memory.qg_proj": (1, 1), "memory.kv_gates_proj": (1, 1)}
ATTENTION_USES = {"attention.qkv_proj": (1, 1)}


class PersistentTokens(FromParts):
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
        tokens: The tokens, (1, N, E), which have passed Parts.copy_to_tp_region(); None without any.
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
    tokens = parts.copy_to_tp_region(tokens)
    reads, state = memory(tokens, close=True)
    return Persistent(tokens, reads, state)


def begins(state: Any, rows: PackedRows | None) -> bool:
    """Whether some sequence begins in a piece."""
    return state is None or (rows is not None and rows.starts is not None)


@dataclass
class BranchesState(TensorTree):
    """State of a memory and of an attention beside or behind it.

    Attributes:
        memory: The memory's; None where one is to begin anew beside an attention that goes on.
        attention: The attention's.
    """

    memory: NeuralMemoryState
    attention: AttentionState

    def carried(self) -> "BranchesState":
        """Without what the persistent tokens are to the attention: the next step has other ones, and trains them."""
        return BranchesState(self.memory.carried(), AttentionState(self.attention.kept.carried(), None, None))


def lacks_persistent(state: BranchesState | None) -> bool:
    """Whether the attention is without the keys of persistent tokens."""
    return state is None or state.attention.prefix_keys is None


def combine(y: Tensor, m: Tensor) -> Tensor:
    """The paper's y (x) m for sides that are normalised with learned scales: each gates the other through a sigmoid.

    With one sigmoid alone, y * sigmoid(m), what the memory answers reaches the output only times y, whose sign is as
    good as random before training: the quickstart's MAG ends at 4.52 nats instead of 3.97.
    """
    return y * torch.sigmoid(m) + m * torch.sigmoid(y)


def window_alone(state: Any) -> Any:
    """A BranchesState without memory: the mixer reads the persistent tokens again, into a new one."""
    attention = type(state.attention)(state.attention.kept, None, None)
    return type(state)(None, attention)
