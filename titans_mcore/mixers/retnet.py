"""RetNet (Sun et al., arXiv 2307.08621): a matrix that forgets at a rate of the head's own, fixed before training.

    S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t / sqrt(K)        h = 0, 1, ... by head

Queries and keys, E channels each, carry rotary positions as attention has them here (the paper's own code spaces the
frequencies a little otherwise); values have 2 E. Each head's answer is normalised, with a scale, and then gated with
SiLU. Heads have keys of 256 and values of 512 where E allows. What the paper's code divides scores by beside, the norm
takes out again.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import rotate
from ..config import TitansConfig
from ..linear import linear_scan
from ..memory import PackedRows
from .costs import Workload
from .linear import Earlier, LinearSpec, LinearState
from .parts import FromParts, Parts, heads_of, linear, rms_norm
from .spec import register


class RetNetMixer(FromParts):
    """Retention over several scales.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        heads, keys, values = self.shape = RetNet().shape(config)
        self.config, self.parts = config, parts.with_heads(heads)
        # A head: query, key, value, output gate.
        self.projection = self.parts.column(config.dim, keys, keys, values, values)
        self.output_norm = self.parts.per_head(torch.ones(heads, values))
        self.output = self.parts.last_row(heads * values, config.dim)

    def forward(self, x: Tensor, state: Earlier | None, rows: PackedRows | None = None) -> tuple[Tensor, LinearState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        heads, keys, values = self.shape
        projected = heads_of(linear(self.projection, self.parts.gather_from_sp_region(x)), self.parts.heads)
        q, k, v, gate = projected.split([keys, keys, values, values], -1)
        decays = torch.log1p(-(2.0 ** -(5.0 + torch.arange(heads, dtype=torch.float64, device=x.device))))
        log_decay = self.parts.own(decays).to(torch.promote_types(x.dtype, torch.float32)).expand(*v.shape[:3])
        passed = x.new_full((len(v),), v.shape[1], dtype=torch.long) if rows is None else rows.ends.to(x.device)
        read, matrix = linear_scan(
            rotate(q, 0, self.config.rope_base),
            rotate(k, 0, self.config.rope_base),
            v,
            log_decay,
            scale=keys**-0.5,
            state=None if state is None else state.part("matrix", lambda matrix: self._turned(matrix, -passed)),
            rows=rows,
            backend=self.config.linear_backend,
        )
        answer = rms_norm(read, self.output_norm, self.config.norm_eps) * F.silu(gate)
        return self.parts.finish(self.output, answer.flatten(2)), LinearState(self._turned(matrix, -passed))

    def _turned(self, matrix: Tensor, by: Tensor) -> Tensor:
        """S with its keys so many positions on, by row: the next piece counts from its own first token.

        Counted from the beginning of a text, angles would lose their precision.
        """
        keys = matrix.mT.flatten(1, 2).unsqueeze(1)  # as one token with a head for each channel of the values
        return rotate(keys, by, self.config.rope_base).squeeze(1).unflatten(1, (matrix.shape[1], -1)).mT


@register
class RetNet(LinearSpec):
    """A fixed decay."""

    name = "retnet"
    title = "RetNet"
    paper = "RetNet"
    module = RetNetMixer
    width = 256
    rotary = True

    def channels(self, config: TitansConfig) -> dict[str, int]:
        """Values are twice as wide as keys."""
        return {"keys": config.dim, "values": 2 * config.dim}

    def convolved_channels(self, config: TitansConfig) -> tuple[int, int]:
        """None."""
        return 0, 0

    def kept(self, work: Workload) -> float:
        """Projections, queries and keys with positions, and their angles; reads up to the gated product."""
        keys, values, _ = self.on_rank(work)
        angles = 2 * self.shape(work.config).keys
        return work.w * (4 * keys + angles + 6 * values)
