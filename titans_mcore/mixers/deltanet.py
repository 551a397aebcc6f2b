"""DeltaNet (Yang, Wang, Zhang, Shen, Kim, arXiv 2406.06484): a matrix in which new values replace old ones.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(K)
    beta_t = sigmoid(W_b x_t)

Queries, keys and values, E channels each, pass a convolution and SiLU, queries and keys are normalised, and so is each
head's answer; there is no gate behind it. Heads are 128 wide where E allows.
"""

from torch import Tensor

from ..config import TitansConfig
from ..memory import PackedRows
from .costs import Workload
from .linear import DeltaMixer, Earlier, LinearSpec, LinearState, convolved, delta_scan, wider
from .parts import Parts, heads_of, linear, rms_norm
from .spec import register


class DeltaNetMixer(DeltaMixer):
    """The delta rule.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__(config, parts, DeltaNet().shape(config), 1)  # a number for beta

    def forward(self, x: Tensor, state: Earlier | None, rows: PackedRows | None = None) -> tuple[Tensor, LinearState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        _, keys, values = self.shape
        projected = heads_of(linear(self.projection, self.parts.gather_from_sp_region(x)), self.parts.heads)
        tokens, beta = projected.split([2 * keys + values, 1], -1)
        tokens, tail = convolved(tokens, None if state is None else state.part("tail"), self.kernel, rows)
        read, matrix = delta_scan(tokens, beta, None, self.shape, state, rows, self.backend)
        answer = rms_norm(read, self.output_norm, self.eps)
        return self.parts.finish(self.output, answer.flatten(2)), LinearState(matrix, tail)


@register
class DeltaNet(LinearSpec):
    """The delta rule without a decay."""

    name = "deltanet"
    title = "DeltaNet"
    paper = "DeltaNet"
    module = DeltaNetMixer
    width = 128
    delta = True

    def channels(self, config: TitansConfig) -> dict[str, int]:
        """As many of values as of keys."""
        return {"keys": config.dim, "values": config.dim}

    def kept(self, work: Workload) -> float:
        """Tokens before and behind convolution and SiLU, normalised keys; reads, scaled."""
        keys, values, beside = self.on_rank(work)
        return work.w * (8 * keys + 5 * values) + beside + wider(work) * 2 * keys
