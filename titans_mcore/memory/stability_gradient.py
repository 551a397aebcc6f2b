"""Back through the step bound by hand; see stability.py for what it is."""

from typing import NamedTuple

import torch
from torch import Tensor

from .stability import FREE_LOAD, Load


def step_scale_slopes(own: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of step_scale by own and by before; any shape."""
    load = own + before
    acts, from_half = load > FREE_LOAD, before.clamp_min(FREE_LOAD)
    # The derivatives of the quotient cancel for a token that adds little; written with the share of own that lies
    # above 1/2 they do not.
    above = torch.where(before >= FREE_LOAD, 1.0, (load - FREE_LOAD) / own.masked_fill(~acts, 1.0))
    slope = torch.where(acts, above * (0.5 / (from_half * load.clamp_min(FREE_LOAD))).square(), 0.0)
    return -slope * (from_half + (1.0 - above) * load), -slope * (load + from_half)


class LoadGradient(NamedTuple):
    """What goes back through the loads of one chunk.

    Attributes:
        overlaps: Gradient at the dot products of the matrices' inputs, both ways, (L, N, b, b).
        deltas: What each of the deltas is multiplied with to give the gradient at it, (L, N, b).
        error: Likewise for the output's error, (N, b).
    """

    overlaps: Tensor
    deltas: Tensor
    error: Tensor


class LoadChain:
    """Goes back through the loads of a group of chunks, one chunk at a time.

    What does not depend on the gradient that arrives is computed for all chunks at once.

    Args:
        load: Of all chunks, chunk by chunk in the first axis.
        mass: load_mass of the tokens, (g, L, N, b).
        units: growth_units.
    """

    def __init__(self, load: Load, mass: Tensor, units: Tensor) -> None:
        size, pairs = load.overlaps.abs(), load.gains.unsqueeze(-1) * load.gains.unsqueeze(-2)
        self.pulls = size * pairs + load.growth.unsqueeze(-2)
        # growth^2 = unit^2 |delta|^2 |h|^2
        slope = 0.5 * units.square() / load.growth
        delta_square = load.gains.square() * load.error_square.unsqueeze(1)
        grown = 2.0 * slope * load.overlaps.diagonal(dim1=-2, dim2=-1), slope * delta_square
        inverse = (load.error_square.unsqueeze(1) * load.gains).reciprocal()
        error = load.gains / load.error_square.unsqueeze(1)
        by_token = mass.unsqueeze(-2)
        parts = (
            size * by_token,
            pairs * by_token * load.overlaps.sign(),
            load.gains.unsqueeze(-1),
            inverse,
            error,
            mass,
            *grown,
        )
        lists = [list(part.unbind(0)) for part in parts]
        self.moved, self.signs, self.gains, self.inverse, self.error, self.mass, self.by_delta, self.by_input = lists
        self.slopes = [list(slope.unbind(0)) for slope in step_scale_slopes(load.own, load.before)]
        self.of_terms = [torch.zeros_like(size[0, 0])] * len(size)

    def step(self, chunk: int, of_scale: Tensor) -> LoadGradient:
        """Back through one chunk, for the gradient (N, b) at its step scale."""
        # before_t = sum_{j < t} mass_j pull_tj and own_t = mass_t pull_tt: both share one b x b gradient.
        of_own, of_before = self.slopes[0][chunk] * of_scale, self.slopes[1][chunk] * of_scale
        of_terms = of_before.unsqueeze(-1).expand_as(self.of_terms[chunk]).tril(-1)
        of_terms.diagonal(dim1=-2, dim2=-1).copy_(of_own)
        self.of_terms[chunk] = of_terms
        moved = of_terms * self.moved[chunk]
        of_gains = torch.matmul(moved + moved.transpose(-1, -2), self.gains[chunk]).squeeze(-1)
        of_growth = of_terms.sum(-2) * self.mass[chunk]
        of_overlaps = of_terms * self.signs[chunk]
        of_overlaps.diagonal(dim1=-2, dim2=-1).addcmul_(of_growth, self.by_input[chunk])
        # gain^2 = |delta|^2 / |error|^2
        of_error = -(of_gains * self.error[chunk]).sum(0)
        of_deltas = (of_gains * self.inverse[chunk]).addcmul_(of_growth, self.by_delta[chunk])
        return LoadGradient(of_overlaps + of_overlaps.transpose(-1, -2), of_deltas, of_error)

    def of_mass(self) -> Tensor:
        """Gradient at the mass, once every chunk was stepped through, (g, L, N, b)."""
        return (torch.stack(self.of_terms).unsqueeze(1) * self.pulls).sum(-2)
