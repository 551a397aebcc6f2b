"""A mixer that test_added_mixer.py adds: a gated moving average with heads of its own and a state of constant size."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_mcore.config import TitansConfig
from titans_mcore.memory import PackedRows, TensorTree
from titans_mcore.mixers.costs import FLOAT32, Workload
from titans_mcore.mixers.parts import FromParts, Parts, heads_of, linear
from titans_mcore.mixers.spec import Heads, MixerSpec, register

from .moving_average import moving_average

_WIDTH = 8  # of a head


@dataclass
class EmaState(TensorTree):
    """The average after the last token, (B, H, D)."""

    average: Tensor


class EmaMixer(FromParts):
    """o = W (m * SiLU(gate)), where m is the moving average of the values; all heads read one map of rates."""

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts.with_heads(config.dim // _WIDTH)
        self.value_gate = self.parts.column(config.dim, 2 * _WIDTH)
        self.rate = self.parts.whole(config.dim, _WIDTH)
        self.rate_bias = self.parts.per_head(torch.linspace(0.0, 4.0, config.dim // _WIDTH).unsqueeze(-1))
        self.output = self.parts.last_row(config.dim, config.dim)

    def forward(self, x: Tensor, state: EmaState | None, rows: PackedRows | None = None) -> tuple[Tensor, EmaState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        x = self.parts.gather_from_sp_region(x)
        value, gate = heads_of(linear(self.value_gate, x), self.parts.heads).chunk(2, -1)
        rate = self.parts.copy_to_tp_region(linear(self.rate, x)).unsqueeze(2)
        keep = torch.sigmoid(rate + self.rate_bias).expand_as(value)
        before = torch.zeros_like(value[:, 0]) if state is None else state.average
        average, last = moving_average(value, keep, before, rows)
        return self.parts.finish(self.output, (average * F.silu(gate)).flatten(2)), EmaState(last)


@register
class Ema(MixerSpec):
    """Neither attention nor a memory."""

    name = "ema"
    title = "Exponential moving average"
    paper = "EMA"
    module = EmaMixer
    state = EmaState

    def heads(self, config: TitansConfig) -> dict[str, Heads]:
        """Its own."""
        return {"average": Heads("heads of the average", config.dim // _WIDTH, _WIDTH)}

    def kept(self, work: Workload) -> float:
        """Values, gates, rates, averages, and what they are multiplied to."""
        return 8 * work.w * work.e

    def state_bytes(self, work: Workload) -> float:
        """The average."""
        return FLOAT32 * work.e * work.rows

    def message(self, work: Workload) -> int:
        """The average."""
        return work.w * work.rows * work.config.dim // work.ranks
