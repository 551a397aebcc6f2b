"""The settings of a Titans model: one frozen value that training, evaluation and export all read.

It imports nothing of Megatron-core, so that the exported Hugging Face folder can carry it.
Letters used for shapes in the whole project: B batch, T time, C chunk, S segment, H heads, D head width, E model
width, L memory layers, N persistent tokens, W window, V vocabulary.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

if TYPE_CHECKING:
    from .mixers.spec import MixerSpec

_KERNELS_WIDTH = 64  # of a memory head, where nothing is said: what the fused kernels do best


class MemoryShape(NamedTuple):
    """Heads of the memory.

    Attributes:
        heads: H of them.
        width: D of each.
    """

    heads: int
    width: int

    @property
    def channels(self) -> int:
        """What all heads answer together, H D."""
        return self.heads * self.width


@dataclass(frozen=True)
class TitansConfig:
    """Every setting that changes the function a model computes.

    Raises:
        ValueError: At construction, when settings do not fit together; the message names the setting, the value and
            what to change.
    """

    variant: str = "mac"
    """Token mixer of every block, a name in mixers/: memory as context (mac), as gate (mag), as layer (mal), the memory
    alone (lmm), the attention baseline Transformer++ (transformer), linear recurrences (retnet, mamba, mamba2,
    deltanet, gated_deltanet), weights that learn by the token (ttt_linear, ttt_mlp); or several, joined by +, that take
    turns over the blocks, as in lmm+transformer."""
    vocab_size: int = 32_000
    """Pieces of the tokenizer, before padding."""
    num_layers: int = 12
    """Blocks."""
    dim: int = 768
    """Model width E."""
    num_heads: int = 16
    """Heads of the attention; each is dim / num_heads wide. lmm has none."""
    ffn_dim: int = 2_048
    """Hidden width of the SwiGLU feed-forward network."""
    tie_embeddings: bool = True
    """Use the embedding matrix as output matrix too."""
    norm_eps: float = 1e-5
    """Epsilon of the RMSNorms."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices; those that write to the residual stream are divided by
    sqrt(2 * num_layers)."""

    memory_heads: int = 0
    """Heads of the memory; 0 takes dim / memory_head_dim."""
    memory_head_dim: int = 0
    """Width of a memory head; 0 takes dim / memory_heads, or where that is 0 too, the largest width up to 64 that
    divides dim. Only mag, which multiplies the memory's answer and the attention's, needs dim channels in all."""
    memory_depth: int = 2
    """Weight matrices L_M of the memory network, 1 to 4; 1 is the linear memory."""
    memory_expansion: int = 4
    """Hidden width of the memory network over memory_head_dim (depth 2 and more)."""
    memory_network: Literal["residual_norm", "plain"] = "residual_norm"
    """residual_norm: x + LayerNorm(MLP(x)), as in the camera-ready paper; plain: MLP(x)."""
    memory_rule: Literal["stable", "literal"] = "stable"
    """stable: the last matrix learns token by token, steps below it are held, forgetting leads back to M_0
    (memory/STABILITY.md); literal: the paper's rule in chunks and nothing else."""
    chunk_size: int = 16
    """Tokens b whose inner gradients are taken at the same memory state, but for those of the last matrix under the
    stable rule; part of the model, not a speed setting."""
    theta_max: float = 1.0
    """Largest inner learning rate: theta = theta_max * sigmoid(linear(x))."""
    gate_margin: float = 0.0
    """Makes theta and alpha exactly 0 where their sigmoid is below margin / (1 + margin), so that any number of tokens
    can pass a memory without a trace: relu((1 + margin) * sigmoid - margin). 0 is the plain sigmoid."""
    gate_convolution: bool = False
    """Lets the gates pass the convolution, too: a gate then sees the last conv_kernel tokens, and begins with its own
    alone, which is all it sees in the paper."""
    memory_gates: Literal["matrix", "shared"] = "matrix"
    """Gates for every weight matrix of the memory, or one set that they share; always one set a head."""
    memory_alpha: Literal["head", "channel"] = "head"
    """One forget rate for a weight matrix, or one for every channel of its input (slower: no fused backward)."""
    memory_momentum: bool = True
    """Momentum eta; without it a step is the momentary surprise alone (the paper's ablation)."""
    memory_forgetting: bool = True
    """Forgetting alpha, the paper's weight decay; without it nothing is forgotten (the paper's ablation)."""
    conv_kernel: int = 4
    """Width of the causal depthwise convolution on queries, keys and values (and gates); 1 switches it off."""
    memory_init: Literal["random", "next_token"] = "random"
    """Where queries, keys and values begin. next_token: one map makes queries and keys, the key of a token is that of
    the token before it and its value its own, so that an untrained memory already answers a token with what followed
    it before; mac's attention begins at each token itself, so that this is what its memory is written with. So begin
    mixers of the delta rule, too. random: nothing matches, and recall has to arise by chance."""
    persistent_tokens: int = 128
    """Learned, input-independent tokens N in front of the sequence (mac: of every segment), per block."""

    segment_length: int = 512
    """mac: tokens per segment; a multiple of chunk_size."""
    window: int = 2_048
    """mag, mal, transformer: tokens each query sees, itself included; 0 means all earlier tokens."""
    linear_heads: int = 0
    """retnet, mamba2, deltanet, gated_deltanet, ttt_linear, ttt_mlp: heads; 0 makes them as wide as published, or the
    next narrower width that divides their channels."""
    rope_base: float = 10_000.0
    """Base of the rotary position embedding."""

    memory_backend: Literal["auto", "chunked", "native", "fused", "oracle"] = "auto"
    """How the memory is computed; same results, different speed. native: one operation in C++ (CPU, forgetting
    by head), compiled at first use; fused: Triton kernels (CUDA, up to two matrices, forgetting by head); auto takes
    these where they fit, else chunked, torch operations; oracle: the literal per-token loop."""
    attention_backend: Literal["auto", "sdpa", "flash", "dense"] = "auto"
    """How attention is computed; same results, different speed. dense is the masked softmax written out."""
    linear_backend: Literal["torch", "fla"] = "torch"
    """How RetNet, Mamba2 and the delta rules are scanned. fla: flash-linear-attention's kernels (CUDA, bf16, extra
    `fla`)."""

    def __post_init__(self) -> None:
        self._check_variant()
        check_choices(self)
        for name in ("vocab_size", "num_layers", "dim", "num_heads", "ffn_dim", "memory_expansion", "conv_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("norm_eps", "init_std", "theta_max", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.gate_margin < 1:
            raise ValueError(f"gate_margin is {self.gate_margin}; it must be 0 or more, and below 1")
        for name in ("persistent_tokens", "window", "memory_heads", "memory_head_dim", "linear_heads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        self._check_memory_shape()
        if not 1 <= self.memory_depth <= 4:
            raise ValueError(f"memory_depth is {self.memory_depth}; it must be 1, 2, 3 or 4")
        if not 1 <= self.chunk_size <= 512:
            raise ValueError(f"chunk_size is {self.chunk_size}; it must be between 1 and 512")
        if self.memory_init == "next_token" and self.conv_kernel < 2 and any(m.memory or m.delta for m in self.mixers):
            raise ValueError(
                f"memory_init 'next_token' finds the token before by the convolution, and conv_kernel is "
                f"{self.conv_kernel}; make it 2 or more, or memory_init random"
            )
        if self.memory_alpha == "channel" and (self.memory_gates == "shared" or not self.memory_forgetting):
            raise ValueError(
                "memory_alpha 'channel' makes forget rates for the inputs of each matrix; "
                "it goes with memory_gates 'matrix' and memory_forgetting only"
            )
        for mixer in self.mixers:
            mixer.check(self)

    def _check_variant(self) -> None:
        from .mixers import MIXERS  # at use: their files read this one

        names = self.variant.split("+")
        if not set(names) <= set(MIXERS):
            raise ValueError(
                f"variant is {self.variant!r}; it must be one of {', '.join(MIXERS)}, or several of them joined by +"
            )
        if len(names) > self.num_layers > 0:
            raise ValueError(
                f"variant {self.variant} has {len(names)} mixers that take turns over num_layers {self.num_layers}; "
                "leave some out, or add layers"
            )

    def _check_memory_shape(self) -> None:
        channels = self.memory_shape.channels
        one, other = ("memory_heads", "memory_head_dim") if self.memory_heads else ("memory_head_dim", "memory_heads")
        if channels != self.dim and not getattr(self, other):
            raise ValueError(
                f"dim {self.dim} is not divisible by {one} {getattr(self, one)}; change one of them, or set {other} too"
            )

    @property
    def mixers(self) -> "tuple[MixerSpec, ...]":
        """The token mixers that take turns over the blocks."""
        from .mixers import MIXERS

        return tuple(MIXERS[name] for name in self.variant.split("+"))

    @property
    def blocks(self) -> "tuple[MixerSpec, ...]":
        """The token mixer of each block."""
        mixers = self.mixers
        return tuple(mixers[block % len(mixers)] for block in range(self.num_layers))

    @property
    def head_dim(self) -> int:
        """Width of one head of the attention."""
        return self.dim // self.num_heads

    @property
    def memory_shape(self) -> MemoryShape:
        """Heads of the memory and their width, where memory_heads or memory_head_dim is 0 too."""
        if self.memory_heads and self.memory_head_dim:
            return MemoryShape(self.memory_heads, self.memory_head_dim)
        if self.memory_heads:
            return MemoryShape(self.memory_heads, self.dim // self.memory_heads)
        widths = range(min(self.dim, _KERNELS_WIDTH), 0, -1)
        width = self.memory_head_dim or next(width for width in widths if self.dim % width == 0)
        return MemoryShape(self.dim // width, width)

    @property
    def memory_widths(self) -> list[int]:
        """Widths of the memory network from input to output, L + 1 numbers: D, hidden ..., D."""
        width = self.memory_shape.width
        return [width, *[width * self.memory_expansion] * (self.memory_depth - 1), width]

    def spelled_out(self) -> "TitansConfig":
        """The same model with the memory's heads in numbers, for comparisons."""
        shape = self.memory_shape
        return replace(self, memory_heads=shape.heads, memory_head_dim=shape.width)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for files."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TitansConfig":
        """The configuration of a saved file.

        Raises:
            ValueError: A setting is unknown or does not fit.
        """
        unknown = sorted(set(settings) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown model settings: {', '.join(unknown)}; written by another version of the model?")
        return cls(**with_memory_heads(settings))


def with_memory_heads(settings: dict[str, Any]) -> dict[str, Any]:
    """A saved model's settings; before memory_heads was one of them, the memory had the attention's heads."""
    from .mixers import MIXERS

    names = settings.get("variant", TitansConfig.variant).split("+")
    if "memory_heads" in settings or not any(MIXERS[name].memory for name in names if name in MIXERS):
        return settings
    return {**settings, "memory_heads": settings.get("num_heads", TitansConfig.num_heads)}


def check_choices(settings: Any, section: str = "") -> None:
    """Refuses a value that is not of the words which its setting, a Literal, allows.

    Args:
        settings: A dataclass.
        section: Stands before a setting's name in the message.

    Raises:
        ValueError: It names the setting, the value and the words.
    """
    for setting in fields(settings):
        value, words = getattr(settings, setting.name), get_args(setting.type)
        if get_origin(setting.type) is Literal and value not in words:
            raise ValueError(f"{section}{setting.name} is {value!r}; it must be one of {', '.join(words)}")
