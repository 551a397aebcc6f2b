"""Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv 2412.06464): a matrix that replaces what keys stand for, and forgets.

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(K)
    log a_t = -exp(A_log) softplus(W_a x_t + dt_bias)                  beta_t = sigmoid(W_b x_t)

Queries, keys and values pass a convolution and SiLU, queries and keys are normalised; each head's answer is normalised
and then gated with SiLU. Queries and keys have 3/4 E channels, values 3/2 E, in heads of 128 and 256 where E allows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import TitansConfig
from ..memory import PackedRows
from .costs import Workload
from .linear import (
    DeltaMixer,
    Earlier,
    LinearSpec,
    LinearState,
    convolved,
    delta_scan,
    initial_dt_bias,
    wider,
)
from .parts import Parts, heads_of, linear, rms_norm, widened
from .spec import register


class GatedDeltaNetMixer(DeltaMixer):
    """The gated delta rule.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        shape = GatedDeltaNet().shape(config)
        super().__init__(config, parts, shape, shape.values, 1, 1)  # output gates, and numbers for beta and the decay
        # Uniform up to 16; from 0.01 on, since the logarithm of 0 is none.
        self.A_log = self.parts.per_head(torch.empty(shape.heads).uniform_(0.01, 16.0).log())
        self.dt_bias = self.parts.per_head(initial_dt_bias(shape.heads))

    def forward(self, x: Tensor, state: Earlier | None, rows: PackedRows | None = None) -> tuple[Tensor, LinearState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        _, keys, values = self.shape
        projected = heads_of(linear(self.projection, self.parts.gather_from_sp_region(x)), self.parts.heads)
        tokens, gate, beta, step = projected.split([2 * keys + values, values, 1, 1], -1)
        tokens, tail = convolved(tokens, None if state is None else state.part("tail"), self.kernel, rows)
        log_decay = -widened(self.A_log).exp() * F.softplus(widened(step.squeeze(-1)) + widened(self.dt_bias))
        read, matrix = delta_scan(tokens, beta, log_decay, self.shape, state, rows, self.backend)
        answer = rms_norm(read, self.output_norm, self.eps) * F.silu(gate)
        return self.parts.finish(self.output, answer.flatten(2)), LinearState(matrix, tail)


@register
class GatedDeltaNet(LinearSpec):
    """The delta rule with a decay."""

    name = "gated_deltanet"
    title = "Gated DeltaNet"
    paper = "Gated DeltaNet"
    module = GatedDeltaNetMixer
    width = 128
    delta = True

    def channels(self, config: TitansConfig) -> dict[str, int]:
        """Values are twice as wide as keys."""
        keys = config.dim * 3 // 4
        return {"keys": keys, "values": 2 * keys}

    def kept(self, work: Workload) -> float:
        """Projections, tokens before and behind convolution and SiLU, normalised keys; reads up to the product."""
        keys, values, beside = self.on_rank(work)
        return work.w * (10 * keys + 9 * values) + beside + wider(work) * 2 * keys
