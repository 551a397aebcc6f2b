"""Parts of a mixer in one process without Megatron-core, at any dtype."""

import torch
from torch import Tensor, nn


class PlainParts:
    def __init__(self, dim: int, heads: int, dtype: torch.dtype = torch.float32) -> None:
        self.dim, self.heads, self.dtype = dim, heads, dtype

    def column(self, d_in: int, per_head: int) -> nn.Module:
        return nn.Linear(d_in, self.heads * per_head, bias=False, dtype=self.dtype)

    def row(self, per_head: int, d_out: int) -> nn.Module:
        return nn.Linear(self.heads * per_head, d_out, bias=False, dtype=self.dtype)

    def enter(self, x: Tensor) -> Tensor:
        return x

    def per_head(self, full: Tensor) -> nn.Parameter:
        return nn.Parameter(full.to(self.dtype))

    def replicated(self, full: Tensor) -> nn.Parameter:
        return nn.Parameter(full.to(self.dtype))
