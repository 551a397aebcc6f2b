"""Rotary position embedding (RoFormer, equation 34), in the half-split layout of Llama."""

import torch
from torch import Tensor


def rotate(x: Tensor, first_position: int | Tensor, base: float) -> Tensor:
    """Rotate x (B, T, H, D), whose token t stands at position first_position + t, of all rows or of each, (B,).

    Angles are built in float64: in float32 they are off by 0.1 rad two million tokens into a sequence.
    """
    length, width = x.shape[1], x.shape[-1]
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    first = torch.as_tensor(first_position, device=x.device).unsqueeze(-1)
    positions = first + torch.arange(length, dtype=torch.float64, device=x.device)
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
