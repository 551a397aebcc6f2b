"""What a mixer is made of, asked for by shape, so that one mixer serves one process, many ranks and the exported model.

A mixer knows heads and widths; how a matrix is stored, split over ranks or initialised is the maker's business.
Inputs and outputs are (B, T, E); B, T, H, D, L and N as in config.py.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Parts(Protocol):
    """Makes parameters: whole ones, or this rank's share.

    Attributes:
        heads: Heads that this process owns, H or a share of them.
    """

    heads: int

    def column(self, d_in: int, per_head: int) -> nn.Module:
        """Linear map (..., d_in) to (..., heads * per_head), head by head; its input must have passed enter()."""

    def row(self, per_head: int, d_out: int) -> nn.Module:
        """Linear map (..., heads * per_head) to (..., d_out), summed over all heads, those of other ranks included."""

    def enter(self, x: Tensor) -> Tensor:
        """x as input of column maps: unchanged, its gradient summed over the ranks that share the heads."""

    def per_head(self, full: Tensor) -> nn.Parameter:
        """A parameter whose first axis is heads, from its value for all H heads."""

    def replicated(self, full: Tensor) -> nn.Parameter:
        """A parameter that every rank holds whole. Like those of heads it is not weight-decayed."""


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) without the bias that Megatron-core's linears return beside it."""
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * F) to (B, T, heads, F)."""
    return x.unflatten(-1, (heads, -1))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def unit_norm(x: Tensor) -> Tensor:
    """x with unit L2 norm over the last axis."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1, eps=1e-6).to(x.dtype)
