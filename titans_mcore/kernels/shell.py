"""Device functions: the state shell, forward and backward. Twin of that in memory/stability.py.

It seldom acts. If it does, it goes over the state in global memory in flat blocks; kernels that keep the state in
registers store it for that and load it again.
"""

import triton
import triton.language as tl

RMS_LIMIT = tl.constexpr(16.0)
EMPTY = tl.constexpr(1e-30)


@triton.jit
def shell_acts(
    first_weights, first_momentum, last_weights, last_momentum, first_floor, last_floor, DEPTH: tl.constexpr
):
    """Whether a state of these mean squares is outside the shell; there are no floors for momentum."""
    acts = _leaves_shell(last_weights, last_floor) | _leaves_shell(last_momentum, 0.0)
    if DEPTH == 2:
        acts |= _leaves_shell(first_weights, first_floor) | _leaves_shell(first_momentum, 0.0)
    return acts


@triton.jit
def _leaves_shell(mean_square, floor):
    return (mean_square > RMS_LIMIT * RMS_LIMIT) | (mean_square < floor * floor)


@triton.jit
def state_into_shell(
    state,
    anchors,
    memory,
    anchor_rows,
    first_weights,
    first_momentum,
    last_weights,
    last_momentum,
    first_floor,
    last_floor,
    MATRIX: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Bring a memory's state into the shell, in place, given the mean squares of its matrices."""
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX
    anchor = anchors if anchors is None else anchors + (memory % anchor_rows) * (DEPTH * MATRIX)
    last_anchor = anchor if anchor is None else anchor + LAST // 2
    tl.debug_barrier()
    _into_shell(state + LAST, last_anchor, last_weights, last_floor, MATRIX)
    _into_shell(state + LAST + MATRIX, None, last_momentum, 0.0, MATRIX)
    if DEPTH == 2:
        _into_shell(state, anchor, first_weights, first_floor, MATRIX)
        _into_shell(state + MATRIX, None, first_momentum, 0.0, MATRIX)
    tl.debug_barrier()


@triton.jit
def state_into_shell_gradient(
    of_state,
    after,
    anchors,
    of_anchors,
    memory,
    anchor_rows,
    first_weights,
    first_momentum,
    last_weights,
    last_momentum,
    first_floor,
    last_floor,
    MATRIX: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Back through state_into_shell, in place; `after` is the state in the shell, the mean squares are of before."""
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX
    anchor = anchors if anchors is None else anchors + (memory % anchor_rows) * (DEPTH * MATRIX)
    of_anchor = of_anchors if of_anchors is None else of_anchors + memory * (DEPTH * MATRIX)
    last_anchor = anchor if anchor is None else anchor + LAST // 2
    of_last_anchor = of_anchor if of_anchor is None else of_anchor + LAST // 2
    tl.debug_barrier()
    _into_shell_gradient(of_state + LAST, after + LAST, last_anchor, of_last_anchor, last_weights, last_floor, MATRIX)
    momentum = LAST + MATRIX
    _into_shell_gradient(of_state + momentum, after + momentum, None, None, last_momentum, 0.0, MATRIX)
    if DEPTH == 2:
        _into_shell_gradient(of_state, after, anchor, of_anchor, first_weights, first_floor, MATRIX)
        _into_shell_gradient(of_state + MATRIX, after + MATRIX, None, None, first_momentum, 0.0, MATRIX)
    tl.debug_barrier()


@triton.jit
def _into_shell(pointer, anchor, mean_square, floor, COUNT: tl.constexpr):
    """Bring the COUNT floats of a matrix into the shell, in place.

    Args:
        pointer: The matrix.
        anchor: Where it is led from below the floor; None if it has none.
        mean_square: Of the matrix as it is.
        floor: Smallest root mean square.
    """
    FLAT: tl.constexpr = min(COUNT, 1024)
    shrink = tl.where(mean_square > RMS_LIMIT * RMS_LIMIT, RMS_LIMIT / tl.sqrt(mean_square), 1.0)
    lack = tl.maximum(floor - tl.sqrt(mean_square + EMPTY), 0.0)
    for block in range(COUNT // FLAT):
        at = block * FLAT + tl.arange(0, FLAT)
        x = tl.load(pointer + at) * shrink
        if anchor is not None:
            x += lack * tl.load(anchor + at)
        tl.store(pointer + at, x)


@triton.jit
def _into_shell_gradient(pointer, inside, anchor, of_anchor, mean_square, floor, COUNT: tl.constexpr):
    """Back through _into_shell, in place; adds to of_anchor.

    With D the gradient at W' = s U, s = limit / rms(U): s (D - (D . W') W' / (COUNT limit^2)). With W' = U + lack A,
    lack = floor - rms(U): D - (D . A) U / (COUNT rms(U)) at U and lack D at A.

    Args:
        pointer: Gradient at the matrix in the shell; becomes that at the matrix before.
        inside: The matrix in the shell.
        anchor: As for _into_shell.
        of_anchor: Gradient at it so far.
        mean_square: Of the matrix before it came into the shell.
        floor: Smallest root mean square.
    """
    FLAT: tl.constexpr = min(COUNT, 1024)
    rms = tl.sqrt(mean_square + EMPTY)
    shrinks = mean_square > RMS_LIMIT * RMS_LIMIT
    lack = tl.maximum(floor - rms, 0.0)
    along_inside = tl.full((FLAT,), 0.0, tl.float32)
    along_anchor = tl.full((FLAT,), 0.0, tl.float32)
    for block in range(COUNT // FLAT):
        at = block * FLAT + tl.arange(0, FLAT)
        of_inside = tl.load(pointer + at)
        along_inside += of_inside * tl.load(inside + at)
        if anchor is not None:
            along_anchor += of_inside * tl.load(anchor + at)
    along = tl.sum(along_inside) / (COUNT * RMS_LIMIT * RMS_LIMIT)
    lifted = tl.where(lack > 0.0, tl.sum(along_anchor) / (COUNT * rms), 0.0)
    for block in range(COUNT // FLAT):
        at = block * FLAT + tl.arange(0, FLAT)
        of_inside, x = tl.load(pointer + at), tl.load(inside + at)
        gradient = tl.where(shrinks, (of_inside - along * x) * (RMS_LIMIT / rms), of_inside)
        if anchor is not None:
            gradient -= lifted * (x - lack * tl.load(anchor + at))
            tl.store(of_anchor + at, tl.load(of_anchor + at) + lack * of_inside)
        tl.store(pointer + at, gradient)


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
