"""The memory network M: forward pass, hand-written error back-propagation and initial weights.

Paper section 3.1 and the camera-ready: `residual_norm` is M(x) = x + LayerNorm(W_1 gelu(W_2 x)), `plain` is the MLP
alone; a GELU stands between matrices. Weights are (..., d_in, d_out) and act as h @ W, so that the inner gradient of a
token at one matrix is the outer product of that matrix's input h and of the error delta at its output.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .sharing import Share, into_input, into_output, sum_at_input, sum_at_output

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Network:
    """What the memory computes besides its fast weights.

    Attributes:
        residual_norm: Add the input to the layer-normed output of the MLP.
        norm_weight: (H, D) scale of the LayerNorm, an outer parameter; None is 1. See `for_memories`.
        norm_bias: (H, D) shift of the LayerNorm; None is 0.
        share: The process's part of the fast weights; None is all. With one, matrices and what lies between them are
            parts as sharing.py says, and errors and gradients with them.
    """

    residual_norm: bool
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    share: Share | None = None

    def for_memories(self, batch: int) -> "Network":
        """The same with scale and shift (N, 1, D) for N = batch * H memories in one axis."""
        weight, bias = (
            None if x is None else x.expand(batch, *x.shape).flatten(0, 1).unsqueeze(1)
            for x in (self.norm_weight, self.norm_bias)
        )
        return Network(self.residual_norm, weight, bias, self.share)

    def for_chunks(self, chunks: int) -> "Network":
        """From scale and shift for N memories those for the same memories in g chunks, (g N, 1, D)."""
        weight, bias = (None if x is None else x.repeat(chunks, 1, 1) for x in (self.norm_weight, self.norm_bias))
        return Network(self.residual_norm, weight, bias, self.share)


@dataclass
class Trace:
    """One forward pass of N memories, kept for the back-propagation of its error.

    Attributes:
        inputs: For each matrix its input h, (N, b, d_in).
        hidden: For each matrix but the last its output before the GELU, (N, b, d_out).
        normed: LayerNorm of the last matrix' output.
    """

    inputs: list[Tensor]
    hidden: list[Tensor]
    normed: "Normed"


class Normed(NamedTuple):
    """The MLP's output (N, b, D) and what LayerNorm makes of it; for a plain network nothing is made.

    Attributes:
        raw: The MLP's output.
        value: LayerNorm's output before scale and shift.
        mean: (N, b, 1).
        inverse_std: (N, b, 1).
    """

    raw: Tensor
    value: Tensor
    mean: Tensor
    inverse_std: Tensor

    def gradient(self, value_gradient: Tensor) -> Tensor:
        """Gradient at raw for one at value. As a map it is its own transpose."""
        return torch.ops.aten.native_layer_norm_backward(
            value_gradient, self.raw, self.raw.shape[-1:], self.mean, self.inverse_std, None, None, [True, False, False]
        )[0]


class Errors(NamedTuple):
    """What back-propagation finds, by matrix.

    Attributes:
        arriving: For each matrix but the last the error behind its GELU, (N, b, d_out).
        deltas: For each matrix the error at its output, (N, b, d_out).
    """

    arriving: list[Tensor]
    deltas: list[Tensor]


def forward(network: Network, weights: list[Tensor], x: Tensor) -> Trace:
    """The MLP and its LayerNorm for x (N, b, D) and weights of (N, d_in, d_out)."""
    share, depth = network.share, len(weights)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for layer, weight in enumerate(weights):
        inputs.append(into_input(share, layer, depth, F.gelu(outputs[-1]) if layer else x))
        outputs.append(sum_at_output(share, layer, depth, torch.bmm(inputs[-1], weight)))
    return Trace(inputs, outputs[:-1], normalise(network, outputs[-1]))


def normalise(network: Network, raw: Tensor) -> Normed:
    """LayerNorm without scale and shift of the MLP's output (N, b, D); a plain network's output stays as it is."""
    if not network.residual_norm:
        return Normed(raw, raw, raw, raw)
    return Normed(raw, *torch.native_layer_norm(raw, raw.shape[-1:], None, None, LAYER_NORM_EPS))


def answer(network: Network, x: Tensor, normed: Tensor) -> Tensor:
    """M(x) from its normalised MLP output; scale and shift broadcast against both."""
    if not network.residual_norm:
        return normed
    if network.norm_weight is not None:
        normed = normed * network.norm_weight
    return x + normed if network.norm_bias is None else x + network.norm_bias + normed


def back_propagate(network: Network, weights: list[Tensor], trace: Trace, error: Tensor) -> Errors:
    """Errors at the output of each matrix for the error (N, b, D) of M(x); scale is (N, 1, D)."""
    if not network.residual_norm:
        return _through_matrices(network, weights, trace.hidden, error)
    return _through_matrices(network, weights, trace.hidden, trace.normed.gradient(scaled(network, error)))


def reach(network: Network, weights: list[Tensor], trace: Trace, error: Tensor, errors: Errors) -> Errors:
    """What back_propagate finds when LayerNorm only scales: how far the network carries an error of any direction.

    LayerNorm's derivative removes two directions, among them that of its own output. Just there the error points once
    an answer is as good as LayerNorm lets it be, and then what back_propagate finds says nothing about the others.

    Args:
        network: As for back_propagate, like weights, trace and error.
        errors: What back_propagate has found; a plain network's reach is the same.
    """
    if not network.residual_norm:
        return errors
    return _through_matrices(network, weights, trace.hidden, trace.normed.inverse_std * scaled(network, error))


def back_propagate_and_reach(
    network: Network, weights: list[Tensor], trace: Trace, error: Tensor
) -> tuple[Errors, Errors]:
    """back_propagate and reach together, in products of twice the rows."""
    if not network.residual_norm:
        errors = back_propagate(network, weights, trace, error)
        return errors, errors
    size, sent = error.shape[1], scaled(network, error)
    both = torch.cat([trace.normed.gradient(sent), trace.normed.inverse_std * sent], 1)
    arriving, deltas = [], [both]
    for layer in reversed(range(1, len(weights))):
        arriving.append(_arriving(network, weights, layer, deltas[-1]))
        z = trace.hidden[layer - 1]
        slope = gelu_gradient(z.new_ones(()).expand_as(z), z)
        deltas.append((arriving[-1].unflatten(1, (2, size)) * slope.unsqueeze(1)).flatten(1, 2))
    halves = [
        Errors([x[:, half] for x in arriving[::-1]], [x[:, half] for x in deltas[::-1]])
        for half in (slice(size), slice(size, None))
    ]
    return halves[0], halves[1]


def scaled(network: Network, x: Tensor) -> Tensor:
    """x times LayerNorm's scale."""
    return x if network.norm_weight is None else x * network.norm_weight


