"""Mamba (Gu, Dao, arXiv 2312.00752): 16 numbers for each of 2 E channels, whose time steps depend on the token.

    h_t = exp(s_t A) h_{t-1} + s_t B_t u_t        y_t = C_t h_t + D u_t        A = -exp(A_log)
    s_t = softplus(W_dt r_t + dt_bias)            (r_t, B_t, C_t) = W_x u_t, r of ceil(E / 16)

u passes a convolution with bias and SiLU; y is gated with SiLU(z), without a norm. Tensor-parallel ranks share the
channels; what W_x makes of them all is summed over ranks.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import TitansConfig
from ..linear import selective_scan
from ..linear.selective import SELECTIVE_SPAN
from ..memory import PackedRows
from .costs import FLOAT32, Workload
from .linear import Earlier, LinearShape, LinearSpec, LinearState, convolved, initial_dt_bias, initial_taps
from .parts import FromParts, Parts, heads_of, linear, product, widened
from .spec import Heads, register

_NUMBERS = 16  # N, of a channel


def time_step_rank(config: TitansConfig) -> int:
    """Width of what time steps are made of."""
    return math.ceil(config.dim / 16)


class TimeSteps(FromParts):
    """s = softplus(W_dt r + dt_bias), for each channel.

    Args:
        config: The model's settings.
        parts: Makes the parameters, by channel.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        channels, rank = 2 * config.dim, time_step_rank(config)
        self.weight = parts.per_head(torch.empty(channels, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.bias = parts.per_head(initial_dt_bias(channels))

    def forward(self, r: Tensor) -> Tensor:
        """(B, T, R), which has passed Parts.copy_to_tp_region(), to the process's channels, in float32 at least."""
        return F.softplus(widened(product(r, self.weight)) + widened(self.bias))


class MambaMixer(FromParts):
    """The selective state space of Mamba.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        channels, self.rank, taps = 2 * config.dim, time_step_rank(config), config.conv_kernel
        self.parts = parts.with_heads(channels)
        self.projection = self.parts.column(config.dim, 1, 1)  # a channel: u, z
        self.kernel = self.parts.per_head(initial_taps(channels, 1, taps))
        self.bias = self.parts.per_head(initial_taps(channels, 1, taps)[..., 0])
        self.selection = self.parts.row(channels, self.rank + 2 * _NUMBERS, residual=False)  # W_x
        self.steps = TimeSteps(config, self.parts)
        self.A_log = self.parts.per_head(torch.arange(1.0, _NUMBERS + 1).log().expand(channels, -1))
        self.D = self.parts.per_head(torch.ones(channels))
        self.output = self.parts.last_row(channels, config.dim)

    def forward(self, x: Tensor, state: Earlier | None, rows: PackedRows | None = None) -> tuple[Tensor, LinearState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        u, z = heads_of(linear(self.projection, self.parts.gather_from_sp_region(x)), self.parts.heads).split(1, -1)
        u, tail = convolved(u, None if state is None else state.part("tail"), self.kernel, rows, self.bias)
        u, z = u.squeeze(-1), z.squeeze(-1)
        selected = self.parts.copy_to_tp_region(linear(self.selection, u))
        r, b, c = selected.split([self.rank, _NUMBERS, _NUMBERS], -1)
        before = None if state is None else state.part("matrix")
        y, held = selective_scan(u, self.steps(r), -widened(self.A_log).exp(), b, c, state=before, rows=rows)
        answer = (y + self.D * u) * F.silu(z)
        return self.parts.finish(self.output, answer), LinearState(held, tail)


@register
class Mamba(LinearSpec):
    """A state of numbers for each channel."""

    name = "mamba"
    title = "Mamba"
    paper = "Mamba"
    module = MambaMixer

    def shape(self, config: TitansConfig) -> LinearShape:
        """Every channel is a head, in whose state values of one number meet keys of 16."""
        return LinearShape(2 * config.dim, _NUMBERS, 1)

    def check(self, config: TitansConfig) -> None:
        """There are no heads that might not fit."""

    def heads(self, config: TitansConfig) -> dict[str, Heads]:
        """Channels, which are dealt out like heads."""
        return {self.title: Heads("mamba's channels, 2 x dim,", *self.shape(config)[:2])}

    def convolved_channels(self, config: TitansConfig) -> tuple[int, int]:
        """u."""
        return 2 * config.dim, 0

    def flops(self, config: TitansConfig, length: int, tokens: int, persistent: int) -> dict[str, int]:
        """None that count: nothing in the scan is a product of matrices."""
        return {}

    def composing_flops(self, config: TitansConfig, tokens: int) -> int:
        """None that count, either."""
        return 0

    def at_work(self, work: Workload) -> float:
        """One span, forth and back: decays, writes, states twice, and what chunks keep, 16 numbers a channel each."""
        tokens = work.rows * min(work.length, SELECTIVE_SPAN)
        return 2 * FLOAT32 * tokens * 6 * _NUMBERS * 2 * work.config.dim / work.ranks

    def states_kept(self, work: Workload) -> float:
        """One for each span of the scan, and the one in front that comes from another rank."""
        return self.state_bytes(work) * (math.ceil(work.length / SELECTIVE_SPAN) + (work.before > 0))

    def kept(self, work: Workload) -> float:
        """u and z, u on its way through convolution and SiLU, its sum with the reads, the gate's SiLU, the product; in
        float32 what time steps are made of, and they; their sums where a state in front is read.
        """
        channels = 2 * work.config.dim / work.ranks
        _, _, gathers = self.on_rank(work)
        selected = time_step_rank(work.config) + 2 * _NUMBERS
        steps = (3 if work.before else 2) * FLOAT32 * channels
        return work.w * (8 * channels + selected) + steps + gathers
