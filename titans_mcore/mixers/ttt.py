"""TTT-Linear and TTT-MLP (Sun et al., arXiv 2407.04620): weights that take a gradient step for every token.

    W_t = W - i_t sum_(j <= t) r_j dl_j/dW        o_t = q_t + LN(f(q_t; W_t))        f, l and LN in linear/ttt.py
    r_j = base / K sigmoid(w x_j + c)             i_t = max(0, 1 / t + d_t), t = 1 to 16

base is 1 with a linear f and 0.1 with an MLP of width 4 K. Around it stands what the paper calls the Mamba backbone:
x + conv(RMSNorm(x)) before the block's norm; one projection makes queries and keys, each by a convolution of its own;
the heads' answers pass a LayerNorm over all E channels, whose sums tensor-parallel ranks add up, and are gated with
GELU(W_g x). All three convolutions have a bias and nothing behind. Heads are 64 wide where E allows.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TitansConfig
from ..linear import ttt_scan
from ..linear.ttt import MINI_BATCH, TTT_EPS, TTT_SPAN, FastWeights
from ..memory import PackedRows, TensorTree
from .costs import FLOAT32, Workload
from .linear import LinearShape, LinearSpec, initial_taps, linear_heads, short_conv
from .parts import FromParts, Parts, heads_of, linear, rms_norm, widened
from .spec import MixerSpec, register

_START_STD = 0.02  # of the weights that a sequence begins with


@dataclass
class TTTState(TensorTree):
    """What such a mixer carries through time.

    Attributes:
        fast: Weights of every head, and what an open mini-batch has written; None before the first token.
        tail: The last tokens that went into the convolutions of queries and keys, (B, taps - 1, H, K); likewise.
        front_tail: Those that went into the one before the block's norm, (B, taps - 1, 1, E).
    """

    fast: FastWeights | None = None
    tail: Tensor | None = None
    front_tail: Tensor | None = None


class ResidualConv(FromParts):
    """x + conv(RMSNorm(x)), which every tensor-parallel rank computes alike.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts, self.eps = parts, config.norm_eps
        self.norm = parts.replicated(torch.ones(config.dim))
        self.kernel = parts.replicated(initial_taps(1, config.dim, config.conv_kernel))
        self.bias = parts.replicated(initial_taps(1, config.dim, config.conv_kernel)[..., 0])

    def forward(self, x: Tensor, state: TTTState | None, rows: PackedRows | None = None) -> tuple[Tensor, TTTState]:
        """x as the block holds it, (B, T', E), and the state with what the next piece needs of these tokens."""
        state = state or TTTState()
        normed = rms_norm(
            self.parts.gather_from_sp_region(x, tensor_parallel_output_grad=False), self.norm, self.eps
        ).unsqueeze(2)
        out, tail = short_conv(normed, state.front_tail, self.kernel, rows, self.bias)
        return x + self.parts.scatter_to_sp_region(out.squeeze(2)), replace(state, front_tail=tail)


def fast_widths(keys: int, expansion: int) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrices of a head's network; an expansion of 0 is one matrix."""
    return [(keys, expansion * keys), (expansion * keys, keys)] if expansion else [(keys, keys)]


