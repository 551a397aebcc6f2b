"""The bound that keeps the chunked rule stable on every stream. Derivation: STABILITY.md beside this file.

Two parts, both of the rule itself (the oracle has them too), both inactive, bit for bit, on well-behaved data:

- *Step bound.* The b gradients of a chunk are taken at one point, so what they add up to must not overshoot. A token's
  load is how far the steps of the chunk's tokens up to it, with all their momentum to come, would move the memory's
  answer to it (1: exactly to its target), and how far they would move the matrices themselves (1: by the root mean
  square that the state shell allows). Steps are scaled so that loads past 1/2 saturate at 1: a chunk never carries an
  answer beyond its target, nor a matrix far out of the shell.
- *State shell.* After a chunk's last token each matrix and each momentum is scaled back to a root mean square of at
  most STATE_RMS_LIMIT, which bounds the state under gates for which the rule itself has no fixed point; and a matrix
  that forgetting has nearly emptied, below network.smallest_rms, is led back towards its initial weights: an empty one
  could not learn again.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .sharing import Share, count_of, once_at_input, once_at_output

STATE_RMS_LIMIT = 16.0
FREE_LOAD = 0.5  # up to here steps stay as they are; step_scale says the same in numbers
_SMALLEST_DECAY = 1e-6  # of the momentum: a saturated gate (eta = 1) must give a large load, not an infinite one
_TINY = 1e-20


def step_mass(theta: Tensor, eta: Tensor) -> Tensor:
    """All of a step that momentum will ever make of it, theta / (1 - eta); any shape."""
    return theta / (1.0 - eta).clamp_min(_SMALLEST_DECAY)


def gain(delta: Tensor, output_error: Tensor) -> Tensor:
    """Growth of the output's error on its way back to one matrix, |delta| / |output error|, over the last axis.

    The delta is that of network.reach, which leaves out what LayerNorm's derivative removes.
    """
    return ((delta.square().sum(-1) + _TINY) / (output_error.square().sum(-1) + _TINY)).sqrt()


def growth(delta_square: Tensor, input_square: Tensor, size: int) -> Tensor:
    """Half the share of the way out of the state shell that a step of 1 moves a matrix.

    Args:
        delta_square: Squared length of the delta at the matrix' output, any shape.
        input_square: Squared length of the matrix' input, the same shape.
        size: Elements of the matrix.
    """
    return (delta_square * input_square + _TINY).sqrt() * growth_unit(size)


def growth_unit(size: int) -> float:
    """growth of a delta and an input of length 1."""
    return 0.5 / (STATE_RMS_LIMIT * math.sqrt(size))


class Load(NamedTuple):
    """The load of every token of a chunk and what it is made of; L matrices, N memories, b tokens.

    Attributes:
        own: What the token itself adds, (N, b).
        before: What the tokens before it add, (N, b). With own it is the load; taken from a sum of both, one of them
            would be lost in rounding where the other is large.
        gains: (L, N, b).
        error_square: Squared length of the output's error, (N, b).
        overlaps: Dot products of the matrices' inputs, (L, N, b, b).
        growth: (L, N, b).
    """

    own: Tensor
    before: Tensor
    gains: Tensor
    error_square: Tensor
    overlaps: Tensor
    growth: Tensor

    def exceeds(self) -> Tensor:
        """Where the step bound acts, (N, b)."""
        return self.own + self.before > FREE_LOAD


def load_mass(theta: Tensor, eta: Tensor) -> Tensor:
    """What a token's step weighs in the loads, its own and those of later tokens; any shape."""
    return 2.0 * step_mass(theta, eta)


def chunk_load(
    inputs: list[Tensor],
    deltas: list[Tensor],
    error: Tensor,
    mass: Tensor,
    key_overlaps: Tensor | None = None,
    share: Share | None = None,
) -> Load:
    """Load of a chunk's tokens. What it takes of the matrices is summed over the parts at once.

    Args:
        inputs: L inputs of the matrices, (N, b, d_in).
        deltas: L errors at their outputs by network.reach, (N, b, d_out).
        error: Error of the output, (N, b, D).
        mass: load_mass of the tokens, (L, N, b).
        key_overlaps: Dot products of inputs[0], (N, b, b), where they are at hand: they do not depend on the state.
        share: The process's part of the matrices.
    """
    error_square = error.square().sum(-1).add_(_TINY)
    delta_squares = torch.stack([torch.linalg.vector_norm(delta, dim=-1) for delta in deltas]).square_()
    known = [] if key_overlaps is None else [key_overlaps]
    overlaps = torch.stack([*known, *(torch.bmm(h, h.transpose(1, 2)) for h in inputs[len(known) :])])
    if share is not None:
        delta_squares, overlaps = _whole(share, delta_squares, overlaps)
    gains = (delta_squares + _TINY).div_(error_square).sqrt_()
    input_squares = overlaps.diagonal(dim1=-2, dim2=-1)
    grown = (delta_squares * input_squares).add_(_TINY).sqrt() * growth_units(inputs, deltas, share)
    pulls = (overlaps.abs() * gains.unsqueeze(-1)).mul(gains.unsqueeze(-2)).add_(grown.unsqueeze(-2))
    own = (pulls.diagonal(dim1=-2, dim2=-1) * mass).sum(0)
    before = torch.matmul(pulls.tril(-1), mass.unsqueeze(-1)).squeeze(-1).sum(0)
    return Load(own, before, gains, error_square, overlaps, grown)


def _whole(share: Share, delta_squares: Tensor, overlaps: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the parts; what every process has whole is counted once."""
    depth = len(overlaps)
    squares = [once_at_output(share, layer, depth, x) for layer, x in enumerate(delta_squares.unbind(0))]
    products = [once_at_input(share, layer, depth, x) for layer, x in enumerate(overlaps.unbind(0))]
    whole = share.add_all([*squares, *products])
    return torch.stack(whole[:depth]), torch.stack(whole[depth:])


def growth_units(inputs: list[Tensor], deltas: list[Tensor], share: Share | None = None) -> Tensor:
    """growth_unit of each matrix, (L, 1, 1)."""
    sizes = [h.shape[-1] * delta.shape[-1] * count_of(share) for h, delta in zip(inputs, deltas, strict=True)]
    units = [growth_unit(size) for size in sizes]
    return deltas[0].new_tensor(units).view(-1, 1, 1)


def step_scale(own: Tensor, before: Tensor) -> Tensor:
    """Factor on theta of a token that raises the load from before to before + own; any shape.

    The difference quotient of the load's allowed part, which is load up to 1/2 and 1 - 1 / (4 load) beyond: for a
    repeated key the parts telescope, and their sum stays below 1 however large theta is.
    """
    load = before + own
    acts = load > FREE_LOAD
    # The share of own below 1/2 is tiny for a huge own, and 1 less the share above would lose it.
    below = (FREE_LOAD - before).clamp_min(0.0) / own.masked_fill(~acts, 1.0).clamp_min(_TINY)
    below = torch.where(acts, below, 1.0)
    beyond = 0.25 / (before.clamp_min(FREE_LOAD) * load.clamp_min(FREE_LOAD))
    return below + (1.0 - below) * beyond
