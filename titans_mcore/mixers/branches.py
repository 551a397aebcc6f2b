"""What mixers with a memory have in common: persistent tokens; and what those with an attention beside or behind it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..memory import PackedRows, TensorTree
from .attention import AROUND, Attention, AttentionState
from .neural_memory import BEGINNINGS, NeuralMemory, NeuralMemoryState, PersistentTokens
from .parts import FromParts, Parts
from .spec import MixerSpec

MEMORY_USES = {"memory.qg_proj": (1, 1), "memory.kv_gates_proj": (1, 1)}  # in specs


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


class BranchesMixer(FromParts):
    """A mixer of a memory and an attention, which its constructor makes.

    Attributes:
        parts: What made its parameters.
        persistent: Persistent tokens of both.
        memory: Reads x.
        attention: Reads x too, or what the memory answers.
    """

    parts: Parts
    persistent: PersistentTokens
    memory: NeuralMemory
    attention: Attention

    def with_room(self, state: BranchesState) -> BranchesState:
        """See FromParts."""
        return BranchesState(self.memory.with_room(state.memory), self.attention.with_room(state.attention))

    def prefix(self, persistent: Persistent) -> Tensor | None:
        """What the attention reads of the persistent tokens, (1, N, E) in the tp region; None without any."""
        raise NotImplementedError

    def recall(
        self, x: Tensor, state: BranchesState | None, rows: PackedRows | None
    ) -> tuple[Tensor, Tensor, NeuralMemoryState, AttentionState]:
        """Lets the memory read x (B, T', E) as the block holds it.

        Returns:
            x in the tp region, (B, T, E); what the memory answers, (B, T, heads, D), and its state after it; the state
            from which the attention goes on.
        """
        before, attended = (None, None) if state is None else (state.memory, state.attention)
        lacks_prefix = attended is None or attended.prefix_keys is None
        tokens = self.persistent(x) if lacks_prefix or begins(state, rows) else None
        persistent = read_persistent(tokens, self.memory, self.parts)
        if attended is None or lacks_prefix:
            kept = None if attended is None else attended.kept
            attended = self.attention.begin(len(x), self.prefix(persistent), kept)
        x = self.parts.gather_from_sp_region(x)
        answer, after = self.memory(x, before, start=persistent.start, rows=rows)
        return x, answer, after, attended


class BranchesSpec(MixerSpec):
    """What such a mixer says about itself."""

    state = BranchesState
    attention = AROUND
    memory = persistent = True
    beginnings = BEGINNINGS
    uses = MEMORY_USES | {"attention.qkv_proj": (1, 1)}

    def without_memory(self, state: Any) -> Any:
        """The window stays; the mixer reads the persistent tokens again, into a new memory."""
        attention = type(state.attention)(state.attention.kept, None, None)
        return type(state)(None, attention)
