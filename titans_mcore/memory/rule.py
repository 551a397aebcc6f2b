"""What keeps the memory stable: the rule of an update beyond the paper's equations. Measured in STABILITY.md.

`literal` is the paper's rule in chunks and nothing else. `stable`, the default, differs in four things:

- The error at the output of the *last matrix* is the one at the token's own weights, W_{t-1}, as the paper writes it
  (b = 1), not at the chunk's start: a chunk does not write the same correction b times. The network is linear in its
  last matrix, so that takes no more than products of keys; see chunk.py.
- The steps of the matrices below, whose gradients are those at the chunk's start, are *held*: each removes at most
  2 / b of its token's error, or of what the best answer of a network with LayerNorm would remove of it, since all b
  may pull the same way.
- Forgetting leads back to the learned M_0 instead of to zero: M_t = M_0 + (1 - alpha_t) (M_{t-1} - M_0) + S_t.
- The *state shell*: after a chunk's last token a matrix, or its momentum, whose root mean square is above a limit is
  scaled back to it. To a LayerNorm the size of a matrix is no information: what is stored stays, and what comes can
  still replace it. A plain network has no LayerNorm that bounds its answer; there no step of the last matrix removes
  more than the whole of its token's error either (the delta rule where there is no momentum).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .network import LOSS_SLOPE, Network, WholeMatrices

RULES = ("stable", "literal")
VERSION = 4  # of the rule, and of what its native and fused forms take: an exported folder may find others installed
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


def lower_step_share(loss: Tensor, pull: Tensor, chunk_size: int) -> Tensor:
    """Factor on theta of the matrices below the last, the same for all of them; any shape.

    To first order a step theta removes theta |gradient|^2 / (2 loss) of the error; 2 / b of it is the most.

    Args:
        loss: |M(k) - v|^2, or removable_loss of a network with LayerNorm.
        pull: Sum over the matrices of theta / (1 - eta) |gradient|^2.
        chunk_size: Tokens b of a whole chunk.
    """
    allowed, asked = 4.0 * loss, chunk_size * pull
    held = asked > allowed
    return torch.where(held, allowed / asked.masked_fill(~held, 1.0), 1.0)


def step_mass(theta: Tensor, eta: Tensor) -> Tensor:
    """All of a step that momentum will ever make of it, theta / (1 - eta); any shape."""
    return theta / (1.0 - eta).clamp_min(SMALLEST_DECAY)
