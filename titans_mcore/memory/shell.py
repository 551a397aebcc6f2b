"""The state shell: what keeps weights and momentum between two sizes. Derivation: STABILITY.md beside this file."""

import torch
from torch import Tensor

from .sharing import Share, whole_mean
from .stability import STATE_RMS_LIMIT

EMPTY = 1e-30  # keeps the root mean square of a cleared matrix differentiable


def leaves_shell(mean_square: Tensor, floor: Tensor | float) -> Tensor:
    """Where the state shell acts, for mean squares and the smallest root mean square allowed."""
    return (mean_square > STATE_RMS_LIMIT**2) | (mean_square < floor * floor)


def below_limit(matrix: Tensor, share: Share | None = None) -> Tensor:
    """(..., d_in, d_out) scaled back to STATE_RMS_LIMIT where its root mean square is larger."""
    mean_square = _mean_square(matrix, share)
    outside = mean_square > STATE_RMS_LIMIT**2
    return torch.where(outside, matrix * (STATE_RMS_LIMIT**2 / mean_square.masked_fill(~outside, 1.0)).sqrt(), matrix)


def above_floor(matrix: Tensor, floor: Tensor | float, anchor: Tensor, share: Share | None = None) -> Tensor:
    """(..., d_in, d_out) with what its root mean square lacks to the floor made up for by the anchor.

    Args:
        matrix: Weights.
        floor: network.smallest_rms; 0 for none.
        anchor: Initial weights by anchor_of, of root mean square 1.
        share: The process's part of the matrix, differentiable; here as in the rest of this file None is all of it.
    """
    lack = floor_lack(_mean_square(matrix, share), floor)
    return torch.where(lack > 0, matrix + lack * anchor, matrix)


def floor_lack(mean_square: Tensor, floor: Tensor | float) -> Tensor:
    """How far the root mean square lies below the floor, else 0; any shape."""
    return (floor - (mean_square + EMPTY).sqrt()).clamp_min(0.0)


def anchor_of(initial: Tensor) -> Tensor:
    """Initial weights (..., d_in, d_out) at a root mean square of 1: where a matrix is led that forgetting empties."""
    return anchors_of([initial])[0]


def anchors_of(initial: list[Tensor], share: Share | None = None) -> list[Tensor]:
    """anchor_of for every matrix, by one sum over the parts."""
    squares = [_mean_square(x, None) for x in initial]
    if share is not None:
        squares = list(whole_mean(share, torch.stack(squares)).unbind(0))
    return [x * (square + EMPTY).rsqrt() for x, square in zip(initial, squares, strict=True)]


def _mean_square(matrix: Tensor, share: Share | None) -> Tensor:
    """Of whole matrices, (..., 1, 1)."""
    return whole_mean(share, matrix.square().mean((-1, -2), keepdim=True))
