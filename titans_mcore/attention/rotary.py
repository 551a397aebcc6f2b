"""Rotary position embedding (RoFormer, equation 34), in the half-split layout of Llama."""

import torch
from torch import Tensor


def rotate(x: Tensor, first_position: int | Tensor, base: float) -> Tensor:
    """Rotate x (B, T, H, D), whose token t stands at position first_position + t, of all rows or of each, (B,)."""
    first = torch.as_tensor(first_position, device=x.device).unsqueeze(-1)
    return rotate_to(x, first + torch.arange(x.shape[1], dtype=torch.float64, device=x.device), base)


def rotate_to(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate x (B, T, H, D), whose tokens stand at these positions, of all rows (T,) or of each, (B, T).

    Angles are built in float64: in float32 they are off by 0.1 rad two million tokens into a sequence.
    """
    width = x.shape[-1]
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
