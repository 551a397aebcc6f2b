"""What mixers of a linear recurrence have in common: heads, convolution, initial values, state and costs.

Their heads are of the published width where the model is wide enough; how wide, each says itself. Matrices begin like
all of the project's, and convolutions as PyTorch's do, which is what the released implementations leave them at.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import TitansConfig
from ..linear.handover import Handover
from ..linear.scan import CHUNK, SPAN, linear_scan
from ..memory import PackedRows, TensorTree
from .costs import FLOAT32, Workload
from .parts import FromParts, Parts, causal_conv, copy_rows, next_token_kernels, widened, written
from .spec import Heads, MixerSpec


class LinearShape(NamedTuple):
    """Heads of a linear recurrence.

    Attributes:
        heads: H of them.
        keys: K, the width of a head's queries and keys.
        values: V, the width of its values.
    """

    heads: int
    keys: int
    values: int


@dataclass
class LinearState(TensorTree):
    """What such a mixer carries through time.

    Attributes:
        matrix: S of every head, (B, H, K, V), float32 at least; of Mamba (B, F, N).
        tail: The last tokens that went into the convolution, (B, taps - 1, H, F); None without one.
        shared_tail: Likewise of what all heads share, (B, taps - 1, 1, F); None where they share nothing.
    """

    matrix: Tensor
    tail: Tensor | None = None
    shared_tail: Tensor | None = None

    def part(self, name: str, sent: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """See Earlier."""
        found: Tensor | None = getattr(self, name)
        return found


class Earlier(Protocol):
    """The state before a piece: a LinearState, or one that other ranks are still at work on."""

    def part(self, name: str, sent: Callable[[Tensor], Tensor] | None = None) -> Tensor | Handover | None:
        """A part of it, or where it comes from; `sent` is done to the one behind the piece before that goes on."""


def linear_heads(config: TitansConfig, channels: int, width: int) -> int:
    """Heads that so many channels make: as the settings say, or of the largest width up to `width` that goes."""
    return config.linear_heads or next(channels // each for each in range(width, 0, -1) if channels % each == 0)


def convolved(
    x: Tensor,
    tail: Tensor | Handover | None,
    kernel: Tensor,
    rows: PackedRows | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SiLU of short_conv, whose arguments and tail these are."""
    out, tail = short_conv(x, tail, kernel, rows, bias)
    return F.silu(out), tail


