"""The memory network M: forward pass, the error of its answer, back-propagation, and initial weights.

Paper section 3.1 and the camera-ready: `residual_norm` is M(x) = x + LayerNorm(W_1 gelu(W_2 x)), `plain` is the MLP
alone; a GELU stands between matrices. Weights are (..., d_in, d_out) and act as h @ W, so that the inner gradient of a
token at one matrix is the outer product of that matrix's input h and of the error delta at its output.

A process may hold the matrices whole or a shard of each; what that changes is WholeMatrices and its subclass in
parallel/memory_shard.py.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6
_SMALLER = 2.0**-48  # scale at which LayerNorm squares its input: 1e33 is finite in float32, and no bit is lost
LOSS_SLOPE = 2.0  # the loss is |M(k) - v|^2, so the error at the answer is twice the difference


class WholeMatrices:
    """Matrices that the process holds whole: every step between them is the identity.

    A subclass for shards says here what is sliced, summed and counted once. Tensors are then *whole* (equal on all
    processes), a *part* (channels that no other process has) or *partial* (a term of a sum over the processes).
    """

    parts = 1

    def differentiable(self) -> Self:
        """The same for autograd."""
        return self

    def whole_shape(self, layer: int, depth: int, part: torch.Size) -> tuple[int, int]:
        """d_in and d_out of a matrix of which the process holds (..., d_in, d_out)."""
        return part[-2], part[-1]

    def spread(self, x: Tensor) -> Tensor:
        """Something whole on its way into the process's part."""
        return x

    def of_rows(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """Of something whole (..., d_in) what belongs to the rows that the process holds of a matrix."""
        return x

    def into_input(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """What the process's part of a matrix takes of x, the memory's input or the output of the matrix before."""
        return x

    def into_output(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """An error at a matrix' output on its way back into the process's part of the matrix."""
        return x

    def sum_at_output(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """The output of a matrix, summed where the process has a term of it."""
        return x

    def sum_at_input(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """The error at the input of a matrix, summed where the process has a term of it."""
        return x

    def sum_of_inputs(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """A sum over the channels of a matrix' input (dot products), over all of them."""
        return x

    def sum_of_outputs(self, layer: int, depth: int, x: Tensor) -> Tensor:
        """A sum over the channels of a matrix' output, over all of them."""
        return x

    def mean(self, mean: Tensor) -> Tensor:
        """A mean over whole matrices from that over the process's parts."""
        return mean


WHOLE = WholeMatrices()


@dataclass(frozen=True)
class Network:
    """What the memory computes besides its fast weights.

    Attributes:
        residual_norm: Add the input to the layer-normed output of the MLP.
        norm_weight: (H, D) scale of the LayerNorm, an outer parameter; None is 1.
        norm_bias: (H, D) shift of the LayerNorm; None is 0.
        shard: What the process holds of the matrices.
    """

    residual_norm: bool
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    shard: WholeMatrices = field(default=WHOLE)


class Normed(NamedTuple):
    """The MLP's output (N, b, D) and what LayerNorm makes of it.

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


def forward(network: Network, weights: list[Tensor], x: Tensor) -> Tensor:
    """M(x) for x (N, b, D) and weights of (N, d_in, d_out)."""
    inputs, _ = up_to_last(network, weights, x)
    depth = len(weights)
    return answer(
        network, x, normalise(network, network.shard.sum_at_output(depth - 1, depth, inputs[-1] @ weights[-1]))
    )


def up_to_last(network: Network, weights: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The MLP but for the product of its last matrix: inputs of all, (N, b, d_in), and outputs of those before it."""
    shard, depth = network.shard, len(weights)
    inputs, hidden = [shard.into_input(0, depth, x)], list[Tensor]()
    for layer, weight in enumerate(weights[:-1]):
        hidden.append(shard.sum_at_output(layer, depth, torch.bmm(inputs[-1], weight)))
        inputs.append(shard.into_input(layer + 1, depth, F.gelu(hidden[-1])))
    return inputs, hidden


def normalise(network: Network, raw: Tensor) -> Tensor:
    """LayerNorm without scale and shift of the MLP's output (N, b, D); a plain network's output stays as it is."""
    return layer_norm(raw).value if network.residual_norm else raw


def layer_norm(raw: Tensor) -> Normed:
    """LayerNorm of raw (N, b, D) without scale and shift."""
    eps = LAYER_NORM_EPS * _SMALLER**2
    value, mean, inverse_std = torch.native_layer_norm(raw * _SMALLER, raw.shape[-1:], None, None, eps)
    return Normed(raw, value, mean / _SMALLER, inverse_std * _SMALLER)


def per_memory(parameter: Tensor, x: Tensor) -> Tensor:
    """Scale or shift (H, D) for x (N, b, D) of N = B H memories, (N, 1, D)."""
    return parameter.repeat(len(x) // len(parameter), 1).unsqueeze(1)


def answer(network: Network, x: Tensor, normed: Tensor) -> Tensor:
    """M(x) for x (N, b, D), from its normalised MLP output."""
    if not network.residual_norm:
        return normed
    if network.norm_weight is not None:
        normed = normed * per_memory(network.norm_weight, x)
    return x + normed if network.norm_bias is None else x + per_memory(network.norm_bias, x) + normed


def answer_error(network: Network, keys: Tensor, values: Tensor, normed: Tensor) -> Tensor:
    """Gradient of |M(k) - v|^2 at the answer M(k)."""
    return LOSS_SLOPE * (answer(network, keys, normed) - values)


def propagate_down(network: Network, weights: list[Tensor], hidden: list[Tensor], delta: Tensor) -> list[Tensor]:
    """Errors at the output of each matrix, (N, b, d_out), for that at the last's; hidden is up_to_last's."""
    shard, depth = network.shard, len(weights)
    deltas = [delta]
    for layer in reversed(range(1, depth)):
        delta = shard.into_output(layer, depth, deltas[-1])
        arriving = shard.sum_at_input(layer, depth, torch.bmm(delta, weights[layer].transpose(1, 2)))
        deltas.append(gelu_gradient(arriving, hidden[layer - 1]))
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


def gelu_gradient(gradient: Tensor, z: Tensor) -> Tensor:
    """Gradient before the exact GELU, at z, for one behind it."""
    return torch.ops.aten.gelu_backward(gradient, z)
