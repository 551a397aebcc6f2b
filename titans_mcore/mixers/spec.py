"""What a mixer says about itself, and the registry of all mixers: nothing outside a mixer's file knows its name.

A mixer's file ends with a subclass of MixerSpec under @register. The attributes that have no value here, it must give;
the methods stand here for window attention, a memory, persistent tokens, each where the mixer has it, and for linear
maps that are applied once to every token. A mixer overrides what it does otherwise. How tensor-parallel ranks share its
parameters is no part of it: the constructor says so when it asks Parts for them.
"""

from typing import Any, NamedTuple

from torch import nn

from ..config import TitansConfig
from ..memory import TensorTree
from .costs import (
    Workload,
    attention_flops,
    attention_kept,
    attention_message,
    memory_at_work,
    memory_flops,
    memory_kept,
    memory_message,
    memory_scan_kept,
    memory_state,
    memory_states,
    window_keys,
)


class Heads(NamedTuple):
    """Heads of a part of a mixer, which tensor-parallel ranks share.

    Attributes:
        setting: What their number is called in messages.
        number: H.
        width: D of each.
    """

    setting: str
    number: int
    width: int


class MixerSpec:
    """A token mixer.

    Attributes:
        name: In settings and files.
        title: In a model card.
        paper: What the paper's tables call a model of it.
        module: Made by (config, parts); its forward is (x, state, rows) to (output, state).
        state: What it carries through time.
        attention: Beginnings of the names of attention's maps, into it and out of it; none without attention.
        memory: Whether it has a NeuralMemory, as `memory`.
        delta: Whether its state follows the delta rule, by queries and keys of its own.
        persistent: Whether it has persistent tokens.
        composes: Whether its state is a linear map of the one before, which it takes as an Earlier (linear.py): ranks
            that share a row work on it at the same time.
        front: Whether its module has another one, `front`, that takes (x, state, rows) to (x with what it adds, state)
            before the block's norm.
        beginnings: Parts of the names of parameters that only the beginning of a sequence reads.
        uses: How often a linear map is applied to each token, and to each persistent token once a micro-batch, where it
            is not (1, 0).
    """

    name: str
    title: str
    paper: str
    module: type[nn.Module]
    state: type[TensorTree]
    attention: tuple[str, ...] = ()
    memory = False
    delta = False
    persistent = False
    composes = False
    front = False
    beginnings: tuple[str, ...] = ()
    uses: dict[str, tuple[int, int]] = {}  # noqa: RUF012 - replaced, never changed

    # Settings.

    def check(self, config: TitansConfig) -> None:
        """Whether settings fit this mixer.

        Raises:
            ValueError: They do not; the message says what to change.
        """
        if self.attention and config.dim % config.num_heads:
            raise ValueError(f"dim {config.dim} is not divisible by num_heads {config.num_heads}; change one of them")
        if self.attention and config.head_dim % 2:
            raise ValueError(f"dim / num_heads is {config.head_dim}; rotary positions need an even head width")

    def heads(self, config: TitansConfig) -> dict[str, Heads]:
        """Heads by part of the mixer."""
        found = {}
        if self.attention:
            found["attention"] = Heads("num_heads", config.num_heads, config.head_dim)
        if self.memory:
            found["memory"] = Heads("memory_heads", *config.memory_shape)
        return found

    def unit(self, config: TitansConfig) -> tuple[int, str]:
        """Tokens that ranks which share a row may not cut, and what they are called; 1 where they may cut anywhere."""
        return (config.chunk_size, "chunks of model.chunk_size") if self.memory else (1, "")

    def reach(self, config: TitansConfig) -> int | None:
        """Tokens that attention sees; 0 without attention, None where it keeps the keys of all."""
        return (config.window or None) if self.attention else 0

    def without_memory(self, state: Any) -> Any:
        """A state whose memory is as before the first token; what attention keeps stays.

        An exported folder brings state classes of its own: what is made anew is of the class that came.
        """
        return state

    # Costs of one block; see costs.py.

    def pieces(self, config: TitansConfig, length: int) -> list[int]:
        """Lengths of the pieces in which a row is read."""
        return [length]

    def keys(self, config: TitansConfig, length: int) -> float:
        """Keys that a query sees, on average over a row of one document."""
        return window_keys(config, length) + self._prefix(config) if self.attention else 0.0

    def flops(self, config: TitansConfig, length: int, tokens: int, persistent: int) -> dict[str, int]:
        """Operations beside those of linear maps, forward, by kind.

        Args:
            config: The model.
            length: Tokens of a row.
            tokens: Tokens of all rows.
            persistent: Persistent tokens, over all micro-batches.
        """
        return {
            "attention": attention_flops(config, self.keys(config, length), tokens),
            "memory": (tokens + persistent) * memory_flops(config) if self.memory else 0,
        }

    def kept(self, work: Workload) -> float:
        """Bytes of a token that are kept for the backward pass."""
        attention = attention_kept(work, self._prefix(work.config)) if self.attention else 0.0
        return attention + (memory_kept(work) if self.memory else 0.0)

    def scan_kept(self, work: Workload) -> float:
        """Bytes of a token that are kept where the backward pass computes all but the memory's scan again."""
        return memory_scan_kept(work) if self.memory else 0.0

    def state_bytes(self, work: Workload) -> float:
        """Bytes of a state, all rows, without what attention keeps."""
        return memory_state(work) if self.memory else 0.0

    def states_kept(self, work: Workload) -> float:
        """Bytes of the states that are kept for the backward pass."""
        each = 0.5 if self._prefix(work.config) else -0.5
        return memory_states(work, self.pieces(work.config, work.length), each) if self.memory else 0.0

    def at_work(self, work: Workload) -> float:
        """Bytes of the largest working set, in one block at a time."""
        return memory_at_work(work, self.pieces(work.config, work.length)) if self.memory else 0.0

    def message(self, work: Workload) -> int:
        """Bytes of the state that a context-parallel rank hands on; its gradients come back in the same size."""
        memory = memory_message(work) if self.memory else 0
        return memory + (attention_message(work, self._prefix(work.config)) if self.attention else 0)

    def messages(self, config: TitansConfig) -> int:
        """Messages that it comes in; where states compose nothing stands in front of them, else a header each."""
        return 1

    def composing_flops(self, config: TitansConfig, tokens: int) -> int:
        """Operations of a rank that reads its tokens before the state in front of them is there, forward, beside."""
        return 0

    def _prefix(self, config: TitansConfig) -> int:
        """Persistent tokens."""
        return config.persistent_tokens if self.persistent else 0


MIXERS: dict[str, MixerSpec] = {}
"""Every mixer by its name."""


def register(spec: type[MixerSpec]) -> type[MixerSpec]:
    """Makes a mixer known.

    Raises:
        ValueError: Its name is taken, or no name of one mixer.
    """
    if spec.name in MIXERS or not spec.name.isidentifier():
        raise ValueError(f"a mixer cannot be called {spec.name!r}: the name is taken, or holds more than a word")
    MIXERS[spec.name] = spec()
    return spec
