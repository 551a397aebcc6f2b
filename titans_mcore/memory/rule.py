"""What learns, and by which rule: the memory network M, and what keeps its updates stable. Measured in STABILITY.md.

Paper section 3.1 and the camera-ready: `residual_norm` is M(x) = x + LayerNorm(W_1 gelu(W_2 x)), `plain` is the MLP
alone; a GELU stands between matrices. Weights are (..., d_in, d_out) and act as h @ W, so that the inner gradient of a
token at one matrix is the outer product of that matrix's input h and of the error delta at its output. A process may
hold the matrices whole or a shard of each; what that changes is WholeMatrices and its subclass in
parallel/memory_shard.py.

Of the rules, `literal` is the paper's in chunks and nothing else. `stable`, the default, differs in four things:

- The error at the output of the *last matrix* is the one at the token's own weights, W_{t-1}, as the paper writes it
  (b = 1), not at the chunk's start: a chunk does not write the same correction b times. The network is linear in its
  last matrix, so that takes no more than products of keys; see chunk.py.
- The steps of the matrices below, whose gradients are those at the chunk's start, are *held*: each removes at most
  2 / b of its token's error, or of what the best answer of a network with LayerNorm would remove of it, since all b
  may pull the same way. n such matrices move each other's gradients, too, and are held to 2 / (b n!).
- Forgetting leads back to the learned M_0 instead of to zero: M_t = M_0 + (1 - alpha_t) (M_{t-1} - M_0) + S_t.
- The *state shell*: after a chunk's last token a matrix, or its momentum, whose root mean square is above a limit is
  scaled back to it. To a LayerNorm the size of a matrix is no information: what is stored stays, and what comes can
  still replace it. A plain network has no LayerNorm that bounds its answer; there no step of the last matrix removes
  more than the whole of its token's error either (the delta rule where there is no momentum).
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


RULES = ("stable", "literal")
VERSION = 6  # of the rule, and of what its native and fused forms take: an exported folder may find others installed
SMALLEST_DECAY = 1e-6  # of the momentum: a saturated gate (eta = 1) must make a step small, not zero


@dataclass(frozen=True)
class Rule:
    """How a memory is updated.

    Attributes:
        anchored: Forgetting leads to M_0, not to zero.
        exact: The error at the last matrix' output is that at the token's own last matrix.
            Steps of the matrices below are held.
        holds_last: Steps of the last matrix are held, too.
        rms_limit: Largest root mean square of a matrix and of its momentum behind a chunk; infinite for none.
        chunk_size: Tokens b of a whole chunk.
    """

    anchored: bool
    exact: bool
    holds_last: bool
    rms_limit: float
    chunk_size: int

    @classmethod
    def of(cls, name: str, chunk_size: int, *, residual_norm: bool, forgets: bool = True) -> "Rule":
        """The rule of one of RULES; without forgetting there is nothing that leads anywhere."""
        if name == "literal":
            return cls(anchored=False, exact=False, holds_last=False, rms_limit=math.inf, chunk_size=chunk_size)
        limit = 3.0 if residual_norm else 16.0
        return cls(anchored=forgets, exact=True, holds_last=not residual_norm, rms_limit=limit, chunk_size=chunk_size)

    def lower_steps(self, depth: int) -> int:
        """Steps that are reckoned to pull the same way at the n matrices below the last of `depth`, b n!.

        Two or three that are held as if each moved alone have outer gradients that grow from chunk to chunk; the
        factorial is about the least that stops it (STABILITY.md).
        """
        return self.chunk_size * math.factorial(depth - 1)

    def beyond(self, mean_square: Tensor) -> Tensor:
        """Where the state shell acts, for mean squares of matrices."""
        return mean_square > self.rms_limit**2

    def into_shell(self, matrix: Tensor, shard: WholeMatrices) -> Tensor:
        """(..., d_in, d_out) scaled back to rms_limit where its root mean square is larger."""
        if math.isinf(self.rms_limit):
            return matrix
        mean_square = shard.mean(matrix.square().mean((-1, -2), keepdim=True))
        beyond = self.beyond(mean_square)
        return torch.where(beyond, matrix * (self.rms_limit * mean_square.masked_fill(~beyond, 1.0).rsqrt()), matrix)


@dataclass(frozen=True)
class Memory:
    """A memory as a function: what does not change along a sequence.

    Attributes:
        network: The memory network, and what the process holds of its matrices.
        rule: The rule of its updates.
        initial: The learned M_0, L of (H, d_in, d_out).
    """

    network: Network
    rule: Rule
    initial: list[Tensor]


def last_step_share(mass: Tensor, input_square: Tensor) -> Tensor:
    """Factor on theta of a plain network's last matrix: a step removes all of its token's error at most; any shape.

    Args:
        mass: step_mass of the token; with all its momentum the step moves the answer by 2 mass |h|^2 of the error.
        input_square: |h|^2.
    """
    return (LOSS_SLOPE * mass * input_square).clamp_min(1.0).reciprocal()


def removable_loss(normed: Tensor, aim: Tensor) -> Tensor:
    """What of the loss |M(k) - v|^2 the best answer of a network with LayerNorm would remove, (...).

    LayerNorm's output n has one size and any direction, and the loss is |scale n|^2 + aim . n and what no answer
    changes. The best direction is that of -aim, where it is less by aim . n + |aim| |n|: by |aim| |n| times half the
    square of the chord between the two. Steps held to a share of the whole loss would not become shorter near the best
    answer, and outer gradients through them would grow from chunk to chunk.

    Args:
        normed: n, (..., D).
        aim: 2 scale (k + shift - v), centred; what of the gradient at n does not depend on n.
    """
    root = math.sqrt(normed.shape[-1])
    square = aim.square().sum(-1, keepdim=True)
    size = square.masked_fill(square == 0, 1.0).sqrt()
    chord = (normed / root + aim / size).masked_fill(square == 0, 0.0)
    return 0.5 * root * size.squeeze(-1) * chord.square().sum(-1)


def lower_step_share(loss: Tensor, pull: Tensor, steps: int) -> Tensor:
    """Factor on theta of the matrices below the last, the same for all of them; any shape.

    To first order a step theta removes theta |gradient|^2 / (2 loss) of the error; 2 / steps of it is the most.

    Args:
        loss: |M(k) - v|^2, or removable_loss of a network with LayerNorm.
        pull: Sum over the matrices of theta / (1 - eta) |gradient|^2.
        steps: lower_steps of the rule.
    """
    allowed, asked = 4.0 * loss, steps * pull
    held = asked > allowed
    return torch.where(held, allowed / asked.masked_fill(~held, 1.0), 1.0)


def step_mass(theta: Tensor, eta: Tensor) -> Tensor:
    """All of a step that momentum will ever make of it, theta / (1 - eta); any shape."""
    return theta / (1.0 - eta).clamp_min(SMALLEST_DECAY)