def _through_matrices(network: Network, weights: list[Tensor], hidden: list[Tensor], delta: Tensor) -> Errors:
    arriving, deltas = [], [delta]
    for layer in reversed(range(1, len(weights))):
        arriving.append(_arriving(network, weights, layer, deltas[-1]))
        deltas.append(gelu_gradient(arriving[-1], hidden[layer - 1]))
    return Errors(arriving[::-1], deltas[::-1])


def _arriving(network: Network, weights: list[Tensor], layer: int, delta: Tensor) -> Tensor:
    """The error at the input of a matrix for the one at its output."""
    share, depth = network.share, len(weights)
    delta = into_output(share, layer, depth, delta)
    return sum_at_input(share, layer, depth, torch.bmm(delta, weights[layer].transpose(1, 2)))


def initial_weights(
    heads: int, widths: list[int], *, residual_norm: bool, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Random M_0: one (H, d_in, d_out) for each pair of neighbouring widths, float32.

    The scale sets the curvature that theta meets. LayerNorm divides the inner gradient by the size of what it
    normalises; with unit-norm keys and weights of standard deviation 1 the curvature of each matrix comes out near 2,
    that of a linear memory, whatever the widths. A plain MLP gets there with 1 / sqrt(d_in), and a single plain matrix
    starts empty.
    """
    depth = len(widths) - 1
    return [
        torch.randn(heads, d_in, d_out, generator=generator) * initial_std(residual_norm, depth, d_in)
        for d_in, d_out in itertools.pairwise(widths)
    ]


def initial_std(residual_norm: bool, depth: int, d_in: int) -> float:
    """Standard deviation of the initial weights of one of `depth` matrices; see initial_weights."""
    if residual_norm:
        return 1.0
    return 0.0 if depth == 1 else 1.0 / math.sqrt(d_in)


def smallest_rms(residual_norm: bool, depth: int, d_in: int) -> float:
    """Root mean square below which a matrix is led back to its initial weights.

    An empty network cannot learn again: the gradient at each of several matrices is a product of the others, and a
    LayerNorm has no derivative where its input vanishes. With all matrices at the floor that product is an eighth of
    what it was at first. A single plain matrix has neither trouble and may vanish.
    """
    return initial_std(residual_norm, depth, d_in) * 8.0 ** (-1.0 / max(depth - 1, 1))


def gelu_gradient(gradient: Tensor, z: Tensor) -> Tensor:
    """Gradient before the exact GELU, at z, for one behind it."""
    return torch.ops.aten.gelu_backward(gradient, z)


def gelu_second_derivative(z: Tensor) -> Tensor:
    """(2 - z^2) phi(z), phi the density of the normal distribution."""
    square = z.square()
    return (2.0 - square) * torch.exp(-0.5 * square) * (1.0 / math.sqrt(2.0 * math.pi))
