"""The bound that keeps the chunked rule stable on every stream. Derivation: STABILITY.md beside this file.

Two parts, both of the rule itself (the oracle has them too), both inactive, bit for bit, on well-behaved data:

- *Step bound.* The b gradients of a chunk are taken at one point, so what they add up to must not overshoot. A token's
  load is how far the steps of the chunk's tokens up to it, with all their momentum to come, would move the memory's
  answer to it (1: exactly to its target). Steps are scaled so that loads past 1/2 saturate at 1: a chunk never carries
  an answer beyond its target.
- *State ball.* After a chunk's last token each matrix and each momentum is scaled back to a root mean square of at most
  STATE_RMS_LIMIT, which bounds the state under gates for which the rule itself has no fixed point.
"""

import torch
from torch import Tensor

STATE_RMS_LIMIT = 16.0
_SMALLEST_DECAY = 1e-6  # of the momentum: a saturated gate (eta = 1) must give a large load, not an infinite one
_TINY = 1e-20


def step_mass(theta: Tensor, eta: Tensor) -> Tensor:
    """All of a step that momentum will ever make of it, theta / (1 - eta); any shape."""
    return theta / (1.0 - eta).clamp_min(_SMALLEST_DECAY)


def gain(delta: Tensor, output_error: Tensor) -> Tensor:
    """Growth of the output's error on its way back to one matrix, |delta| / |output error|, over the last axis."""
    return ((delta.square().sum(-1) + _TINY) / (output_error.square().sum(-1) + _TINY)).sqrt()


def step_scale(own: Tensor, load: Tensor) -> Tensor:
    """Factor on theta of a token that raises the load from load - own to load; any shape.

    The difference quotient of the load's allowed part, which is load up to 1/2 and 1 - 1 / (4 load) beyond: for a
    repeated key the parts telescope, and their sum stays below 1 however large theta is.
    """
    before = load - own
    low, high = before < 0.5, load > 0.5
    # Each case in a form that neither cancels nor divides by zero: the branch not taken has a gradient too.
    beyond = 0.25 / (before.clamp_min(0.5) * load.clamp_min(0.5))
    part = (0.5 - before).clamp_min(0.0) + (load - 0.5).clamp_min(0.0) * (0.5 / load.clamp_min(0.5))
    across = part / own.masked_fill(~(low & high), 1.0)
    return torch.where(low, torch.where(high, across, 1.0), beyond)


def into_ball(matrix: Tensor) -> Tensor:
    """(..., d_in, d_out) scaled back to the largest root mean square allowed, unchanged below it."""
    mean_square = matrix.square().mean((-1, -2), keepdim=True)
    scale = STATE_RMS_LIMIT * torch.rsqrt(mean_square.clamp_min(STATE_RMS_LIMIT**2))
    return torch.where(mean_square > STATE_RMS_LIMIT**2, matrix * scale, matrix)