def short_conv(
    x: Tensor,
    tail: Tensor | Handover | None,
    kernel: Tensor,
    rows: PackedRows | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A causal depthwise convolution.

    Args:
        x: (B, T, H, F).
        tail: What an earlier piece left, or where it comes from; None at the start of a sequence.
        kernel: (H, F, taps), the last tap is the token's own.
        rows: Documents and padding.
        bias: (H, F); None for none.

    Returns:
        (B, T, H, F), and the tail for the next piece.
    """
    kept = kernel.shape[-1] - 1
    if isinstance(tail, Tensor):
        out, tail = causal_conv(x, tail, kernel, rows)
    else:
        nothing = x.new_zeros(len(x), kept, *x.shape[2:])
        if tail is None or not kept:
            out, tail = causal_conv(x, nothing, kernel, rows)
        else:
            out, tail = _handed_tail(tail, x, nothing, kernel, rows)
    return out if bias is None else out + bias, tail


def _handed_tail(
    handover: Handover, x: Tensor, nothing: Tensor, kernel: Tensor, rows: PackedRows | None
) -> tuple[Tensor, Tensor]:
    """causal_conv of a piece whose tail comes from elsewhere, `nothing` at the start of a sequence."""
    kept = nothing.shape[1]
    if handover.first:
        out, tail = causal_conv(x, nothing if handover.given is None else handover.given, kernel, rows)
        return handover.pass_on(tail, out), tail
    if x.shape[1] < kept or (rows is not None and rows.real is not None):
        before = handover.receive(torch.cat([nothing, x], 1)[:, -kept:])
        out, tail = causal_conv(x, before, kernel, rows)
        return handover.pass_on(tail, out), tail
    # The last tokens are the piece's own: they go on before those in front of it have come.
    starts = None if rows is None or rows.starts is None else PackedRows(rows.starts[:, -kept:])
    _, tail = causal_conv(x[:, -kept:], nothing, kernel, starts)
    x = handover.pass_on(tail, x)
    return causal_conv(x, handover.receive(tail), kernel, rows)


def key_norm(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) over the last axis, as the released DeltaNet and Gated DeltaNet have it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class DeltaMixer(FromParts):
    """What mixers of the delta rule have in common: queries, keys and values of one map that pass a convolution.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
        shape: Of the heads.
        others: Widths of what the map makes beside them, for each head.
    """

    def __init__(self, config: TitansConfig, parts: Parts, shape: LinearShape, *others: int) -> None:
        super().__init__()
        heads, keys, values = self.shape = shape
        self.parts, self.eps, self.backend = parts.with_heads(heads), config.norm_eps, config.linear_backend
        self.recalls = config.memory_init == "next_token"
        self.projection = self.parts.column(config.dim, keys, keys, values, *others)
        self.begin_recalling()
        taps = config.conv_kernel
        if self.recalls:
            kernel = next_token_kernels(heads, keys, values, taps)
        else:
            kernel = initial_taps(heads, 2 * keys + values, taps)
        self.kernel = self.parts.per_head(kernel)
        self.output_norm = self.parts.per_head(torch.ones(heads, values))
        self.output = self.parts.last_row(heads * values, config.dim)

    def begin_recalling(self) -> None:
        """Keys get the map of queries where config.memory_init says so."""
        if self.recalls:
            copy_rows(self.projection, self.projection, self.parts.heads, self.shape.keys, at=self.shape.keys)


def delta_scan(
    tokens: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    shape: LinearShape,
    state: Earlier | None,
    rows: PackedRows | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The delta rule over normalised queries and keys.

    Args:
        tokens: Queries, keys and values behind their convolution, (B, T, H, 2 K + V).
        beta: Before its sigmoid, (B, T, H, 1).
        log_decay: (B, T, H); None where nothing decays.
        shape: K and V.
        state: What an earlier piece left.
        rows: Documents and padding.
        backend: See linear_scan.

    Returns:
        What linear_scan does.
    """
    q, k, v = tokens.split([shape.keys, shape.keys, shape.values], -1)
    step = widened(beta.squeeze(-1)).sigmoid()
    written(lambda: step)
    return linear_scan(
        key_norm(q),
        key_norm(k),
        v,
        log_decay,
        step,
        scale=shape.keys**-0.5,
        state=None if state is None else state.part("matrix"),
        rows=rows,
        backend=backend,
    )


def wider(work: Workload) -> int:
    """Bytes of a float32 copy of an activation, which there is where activations are narrower."""
    return FLOAT32 if work.w < FLOAT32 else 0


def initial_taps(heads: int, channels: int, taps: int) -> Tensor:
    """Kernels (H, F, taps) of a convolution, uniform between +-1 / sqrt(taps)."""
    return (2.0 * torch.rand(heads, channels, taps) - 1.0) / math.sqrt(taps)


def initial_dt_bias(*shape: int) -> Tensor:
    """Biases whose softplus is log-uniform from 1e-3 to 1e-1, Mamba's initial time steps."""
    step = torch.exp(torch.empty(*shape).uniform_(math.log(1e-3), math.log(1e-1)))
    return step + torch.log(-torch.expm1(-step))


class LinearSpec(MixerSpec):
    """A mixer of a linear recurrence, which has neither attention nor a memory that is a network.

    Operations of the scan count as those of attention and memory do (costs.py), with b tokens in a chunk, for one token
    and head of K x V: scores 2 b K and their sum over values 2 b V, reading and adding to the state 2 K V each; the
    delta rule has scores of keys 2 b K, a triangular system 2 b (K + V), taken as the product that it saves, and what
    the state holds of a key, 2 K V. Heads that share keys have their scores once.

    Attributes:
        width: Of a head's keys, as published.
        shared: Whether all heads share queries and keys, which tensor-parallel ranks then hold whole.
        rotary: Whether queries and keys carry rotary positions.
    """

    state: type[TensorTree] = LinearState
    composes = True
    width: int
    shared = False
    rotary = False

    def channels(self, config: TitansConfig) -> dict[str, int]:
        """Of all heads' keys and values."""
        raise NotImplementedError

    def shape(self, config: TitansConfig) -> LinearShape:
        """Its heads: as many as the settings say, or of the largest width up to the published one that goes."""
        keys, values = self.channels(config).values()
        heads = linear_heads(config, keys, self.width)
        return LinearShape(heads, keys // heads, values // heads)

    def convolved_channels(self, config: TitansConfig) -> tuple[int, int]:
        """Channels that are convolved: of all heads, and shared ones."""
        heads, keys, values = self.shape(config)
        return heads * (2 * keys + values), 0

    def check(self, config: TitansConfig) -> None:
        """Whether heads divide the channels, and are of an even width where they carry positions.

        Raises:
            ValueError: They do not, or are not.
        """
        heads, keys, _ = self.shape(config)
        for of, channels in self.channels(config).items():
            if channels % heads:
                raise ValueError(
                    f"linear_heads is {heads}, and {self.name} has {channels} channels of {of} at dim {config.dim}, "
                    f"which {heads} does not divide; change one of them"
                )
        if self.rotary and keys % 2:
            raise ValueError(
                f"{self.name}'s heads are {keys} wide at dim {config.dim}; rotary positions need an even head width: "
                "change linear_heads or dim"
            )

    def heads(self, config: TitansConfig) -> dict[str, Heads]:
        """Its own."""
        heads, keys, _ = self.shape(config)
        return {self.title: Heads("linear_heads", heads, keys)}

    def flops(self, config: TitansConfig, length: int, tokens: int, persistent: int) -> dict[str, int]:
        """Operations of the scan."""
        (heads, keys, values), size = self.shape(config), min(CHUNK, length)
        found = 2 * size * ((1 if self.shared else heads) * keys + heads * values) + 4 * heads * keys * values
        if self.delta:
            found += heads * (2 * size * (2 * keys + values) + 2 * keys * values)
        return {"scan": tokens * found}

    def state_bytes(self, work: Workload) -> float:
        """S of every head."""
        heads, keys, values = self.shape(work.config)
        return FLOAT32 * work.rows * heads * keys * values / work.ranks

    def states_kept(self, work: Workload) -> float:
        """One for each span of the scan, and the one in front that comes from another rank."""
        columns = self.columns(work) / self.shape(work.config).values
        return self.state_bytes(work) * (columns * math.ceil(work.length / SPAN) + (work.before > 0))

    def at_work(self, work: Workload) -> float:
        """One span, forth and back: tokens in chunks and what becomes of them, masks and scores, a state a chunk."""
        (heads, keys, _), values, size = self.shape(work.config), self.columns(work), min(CHUNK, work.length)
        each = heads * (3 * keys + 8 * values + (7 if self.delta else 4) * size + 2 * keys * values / size)
        return 2 * FLOAT32 * work.rows * min(work.length, SPAN) * each / work.ranks

    def message(self, work: Workload) -> int:
        """S and the tokens that convolutions keep."""
        own, shared = self.convolved_channels(work.config)
        tails = work.rows * work.w * (work.config.conv_kernel - 1) * (own // work.ranks + shared)
        return int(self.state_bytes(work)) + tails

    def columns(self, work: Workload) -> int:
        """Of a head's state in the scan: V, and K with the delta rule where the state in front is not there yet."""
        _, keys, values = self.shape(work.config)
        return values + (keys if self.delta and work.before else 0)

    def messages(self, config: TitansConfig) -> int:
        """One for S and one for each convolution."""
        return 1 + (config.conv_kernel > 1) * sum(channels > 0 for channels in self.convolved_channels(config))

    def composing_flops(self, config: TitansConfig, tokens: int) -> int:
        """What tokens read of the state that comes; with the delta rule they scan K columns more."""
        (heads, keys, values), size = self.shape(config), CHUNK
        return tokens * heads * (2 * keys * values + ((2 * size + 6 * keys) * keys if self.delta else 0))

    def on_rank(self, work: Workload) -> tuple[float, float, float]:
        """Channels of keys and of values on a rank, and bytes of a token's gathers for the convolution's taps.

        Beside these, what the delta rule reads of a state in front that is not there yet, and what it reads else.
        """
        heads, keys, values = self.shape(work.config)
        own, shared = self.convolved_channels(work.config)
        beside = (work.config.conv_kernel - 1) * work.w * (own / work.ranks + shared) if work.documents else 0.0
        if (columns := self.columns(work)) > values:
            beside += work.w * heads * columns / work.ranks
        return keys * (1 if self.shared else heads / work.ranks), heads * values / work.ranks, beside
