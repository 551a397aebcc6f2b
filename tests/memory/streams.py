"""Random inputs for the memory, by shape and seed."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_mcore.memory.rule import initial_weights


@dataclass
class Stream:
    """Arguments of memory_scan: tokens (B, T, H, D), gates (B, T, H, L) or alpha by channel, weights, LayerNorm."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    theta: Tensor
    eta: Tensor
    alpha: Tensor | list[Tensor]
    weights: list[Tensor]
    norm: dict[str, Tensor]
    network: str

    @property
    def tokens(self) -> list[Any]:
        return [self.queries, self.keys, self.values, self.theta, self.eta, self.alpha]

    @property
    def settings(self) -> dict[str, object]:
        return {"network": self.network, **self.norm}

    def piece(self, start: int, stop: int) -> "Stream":
        names = ("queries", "keys", "values", "theta", "eta", "alpha")
        parts = {name: getattr(self, name) for name in names}
        cut = {
            name: [a[:, start:stop] for a in x] if isinstance(x, list) else x[:, start:stop]
            for name, x in parts.items()
        }
        return replace(self, **cut)

    def leaves(self) -> list[Tensor]:
        """Everything that a gradient flows to, made to require one."""
        alpha = self.alpha if isinstance(self.alpha, list) else [self.alpha]
        return [x.requires_grad_() for x in (*self.tokens[:5], *alpha, *self.weights, *self.norm.values())]


def make_stream(
    length: int,
    depth: int,
    network: str = "residual_norm",
    *,
    batch: int = 2,
    heads: int = 3,
    width: int = 6,
    theta: float = 0.05,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Stream:
    """Independent unit-norm keys and queries, and gates that vary from token to token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, keys, values = (normal(batch, length, heads, width) for _ in range(3))
    gates = [torch.sigmoid(normal(batch, length, heads, depth) + shift) for shift in (0.0, 1.0, -3.0)]
    residual_norm = network == "residual_norm"
    widths = [width, *[2 * width] * (depth - 1), width]
    weights = initial_weights(heads, widths, residual_norm=residual_norm, generator=generator)
    if network == "plain" and depth == 1:
        weights = [normal(heads, width, width)]
    norm = {"norm_weight": normal(heads, width), "norm_bias": normal(heads, width)} if residual_norm else {}
    return Stream(
        F.normalize(queries, dim=-1).to(dtype),
        F.normalize(keys, dim=-1).to(dtype),
        values.to(dtype),
        (theta * gates[0]).to(dtype),
        gates[1].to(dtype),
        gates[2].to(dtype),
        [w.to(dtype) for w in weights],
        {name: x.to(dtype) for name, x in norm.items()},
        network,
    )


def by_channel(stream: Stream) -> Stream:
    """The same with forget rates for every channel of the matrices' inputs."""
    generator = torch.Generator().manual_seed(5)
    shape = stream.keys.shape[:3]
    draws = [torch.randn(*shape, w.shape[1], generator=generator, dtype=torch.float64) for w in stream.weights]
    return replace(stream, alpha=[torch.sigmoid(x - 3.0).to(stream.keys.dtype) for x in draws])
