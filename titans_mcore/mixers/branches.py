"""What mixers with a memory have in common: persistent tokens, the state of two branches, and what joins them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..memory import PackedRows, TensorTree
from .attention import AttentionState
from .neural_memory import NeuralMemory, NeuralMemoryState
from .parts import Parts

# What their specs say of the parts that they share.
MEMORY_USES = {"memory.qg_proj": (1, 1), "memory.kv_gates_proj": (1, 1)}
ATTENTION_USES = {"attention.qkv_proj": (1, 1)}


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


def window_alone(state: Any) -> Any:
    """A BranchesState without memory: the mixer reads the persistent tokens again, into a new one."""
    attention = type(state.attention)(state.attention.kept, None, None)
    return type(state)(None, attention)
