"""The memory network M: forward pass, hand-written error back-propagation and initial weights.

Paper section 3.1 and the camera-ready: `residual_norm` is M(x) = x + LayerNorm(W_1 gelu(W_2 x)), `plain` is the MLP
alone; a GELU stands between matrices. Weights are (..., d_in, d_out) and act as h @ W, so that the inner gradient of a
token at one matrix is the outer product of that matrix's input h and of the error delta at its output.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Network:
    """What the memory computes besides its fast weights.

    Attributes:
        residual_norm: Add the input to the layer-normed output of the MLP.
        norm_weight: (H, D) scale of the LayerNorm, an outer parameter; None is 1.
        norm_bias: (H, D) shift of the LayerNorm; None is 0.
    """

    residual_norm: bool
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


@dataclass
class Trace:
    """One forward pass, kept for the back-propagation of its error.

    Attributes:
        inputs: For each matrix its input h, (B, H, C, d_in).
        hidden: For each matrix but the last its output before the GELU, (B, H, C, d_out).
        normed: LayerNorm's output before scale and shift, (B, H, C, D); None for a plain network.
        inverse_std: (B, H, C, 1); None for a plain network.
        output: M(x), (B, H, C, D).
    """

    inputs: list[Tensor]
    hidden: list[Tensor]
    normed: Tensor | None
    inverse_std: Tensor | None
    output: Tensor


def forward(network: Network, weights: list[Tensor], x: Tensor) -> Trace:
    """M(x) for x (B, H, C, D) and weights of (B, H, d_in, d_out)."""
    inputs, hidden = [x], []
    for weight in weights[:-1]:
        hidden.append(inputs[-1] @ weight)
        inputs.append(F.gelu(hidden[-1]))
    output = inputs[-1] @ weights[-1]
    if not network.residual_norm:
        return Trace(inputs, hidden, None, None, output)
    normed, inverse_std = _normalise(output)
    return Trace(inputs, hidden, normed, inverse_std, x + _scale_and_shift(network, normed))


def finish(network: Network, x: Tensor, mlp_output: Tensor) -> Tensor:
    """M(x) from the MLP's output, both (B, H, C, D)."""
    if not network.residual_norm:
        return mlp_output
    return x + _scale_and_shift(network, _normalise(mlp_output)[0])


def back_propagate(network: Network, weights: list[Tensor], trace: Trace, output_error: Tensor) -> list[Tensor]:
    """Errors delta at the output of each matrix, (B, H, C, d_out), for the error (B, H, C, D) of M(x)."""
    delta = output_error
    if network.residual_norm:
        assert trace.normed is not None
        assert trace.inverse_std is not None
        if network.norm_weight is not None:
            delta = delta * network.norm_weight.unsqueeze(-2)
        along_normed = (delta * trace.normed).mean(-1, keepdim=True)
        delta = trace.inverse_std * (delta - delta.mean(-1, keepdim=True) - trace.normed * along_normed)
    deltas = [delta]
    for weight, z in zip(weights[:0:-1], trace.hidden[::-1], strict=True):
        delta = (delta @ weight.transpose(-1, -2)) * _gelu_derivative(z)
        deltas.append(delta)
    return deltas[::-1]


def initial_weights(
    heads: int, widths: list[int], *, residual_norm: bool, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Random M_0: one (H, d_in, d_out) for each pair of neighbouring widths, float32.

    The scale sets the curvature that theta meets. LayerNorm divides the inner gradient by the size of what it
    normalises; with unit-norm keys and weights of standard deviation 1 the curvature of each matrix comes out near 2,
    that of a linear memory, whatever the widths. A plain MLP gets there with 1 / sqrt(d_in), and a single plain matrix
    starts empty.
    """
    weights = []
    for d_in, d_out in zip(widths[:-1], widths[1:], strict=True):
        if residual_norm:
            std = 1.0
        elif len(widths) == 2:
            std = 0.0
        else:
            std = 1.0 / math.sqrt(d_in)
        weights.append(torch.randn(heads, d_in, d_out, generator=generator) * std)
    return weights


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return centred * inverse_std, inverse_std


def _scale_and_shift(network: Network, normed: Tensor) -> Tensor:
    if network.norm_weight is not None:
        normed = normed * network.norm_weight.unsqueeze(-2)
    if network.norm_bias is not None:
        normed = normed + network.norm_bias.unsqueeze(-2)
    return normed


def _gelu_derivative(z: Tensor) -> Tensor:
    """Derivative of the exact GELU: Phi(z) + z phi(z)."""
    cumulative = 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z.square()) * (1.0 / math.sqrt(2.0 * math.pi))
    return cumulative + z * density
