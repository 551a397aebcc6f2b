"""Device functions: the state shell, forward and backward, and what else goes over a state in flat blocks.

Twin of Rule.into_shell in memory/rule.py. It seldom acts. Where the state is in global memory it costs barriers only
then.
"""

import triton
import triton.language as tl


@triton.jit
def shell_factor(mean_square, LIMIT: tl.constexpr):
    """What scales a matrix of this mean square back into the shell; 1 inside of it."""
    square: tl.constexpr = LIMIT * LIMIT
    return tl.where(mean_square > square, LIMIT / tl.sqrt(tl.maximum(mean_square, square)), 1.0)


@triton.jit
def shell_acts(factor_w1, factor_s1, factor_w2, factor_s2):
    """Whether any of the factors is not 1."""
    return (factor_w1 < 1.0) | (factor_s1 < 1.0) | (factor_w2 < 1.0) | (factor_s2 < 1.0)


@triton.jit
def state_into_shell(
    state, factor_w1, factor_s1, factor_w2, factor_s2, MATRIX: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Scale the matrices of a state, in place."""
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX
    tl.debug_barrier()
    _scale(state + LAST, factor_w2, MATRIX)
    _scale(state + LAST + MATRIX, factor_s2, MATRIX)
    if DEPTH == 2:
        _scale(state, factor_w1, MATRIX)
        _scale(state + MATRIX, factor_s1, MATRIX)


@triton.jit
def _scale(pointer, factor, COUNT: tl.constexpr):
    FLAT: tl.constexpr = min(COUNT, 1024)
    for block in range(COUNT // FLAT):
        at = pointer + block * FLAT + tl.arange(0, FLAT)
        tl.store(at, tl.load(at) * factor)


@triton.jit
def state_into_shell_gradient(
    of_state,
    after,
    factor_w1,
    factor_s1,
    factor_w2,
    factor_s2,
    LIMIT: tl.constexpr,
    MATRIX: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Back through state_into_shell, in place; `after` is the state in the shell."""
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX
    tl.debug_barrier()
    _scale_gradient(of_state + LAST, after + LAST, factor_w2, LIMIT, MATRIX)
    _scale_gradient(of_state + LAST + MATRIX, after + LAST + MATRIX, factor_s2, LIMIT, MATRIX)
    if DEPTH == 2:
        _scale_gradient(of_state, after, factor_w1, LIMIT, MATRIX)
        _scale_gradient(of_state + MATRIX, after + MATRIX, factor_s1, LIMIT, MATRIX)
    tl.debug_barrier()


@triton.jit
def _scale_gradient(pointer, inside, factor, LIMIT: tl.constexpr, COUNT: tl.constexpr):
    """With D the gradient at W = s U, s = limit / rms(U): s (D - (D . W) W / (COUNT limit^2)) at U; D where s is 1."""
    FLAT: tl.constexpr = min(COUNT, 1024)
    if factor < 1.0:
        along = tl.full((FLAT,), 0.0, tl.float32)
        for block in range(COUNT // FLAT):
            at = block * FLAT + tl.arange(0, FLAT)
            along += tl.load(pointer + at) * tl.load(inside + at)
        share = tl.sum(along) / (COUNT * LIMIT * LIMIT)
        for block in range(COUNT // FLAT):
            at = block * FLAT + tl.arange(0, FLAT)
            tl.store(pointer + at, factor * (tl.load(pointer + at) - share * tl.load(inside + at)))


@triton.jit
def move(source, target, COUNT: tl.constexpr):
    """Copy COUNT floats."""
    FLAT: tl.constexpr = min(COUNT, 1024)
    for block in range(COUNT // FLAT):
        at = block * FLAT + tl.arange(0, FLAT)
        tl.store(target + at, tl.load(source + at))


@triton.jit
def hand_over(source, target, COUNT: tl.constexpr):
    """Add COUNT floats to a target and leave zeros behind."""
    FLAT: tl.constexpr = min(COUNT, 1024)
    for block in range(COUNT // FLAT):
        at = block * FLAT + tl.arange(0, FLAT)
        tl.store(target + at, tl.load(target + at) + tl.load(source + at))
        tl.store(source + at, tl.full((FLAT,), 0.0, tl.float32))
