"""RMSNorm with the constructor Megatron-core's specs call."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ..mixers.parts import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm over the last axis.

    Args:
        config: Megatron's configuration.
        hidden_size: Width of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # It may see a share of the tokens only: its gradient is then a part too (parallel.sequence).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x normalised, same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)
