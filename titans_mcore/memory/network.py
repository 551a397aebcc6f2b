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

    def recorded(self, sums: list[Tensor]) -> Self:
        """The same, which appends its sums to a list."""
        return self

    def replayed(self, sums: list[Tensor]) -> Self:
        """The same for who goes again the way on which `sums` were recorded: nothing is summed twice."""
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

    def out_of_input(self, depth: int, x: Tensor) -> Tensor:
        """A gradient at what the first matrix takes as a partial one at all of it."""
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

    def once(self, x: Tensor) -> Tensor:
        """Something whole as a partial one."""
        return x

    def mean(self, mean: Tensor) -> Tensor:
        """A mean over whole matrices from that over the process's parts."""
        return mean

    def sum_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """Partial tensors of one dtype, summed at once."""
        return tensors


WHOLE = WholeMatrices()


@dataclass(frozen=True)
class Network:
    """What the memory computes besides its fast weights.

    Attributes:
        residual_norm: Add the input to the layer-normed output of the MLP.
        norm_weight: (H, D) scale of the LayerNorm, an outer parameter; None is 1. See `for_memories`.
        norm_bias: (H, D) shift of the LayerNorm; None is 0.
        shard: What the process holds of the matrices.
    """

    residual_norm: bool
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    shard: WholeMatrices = field(default=WHOLE)

    def for_memories(self, batch: int) -> "Network":
        """The same with scale and shift (N, 1, D) for N = batch * H memories in one axis."""
        weight, bias = (
            None if x is None else x.expand(batch, *x.shape).flatten(0, 1).unsqueeze(1)
            for x in (self.norm_weight, self.norm_bias)
        )
        return Network(self.residual_norm, weight, bias, self.shard)


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


class WrittenOutNormed(Normed):
    """LayerNorm in operations that autograd differentiates twice; torch's own hides its derivative by the deviation."""

    @classmethod
    def of(cls, raw: Tensor) -> "WrittenOutNormed":
        """LayerNorm of raw (..., D)."""
        mean = raw.mean(-1, keepdim=True)
        centred = raw - mean
        inverse_std = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        return cls(raw, centred * inverse_std, mean, inverse_std)

    def gradient(self, value_gradient: Tensor) -> Tensor:
        """See Normed."""
        along = (value_gradient * self.value).mean(-1, keepdim=True)
        return self.inverse_std * (value_gradient - value_gradient.mean(-1, keepdim=True) - along * self.value)


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
    normed: Normed


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
    inputs, hidden = up_to_last(network, weights, x)
    depth = len(weights)
    raw = network.shard.sum_at_output(depth - 1, depth, torch.bmm(inputs[-1], weights[-1]))
    return Trace(inputs, hidden, normalise(network, raw))


def up_to_last(network: Network, weights: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Trace.inputs and Trace.hidden: the MLP without the product of its last matrix."""
    shard, depth = network.shard, len(weights)
    inputs, hidden = [shard.into_input(0, depth, x)], list[Tensor]()
    for layer, weight in enumerate(weights[:-1]):
        hidden.append(shard.sum_at_output(layer, depth, torch.bmm(inputs[-1], weight)))
        inputs.append(shard.into_input(layer + 1, depth, F.gelu(hidden[-1])))
    return inputs, hidden


def normalise(network: Network, raw: Tensor) -> Normed:
    """LayerNorm without scale and shift of the MLP's output (N, b, D); a plain network's output stays as it is."""
    if not network.residual_norm:
        return Normed(raw, raw, raw, raw)
    eps = LAYER_NORM_EPS * _SMALLER**2
    value, mean, inverse_std = torch.native_layer_norm(raw * _SMALLER, raw.shape[-1:], None, None, eps)
    return Normed(raw, value, mean / _SMALLER, inverse_std * _SMALLER)


def answer(network: Network, x: Tensor, normed: Tensor) -> Tensor:
    """M(x) from its normalised MLP output; scale and shift broadcast against both."""
    if not network.residual_norm:
        return normed
    if network.norm_weight is not None:
        normed = normed * network.norm_weight
    return x + normed if network.norm_bias is None else x + network.norm_bias + normed


def answer_error(network: Network, keys: Tensor, values: Tensor, normed: Tensor) -> Tensor:
    """Gradient of |M(k) - v|^2 at the answer M(k)."""
    return LOSS_SLOPE * (answer(network, keys, normed) - values)


def back_propagate(network: Network, weights: list[Tensor], trace: Trace, error: Tensor) -> Errors:
    """Errors at the output of each matrix for the error (N, b, D) of M(x); scale is (N, 1, D)."""
    delta = trace.normed.gradient(scaled(network, error)) if network.residual_norm else error
    return propagate_down(network, weights, trace.hidden, delta)


def propagate_down(network: Network, weights: list[Tensor], hidden: list[Tensor], delta: Tensor) -> Errors:
    """Errors at the output of each matrix for the one at the last's, (N, b, D); hidden is Trace.hidden."""
    shard, depth = network.shard, len(weights)
    arriving, deltas = [], [delta]
    for layer in reversed(range(1, depth)):
        delta = shard.into_output(layer, depth, deltas[-1])
        arriving.append(shard.sum_at_input(layer, depth, torch.bmm(delta, weights[layer].transpose(1, 2))))
        deltas.append(gelu_gradient(arriving[-1], hidden[layer - 1]))
    return Errors(arriving[::-1], deltas[::-1])


def scaled(network: Network, x: Tensor) -> Tensor:
    """x times LayerNorm's scale."""
    return x if network.norm_weight is None else x * network.norm_weight


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


def gelu_second_derivative(z: Tensor) -> Tensor:
    """(2 - z^2) phi(z), phi the density of the normal distribution."""
    square = z.square()
    return (2.0 - square) * torch.exp(-0.5 * square) * (1.0 / math.sqrt(2.0 * math.pi))
