"""The state shell: what keeps weights and momentum between two sizes. Derivation: STABILITY.md beside this file."""

import torch
from torch import Tensor

from .stability import STATE_RMS_LIMIT

EMPTY = 1e-30  # keeps the root mean square of a cleared matrix differentiable


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
