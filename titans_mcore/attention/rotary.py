"""Rotary position embedding (RoFormer, equation 34), in the half-split layout of Llama."""

import torch
from torch import Tensor


def rotate(x: Tensor, first_position: int, base: float) -> Tensor:
    """Rotate x (B, T, H, D), whose token t stands at position first_position + t.

    Angles are built in float64: in float32 they are off by 0.1 rad two million tokens into a sequence.
    """
    length, width = x.shape[1], x.shape[-1]
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    positions = torch.arange(first_position, first_position + length, dtype=torch.float64, device=x.device)
    angles = torch.outer(positions, frequencies)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
