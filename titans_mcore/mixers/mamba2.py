"""Mamba2 (Dao, Gu, arXiv 2405.21060): a matrix a head that forgets and is added to by a time step of the token's.

    S_t = exp(-s_t exp(A_log)) S_{t-1} + s_t B_t u_t^T        y_t = S_t^T C_t + D u_t
    s_t = softplus(dt_t + dt_bias)

The values u have 2 E channels in heads of 64 where E allows; B and C of 128 are one for all heads, a single group.
u, B and C pass a convolution with bias and SiLU. What comes out is gated with SiLU(z) first and then normalised, over
the channels of all heads, so that tensor-parallel ranks add up their squares; B and C they hold whole.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import TitansConfig
from ..linear import linear_scan
from ..memory import PackedRows
from .costs import FLOAT32, Workload
from .linear import (
    Earlier,
    LinearShape,
    LinearSpec,
    LinearState,
    convolved,
    initial_dt_bias,
    initial_taps,
    linear_heads,
)
from .parts import FromParts, Parts, heads_of, linear, widened
from .spec import register


class Mamba2Mixer(FromParts):
    """The state space of Mamba2.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        heads, keys, values = self.shape = Mamba2().shape(config)
        self.parts, self.eps, taps = parts.with_heads(heads), config.norm_eps, config.conv_kernel
        self.backend = config.linear_backend
        self.projection = self.parts.column(config.dim, values, values, 1)  # a head: z, u, dt
        self.shared = self.parts.whole(config.dim, 2 * keys)  # B, C
        self.kernel = self.parts.per_head(initial_taps(heads, values, taps))
        self.bias = self.parts.per_head(initial_taps(heads, values, taps)[..., 0])
        self.shared_kernel = self.parts.replicated(initial_taps(1, 2 * keys, taps))
        self.shared_bias = self.parts.replicated(initial_taps(1, 2 * keys, taps)[..., 0])
        self.A_log = self.parts.per_head(torch.empty(heads).uniform_(1.0, 16.0).log())
        self.dt_bias = self.parts.per_head(initial_dt_bias(heads))
        self.D = self.parts.per_head(torch.ones(heads))
        self.output_norm = self.parts.per_head(torch.ones(heads, values))
        self.output = self.parts.last_row(heads * values, config.dim)

    def forward(self, x: Tensor, state: Earlier | None, rows: PackedRows | None = None) -> tuple[Tensor, LinearState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        heads, _, values = self.shape
        x = self.parts.gather_from_sp_region(x)
        z, u, dt = heads_of(linear(self.projection, x), self.parts.heads).split([values, values, 1], -1)
        u, tail = convolved(u, None if state is None else state.part("tail"), self.kernel, rows, self.bias)
        shared = heads_of(linear(self.shared, x), 1)
        before = None if state is None else state.part("shared_tail")
        shared, shared_tail = convolved(shared, before, self.shared_kernel, rows, self.shared_bias)
        b, c = self.parts.copy_to_tp_region(shared).chunk(2, -1)
        step = F.softplus(widened(dt.squeeze(-1)) + widened(self.dt_bias))
        read, matrix = linear_scan(
            c,
            b,
            u * step.unsqueeze(-1),
            -step * widened(self.A_log).exp(),
            state=None if state is None else state.part("matrix"),
            rows=rows,
            backend=self.backend,
        )
        y = (read + self.D.unsqueeze(-1) * u) * F.silu(z)
        mean = self.parts.sum_over_tp_region(y.square().sum((-2, -1), keepdim=True)) / (heads * values)
        answer = (y * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.output_norm
        return self.parts.finish(self.output, answer.flatten(2)), LinearState(matrix, tail, shared_tail)


@register
class Mamba2(LinearSpec):
    """A decay and a time step of the token's."""

    name = "mamba2"
    title = "Mamba2"
    paper = "Mamba2"
    module = Mamba2Mixer
    width = 128
    shared = True

    def channels(self, config: TitansConfig) -> dict[str, int]:
        """All heads divide the values alone."""
        return {"values": 2 * config.dim}

    def shape(self, config: TitansConfig) -> LinearShape:
        """Heads have values of 64 where that goes."""
        heads = linear_heads(config, 2 * config.dim, 64)
        return LinearShape(heads, self.width, 2 * config.dim // heads)

    def convolved_channels(self, config: TitansConfig) -> tuple[int, int]:
        """u of all heads; B and C."""
        return 2 * config.dim, 2 * self.width

    def kept(self, work: Workload) -> float:
        """z, u and dt, u on its way through convolution and SiLU, the gate's SiLU, what is normalised and scaled; in
        float32 the scan's values, its reads with what passes beside, gated; B and C on their way.
        """
        keys, values, gathers = self.on_rank(work)
        return work.w * (8 * values + 6 * keys) + FLOAT32 * 3 * values + gathers
