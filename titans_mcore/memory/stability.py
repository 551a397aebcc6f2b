"""The bound that keeps the chunked rule stable on every stream. Derivation: STABILITY.md beside this file.

Two parts, both of the rule itself (the oracle has them too), both inactive, bit for bit, on well-behaved data:

- *Step bound.* The b gradients of a chunk are taken at one point, so what they add up to must not overshoot. A token's
  load is how far the steps of the chunk's tokens up to it, with all their momentum to come, would move the memory's
  answer to it (1: exactly to its target). Steps are scaled so that loads past 1/2 saturate at 1: a chunk never carries
  an answer beyond its target.
- *State shell.* After a chunk's last token each matrix and each momentum is scaled back to a root mean square of at
  most STATE_RMS_LIMIT, which bounds the state under gates for which the rule itself has no fixed point; and a matrix
  that forgetting has nearly emptied, below network.smallest_rms, is led back towards its initial weights: an empty one
  could not learn again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

STATE_RMS_LIMIT = 16.0
FREE_LOAD = 0.5  # up to here steps stay as they are; step_scale says the same in numbers
_SMALLEST_DECAY = 1e-6  # of the momentum: a saturated gate (eta = 1) must give a large load, not an infinite one
_TINY = 1e-20
EMPTY = 1e-30  # keeps the root mean square of a cleared matrix differentiable


def step_mass(theta: Tensor, eta: Tensor) -> Tensor:
    """All of a step that momentum will ever make of it, theta / (1 - eta); any shape."""
    return theta / (1.0 - eta).clamp_min(_SMALLEST_DECAY)


def gain(delta: Tensor, output_error: Tensor) -> Tensor:
    """Growth of the output's error on its way back to one matrix, |delta| / |output error|, over the last axis.

    The delta is that of network.reach, which leaves out what LayerNorm's derivative removes.
    """
    return ((delta.square().sum(-1) + _TINY) / (output_error.square().sum(-1) + _TINY)).sqrt()


class Load(NamedTuple):
    """The load of every token of a chunk and what it is made of; L matrices, N memories, b tokens.

    Attributes:
        own: What the token itself adds, (N, b).
        total: The load, (N, b).
        gains: (L, N, b).
        error_square: Squared length of the output's error, (N, b).
        overlaps: Dot products of the matrices' inputs, (L, N, b, b).
    """

    own: Tensor
    total: Tensor
    gains: Tensor
    error_square: Tensor
    overlaps: Tensor


def load_mass(theta: Tensor, eta: Tensor) -> Tensor:
    """What token j's step weighs in token t's load, (..., b, b), lower triangular, for gates (..., b)."""
    mass = 2.0 * step_mass(theta, eta)
    return mass.unsqueeze(-2).expand(*mass.shape, mass.shape[-1]).tril()


def chunk_load(inputs: list[Tensor], deltas: list[Tensor], error: Tensor, mass: Tensor) -> Load:
    """Load of a chunk's tokens.

    Args:
        inputs: L inputs of the matrices, (N, b, d_in).
        deltas: L errors at their outputs by network.reach, (N, b, d_out).
        error: Error of the output, (N, b, D).
        mass: load_mass of the tokens, (L, N, b, b).
    """
    error_square = error.square().sum(-1).add_(_TINY)
    gain_squares = torch.stack([torch.linalg.vector_norm(delta, dim=-1) for delta in deltas])
    gain_squares = gain_squares.square_().add_(_TINY).div_(error_square)
    gains = gain_squares.sqrt()
    overlaps = torch.stack([torch.bmm(h, h.transpose(1, 2)) for h in inputs])
    terms = overlaps.abs().mul_(mass)
    pull = torch.matmul(terms, gains.unsqueeze(-1)).squeeze(-1)
    own = (terms.diagonal(dim1=-2, dim2=-1) * gain_squares).sum(0)
    return Load(own, (pull * gains).sum(0), gains, error_square, overlaps)


def step_scale(own: Tensor, load: Tensor) -> Tensor:
    """Factor on theta of a token that raises the load from load - own to load; any shape.

    The difference quotient of the load's allowed part, which is load up to 1/2 and 1 - 1 / (4 load) beyond: for a
    repeated key the parts telescope, and their sum stays below 1 however large theta is.
    """
    # The part of own above 1/2, exactly 0 and 1 where none or all of it is; nothing here cancels.
    above = ((load - FREE_LOAD) / own.clamp_min(_TINY)).clamp(0.0, 1.0)
    quotient = 0.25 / ((load - own).clamp_min(FREE_LOAD) * load.clamp_min(FREE_LOAD))
    return 1.0 - above + above * quotient


def step_scale_slopes(own: Tensor, load: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of step_scale by own and by load; any shape."""
    acts = load > FREE_LOAD
    from_half = (load - own).clamp_min(FREE_LOAD)
    # The derivatives of the quotient cancel for a token that adds little; written with `beyond`, the share of own that
    # lies above 1/2, they do not.
    beyond = ((load - FREE_LOAD) / own.clamp_min(_TINY)).clamp(0.0, 1.0)
    slope = torch.where(acts, beyond / (2.0 * from_half * load.clamp_min(FREE_LOAD)).square(), 0.0)
    return slope * beyond * load, -slope * (load + from_half)


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
        mass: load_mass of the tokens, (g, L, N, b, b).
    """

    def __init__(self, load: Load, mass: Tensor) -> None:
        size, pairs = load.overlaps.abs(), load.gains.unsqueeze(-1) * load.gains.unsqueeze(-2)
        self.by_mass = pairs * size
        weighted = load.error_square.unsqueeze(1) * load.gains
        error = load.gains / load.error_square.unsqueeze(1)
        of_signs = pairs * mass * load.overlaps.sign()
        parts = (size * mass, of_signs, load.gains.unsqueeze(-1), weighted.reciprocal(), error)
        self.moved, self.signs, self.gains, self.inverse, self.error = (list(part.unbind(0)) for part in parts)
        self.slopes = [list(slope.unbind(0)) for slope in step_scale_slopes(load.own, load.total)]
        self.of_terms = [torch.zeros_like(size[0, 0])] * len(size)

    def step(self, chunk: int, of_scale: Tensor) -> LoadGradient:
        """Back through one chunk, for the gradient (N, b) at its step scale."""
        # load_t = sum_j gain_t gain_j mass_tj size_tj and own_t is its term j = t, so both share one b x b gradient.
        of_own, of_load = self.slopes[0][chunk] * of_scale, self.slopes[1][chunk] * of_scale
        of_terms = self.of_terms[chunk] = torch.diag_embed(of_own).add_(of_load.unsqueeze(-1))
        moved = of_terms * self.moved[chunk]
        of_gains = torch.matmul(moved + moved.transpose(-1, -2), self.gains[chunk]).squeeze(-1)
        of_overlaps = of_terms * self.signs[chunk]
        # gain^2 = |delta|^2 / |error|^2
        of_error = -(of_gains * self.error[chunk]).sum(0)
        return LoadGradient(of_overlaps + of_overlaps.transpose(-1, -2), of_gains * self.inverse[chunk], of_error)

    def of_mass(self) -> Tensor:
        """Gradient at the mass, once every chunk was stepped through, (g, L, N, b, b)."""
        return torch.stack(self.of_terms).unsqueeze(1) * self.by_mass


def leaves_shell(mean_square: Tensor, floor: Tensor | float) -> Tensor:
    """Where the state shell acts, for mean squares and the smallest root mean square allowed."""
    return (mean_square > STATE_RMS_LIMIT**2) | (mean_square < floor * floor)


def below_limit(matrix: Tensor) -> Tensor:
    """(..., d_in, d_out) scaled back to STATE_RMS_LIMIT where its root mean square is larger."""
    mean_square = matrix.square().mean((-1, -2), keepdim=True)
    outside = mean_square > STATE_RMS_LIMIT**2
    return torch.where(outside, matrix * (STATE_RMS_LIMIT**2 / mean_square.masked_fill(~outside, 1.0)).sqrt(), matrix)


def above_floor(matrix: Tensor, floor: Tensor | float, anchor: Tensor) -> Tensor:
    """(..., d_in, d_out) with what its root mean square lacks to the floor made up for by the anchor.

    Args:
        matrix: Weights.
        floor: network.smallest_rms; 0 for none.
        anchor: Initial weights by anchor_of, of root mean square 1.
    """
    lack = floor_lack(matrix.square().mean((-1, -2), keepdim=True), floor)
    return torch.where(lack > 0, matrix + lack * anchor, matrix)


def floor_lack(mean_square: Tensor, floor: Tensor | float) -> Tensor:
    """How far the root mean square lies below the floor, else 0; any shape."""
    return (floor - (mean_square + EMPTY).sqrt()).clamp_min(0.0)


def anchor_of(initial: Tensor) -> Tensor:
    """Initial weights (..., d_in, d_out) at a root mean square of 1: where a matrix is led that forgetting empties."""
    return initial * (initial.square().mean((-1, -2), keepdim=True) + EMPTY).rsqrt()