class TTTMixer(FromParts):
    """Test-time training.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    expansion: int
    base_rate: float

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        heads, keys, _ = self.shape = ttt_shape(config)
        self.config, self.parts, taps = config, parts.with_heads(heads), config.conv_kernel
        per_head = self.parts.per_head
        self.front = ResidualConv(config, self.parts)
        self.projection = self.parts.column(config.dim, keys, keys, keys, 1)  # a head: query and key, value, gate, rate
        self.query_kernel, self.key_kernel = (per_head(initial_taps(heads, keys, taps)) for _ in range(2))
        self.query_bias, self.key_bias = (per_head(initial_taps(heads, keys, taps)[..., 0]) for _ in range(2))
        self.rate_bias = per_head(torch.zeros(heads))
        self.places = self.parts.replicated(torch.zeros(MINI_BATCH))  # d
        start = [
            made
            for d_in, d_out in fast_widths(keys, self.expansion)
            for made in (_START_STD * torch.randn(heads, d_in, d_out), torch.zeros(heads, 1, d_out))
        ]
        self.initial_weights = nn.ParameterList([per_head(x) for x in start])
        self.norm_weight, self.norm_bias = per_head(torch.ones(heads, keys)), per_head(torch.zeros(heads, keys))
        self.output_norm, self.output_bias = per_head(torch.ones(heads, keys)), per_head(torch.zeros(heads, keys))
        self.output = self.parts.last_row(config.dim, config.dim)

    def forward(self, x: Tensor, state: TTTState | None, rows: PackedRows | None = None) -> tuple[Tensor, TTTState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        keys, state = self.shape.keys, state or TTTState()
        projected = heads_of(linear(self.projection, self.parts.gather_from_sp_region(x)), self.parts.heads)
        shared, values, gate, rate = projected.split([keys, keys, keys, 1], -1)
        queries, tail = short_conv(shared, state.tail, self.query_kernel, rows, self.query_bias)
        read, fast = ttt_scan(
            queries,
            short_conv(shared, state.tail, self.key_kernel, rows, self.key_bias)[0],
            values,
            self.base_rate / keys * (widened(rate.squeeze(-1)) + widened(self.rate_bias)).sigmoid(),
            self._places(),
            self.norm_weight,
            self.norm_bias,
            list(self.initial_weights),
            rope_base=self.config.rope_base,
            state=state.fast,
            rows=rows,
        )
        answer = F.gelu(gate, approximate="tanh") * self._normed(read)
        return self.parts.finish(self.output, answer.flatten(2)), TTTState(fast, tail, state.front_tail)

    def _places(self) -> Tensor:
        """i, which all heads of all ranks share."""
        learned = widened(self.parts.copy_to_tp_region(self.places))
        return F.relu(1.0 / torch.arange(1, MINI_BATCH + 1, dtype=learned.dtype, device=learned.device) + learned)

    def _normed(self, x: Tensor) -> Tensor:
        """LayerNorm of x (B, T, heads, K) over the channels of all heads of all ranks."""
        wide = widened(x)
        sums = torch.stack([wide.sum((-2, -1)), wide.square().sum((-2, -1))], -1)
        mean, square = (self.parts.sum_over_tp_region(sums) / self.config.dim)[..., None, None, :].unbind(-1)
        variance = (square - mean.square()).clamp_min(0.0)
        return ((wide - mean) * torch.rsqrt(variance + TTT_EPS)).to(x.dtype) * self.output_norm + self.output_bias


def ttt_shape(config: TitansConfig) -> LinearShape:
    """Its heads; keys and values share E channels each."""
    heads = linear_heads(config, config.dim, 64)
    return LinearShape(heads, config.dim // heads, config.dim // heads)


class TTTSpec(LinearSpec):
    """Weights that learn, which go from rank to rank and piece to piece in order only.

    Operations for one token and head, for each matrix of m inputs and n outputs, with b tokens in a mini-batch: the
    keys' pass 2 m n, errors back 2 m n where another matrix is below, the queries' pass 2 m n, what is written 2 m n,
    inside the mini-batch 2 b (m + n).
    """

    paper = "TTT"
    state = TTTState
    composes = False
    messages, composing_flops = MixerSpec.messages, MixerSpec.composing_flops
    module: type[TTTMixer]
    front = True
    beginnings = ("initial_weights",)
    rotary = True

    def channels(self, config: TitansConfig) -> dict[str, int]:
        """As many of values as of keys."""
        return {"keys": config.dim, "values": config.dim}

    def shape(self, config: TitansConfig) -> LinearShape:
        """Heads of 64 where that goes."""
        return ttt_shape(config)

    def convolved_channels(self, config: TitansConfig) -> tuple[int, int]:
        """What queries and keys are made of; hidden states, which all ranks hold whole."""
        return config.dim, config.dim

    def widths(self, config: TitansConfig) -> list[tuple[int, int]]:
        """Inputs and outputs of a head's matrices."""
        return fast_widths(self.shape(config).keys, self.module.expansion)

    def flops(self, config: TitansConfig, length: int, tokens: int, persistent: int) -> dict[str, int]:
        """Operations of the scan."""
        size = min(MINI_BATCH, length)
        each = [(8 if i else 6) * m * n + 2 * size * (m + n) for i, (m, n) in enumerate(self.widths(config))]
        return {"scan": tokens * self.shape(config).heads * sum(each)}

    def state_bytes(self, work: Workload) -> float:
        """Weights of every head."""
        numbers = sum(m * n + n for m, n in self.widths(work.config))
        return FLOAT32 * work.rows * self.shape(work.config).heads * numbers / work.ranks

    def states_kept(self, work: Workload) -> float:
        """One for each span of the scan, but for the weights that a sequence begins with."""
        spans = math.ceil(work.length / (MINI_BATCH * TTT_SPAN))
        return self.state_bytes(work) * (spans if work.before else spans - 1)

    def at_work(self, work: Workload) -> float:
        """One span, forth and back: weights and what is written of every mini-batch, and tokens on their way."""
        (heads, keys, _), tokens = self.shape(work.config), min(work.length, MINI_BATCH * TTT_SPAN)
        passed = 16 * keys + sum(10 * n for _, n in self.widths(work.config))
        states = 3 * self.state_bytes(work) * tokens / MINI_BATCH
        return states + 2 * FLOAT32 * work.rows * tokens * heads * passed / work.ranks

    def message(self, work: Workload) -> int:
        """Weights, and where ranks cut a mini-batch what it has written; the tokens that convolutions keep."""
        cut = work.length % MINI_BATCH > 0
        return super().message(work) + cut * (int(self.state_bytes(work)) + 8 * work.rows)

    def kept(self, work: Workload) -> float:
        """Projections, inputs and results of the convolutions of queries and keys, the gate, reads up to the product;
        in float32 the reads, with and without their mean. In front, whole: what is normalised and the
        convolution's input. With documents the taps' gathers, and values in mini-batches.
        """
        whole, own, taps = work.config.dim, work.e, work.config.conv_kernel - 1
        documents = work.w * (taps * (2 * own + whole) + own) if work.documents else 0.0
        return work.w * (11 * own + 2 * whole) + FLOAT32 * 2 * own + documents


class TTTLinearMixer(TTTMixer):
    """One matrix a head."""

    expansion = 0
    base_rate = 1.0


@register
class TTTLinear(TTTSpec):
    """Weights of one matrix."""

    name = "ttt_linear"
    title = "TTT-Linear"
    module = TTTLinearMixer


class TTTMLPMixer(TTTMixer):
    """Two matrices a head."""

    expansion = 4
    base_rate = 0.1


@register
class TTTMLP(TTTSpec):
    """Weights of two matrices."""

    name = "ttt_mlp"
    title = "TTT-MLP"
    module = TTTMLPMixer
