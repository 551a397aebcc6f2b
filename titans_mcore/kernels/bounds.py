"""Device functions: the step bound, forward and backward. Twin of that in memory/stability.py.

`chunk_load` gives what `step_scale` needs, `step_scale_gradient` and `load_gradient` go back. The b x b matrices stay
in registers.
"""

import triton
import triton.language as tl

from .network import product

FREE_LOAD = tl.constexpr(0.5)
TINY = tl.constexpr(1e-20)


@triton.jit
def _load_terms(overlap, mass, BLOCK: tl.constexpr):
    """|h_t . h_j| * mass_j for j <= t, else 0."""
    tokens = tl.arange(0, BLOCK)
    return tl.where(tokens[:, None] >= tokens[None, :], tl.abs(overlap) * mass[None, :], 0.0)


@triton.jit
def _growth(overlap, reach_square, GROWTH: tl.constexpr, BLOCK: tl.constexpr):
    """How far a step of 1 moves a matrix out of the state shell (b,), and the squared length of its input (b,)."""
    tokens = tl.arange(0, BLOCK)
    input_square = tl.sum(tl.where(tokens[:, None] == tokens[None, :], overlap, 0.0), 1)
    return tl.sqrt(reach_square * input_square + TINY) * GROWTH, input_square


@triton.jit
def _load_part(overlap, mass, gain, reach_square, GROWTH: tl.constexpr, BLOCK: tl.constexpr):
    """What one matrix adds to own and before, both (b,)."""
    tokens = tl.arange(0, BLOCK)
    growth, input_square = _growth(overlap, reach_square, GROWTH, BLOCK)
    pulls = tl.abs(overlap) * gain[:, None] * gain[None, :] + growth[None, :]
    before = tl.sum(tl.where(tokens[:, None] > tokens[None, :], pulls * mass[None, :], 0.0), 1)
    return (input_square * gain * gain + growth) * mass, before


@triton.jit
def chunk_load(
    keys,
    overlap,
    error,
    reach,
    reached_square,
    first_mass,
    last_mass,
    GROWTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Load of a chunk's tokens.

    Args:
        keys: (b, D).
        overlap: Dot products of the last matrix' inputs, (b, b).
        error: Error of the answers, (b, D).
        reach: At the last matrix' output, (b, D).
        reached_square: Squared length of the reach at the first matrix' output, (b,).
        first_mass: 2 theta / (1 - eta) of the first matrix, (b,); unused if there is one only.
        last_mass: That of the last.
        GROWTH: stability.growth_unit of each matrix; they are equally large.

    Returns:
        own (b,), before (b,), the gains of the first and the last matrix (b,), the squared error (b,), and the dot
        products of the keys (b, b). A single matrix has no first: what stands in for that is to be ignored.
    """
    error_square = tl.sum(error * error, 1) + TINY
    reach_square = tl.sum(reach * reach, 1)
    last_gain = tl.sqrt((reach_square + TINY) / error_square)
    own, before = _load_part(overlap, last_mass, last_gain, reach_square, GROWTH, BLOCK)
    if DEPTH == 2:
        first_gain = tl.sqrt((reached_square + TINY) / error_square)
        first_overlap = product(keys, tl.trans(keys), OPERAND)
        first_own, first_before = _load_part(first_overlap, first_mass, first_gain, reached_square, GROWTH, BLOCK)
        return own + first_own, before + first_before, first_gain, last_gain, error_square, first_overlap
    else:
        return own, before, last_gain, last_gain, error_square, overlap


@triton.jit
def step_scale(own, before):
    """Factor (b,) on the steps of tokens that raise the load from before to before + own."""
    load = before + own
    from_half, to_half = tl.maximum(before, FREE_LOAD), tl.maximum(load, FREE_LOAD)
    below = tl.maximum(FREE_LOAD - before, 0.0) / tl.where(load > FREE_LOAD, tl.maximum(own, TINY), 1.0)
    below = tl.where(load > FREE_LOAD, below, 1.0)
    return below + (1.0 - below) * (0.25 / (from_half * to_half))


@triton.jit
def step_scale_gradient(own, before, of_scale):
    """Gradients (b,) at own, beyond what it does by way of the load, and at the load."""
    load = before + own
    from_half = tl.maximum(before, FREE_LOAD)
    beyond = tl.where(before >= FREE_LOAD, 1.0, (load - FREE_LOAD) / tl.maximum(own, TINY))
    slope = 0.5 / (from_half * tl.maximum(load, FREE_LOAD))
    gradient = tl.where(load > FREE_LOAD, of_scale * slope * slope, 0.0)
    beyond = tl.where(load > FREE_LOAD, beyond, 0.0)
    return gradient * beyond * beyond * load, -gradient * beyond * (load + from_half)


@triton.jit
def load_gradient(overlap, mass, gain, error_square, of_own, of_load, GROWTH: tl.constexpr, BLOCK: tl.constexpr):
    """From own and load to what one matrix gave to them.

    Returns:
        Gradients at its overlap (b, b), symmetric, at its mass (b,), and at the logarithm of its gain (b,), to which
        that at the error is proportional; the factor (b,) of the reach in the gradient at the reach.
    """
    tokens = tl.arange(0, BLOCK)
    lower, diagonal = tokens[:, None] >= tokens[None, :], tokens[:, None] == tokens[None, :]
    of_terms = tl.where(lower, of_load[:, None] + tl.where(diagonal, of_own[:, None], 0.0), 0.0)
    reach_square = gain * gain * error_square
    growth, input_square = _growth(overlap, reach_square, GROWTH, BLOCK)
    of_steps = tl.sum(of_terms, 0)  # at mass * growth
    # growth^2 = GROWTH^2 |reach|^2 |input|^2
    slope = of_steps * mass * GROWTH * GROWTH / growth
    moved = of_terms * _load_terms(overlap, mass, BLOCK)
    of_gain = tl.sum(moved * gain[None, :], 1) + tl.sum(moved * gain[:, None], 0)
    of_terms = of_terms * gain[:, None] * gain[None, :]
    of_mass = tl.sum(of_terms * tl.abs(overlap), 0) + of_steps * growth
    sign = tl.where(overlap > 0.0, 1.0, tl.where(overlap < 0.0, -1.0, 0.0))
    of_overlap = of_terms * mass[None, :] * sign
    of_overlap += tl.where(diagonal, (0.5 * slope * reach_square)[:, None], 0.0)
    along_reach = of_gain / (gain * error_square) + slope * input_square
    return of_overlap + tl.trans(of_overlap), of_mass, of_gain * gain, along_reach
