"""Device functions: the memory network M for one chunk, in the pieces the kernels need.

Twin of memory/network.py. The last matrix (HIDDEN, D) is worked off in tiles of TILE rows, and the first (D, HIDDEN) of
a network with two in tiles of as many columns; a single matrix is a last one whose input is the token itself, with
HIDDEN = TILE = D. So one kernel serves both depths.

Where a matrix is: the state of one memory is one run of float32, weights before momentum and the first matrix before
the last. `first` and `last` give the pointers of a tile of a matrix; that of the momentum is D * HIDDEN further on.
"""

import triton
import triton.language as tl

# Triton's interpreter multiplies bfloat16 numbers as the integers that hold them.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def operand(x, OPERAND: tl.constexpr):
    """x rounded to the type of a product's operands."""
    if INTERPRETED:
        return x.to(OPERAND).to(tl.float32)
    else:
        return x.to(OPERAND)


@triton.jit
def product(a, b, OPERAND: tl.constexpr):
    """a @ b with operands of type OPERAND and float32 sums.

    Few rows and many columns are worked out transposed. Triton gives the warps rows of the result, and where there are
    fewer than warps need (16 each) all warps would do the same work and hold the same registers.
    """
    a, b = operand(a, OPERAND), operand(b, OPERAND)
    if a.shape[0] < b.shape[1]:
        return tl.trans(tl.dot(tl.trans(b), tl.trans(a), input_precision="ieee"))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tokens(pointer, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK: tl.constexpr, D: tl.constexpr):
    """Pointers (b, D) to a chunk's tokens in (B, T, H, D)."""
    at = (chunk * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return pointer + batch * stride_b + head * stride_h + at[:, None] * stride_t + tl.arange(0, D)[None, :]


@triton.jit
def contiguous_tokens(pointer, batch, head, chunk, chunks, heads, BLOCK: tl.constexpr, D: tl.constexpr):
    """The same where (B, T, H, D) is contiguous."""
    at = batch * (chunks * BLOCK) + chunk * BLOCK + tl.arange(0, BLOCK)
    return pointer + ((at * heads + head) * D)[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def first(pointer, tile, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """Pointers (D, TILE) to a tile of a first matrix."""
    columns = tile * TILE + tl.arange(0, TILE)
    return pointer + tl.arange(0, D)[:, None] * HIDDEN + columns[None, :]


@triton.jit
def last(pointer, tile, D: tl.constexpr, TILE: tl.constexpr):
    """Pointers (TILE, D) to a tile of a last matrix."""
    rows = tile * TILE + tl.arange(0, TILE)
    return pointer + rows[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def matrix(registers, pointers, ON_CHIP: tl.constexpr):
    """A tile that is kept in registers or, if not, lies behind pointers."""
    if ON_CHIP:
        return registers
    else:
        return tl.load(pointers)


@triton.jit
def load_state(state, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """Weights and momentum of the first matrix, then of the last, each in one tile; stand-ins for a first not there."""
    pointers = last(state + (DEPTH - 1) * 2 * D * HIDDEN, 0, D, TILE)
    w2, s2 = tl.load(pointers), tl.load(pointers + D * HIDDEN)
    if DEPTH == 2:
        pointers = first(state, 0, D, HIDDEN, TILE)
        return tl.load(pointers), tl.load(pointers + D * HIDDEN), w2, s2
    else:
        return tl.full((1, 1), 0.0, tl.float32), tl.full((1, 1), 0.0, tl.float32), w2, s2


@triton.jit
def save_state(state, w1, s1, w2, s2, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """What load_state has loaded, back to memory."""
    save(last(state + (DEPTH - 1) * 2 * D * HIDDEN, 0, D, TILE), w2, s2, D * HIDDEN)
    if DEPTH == 2:
        save(first(state, 0, D, HIDDEN, TILE), w1, s1, D * HIDDEN)


@triton.jit
def replace(pointers, weights, momentum, MATRIX: tl.constexpr):
    """save over tiles that all threads have loaded before any stores."""
    tl.debug_barrier()
    save(pointers, weights, momentum, MATRIX)


@triton.jit
def save(pointers, weights, momentum, MATRIX: tl.constexpr):
    """Store a tile of weights and that of their momentum."""
    tl.store(pointers, weights)
    tl.store(pointers + MATRIX, momentum)


@triton.jit
def gelu(z):
    """The exact GELU."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z):
    """First derivative of gelu."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def gelu_bend(z):
    """Second derivative of gelu."""
    return (2.0 - z * z) * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def normalise(raw, EPS: tl.constexpr):
    """LayerNorm of raw (b, D) before scale and shift, and the inverse standard deviations (b,)."""
    centred = raw - (tl.sum(raw, 1) / raw.shape[1])[:, None]
    inverse_std = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / raw.shape[1] + EPS)
    return centred * inverse_std[:, None], inverse_std


@triton.jit
def norm_gradient(x, normed, inverse_std):
    """LayerNorm's derivative applied to x (b, D); it is its own transpose."""
    along = tl.sum(x * normed, 1) / x.shape[1]
    return inverse_std[:, None] * (x - (tl.sum(x, 1) / x.shape[1])[:, None] - normed * along[:, None])


@triton.jit
def answer_keys(
    keys,
    first_weights,
    last_weights,
    state,
    tiles,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    ON_CHIP: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """What the MLP makes of the keys (b, D)."""
    raw = tl.full(keys.shape, 0.0, tl.float32)
    for tile in range(tiles):
        if DEPTH == 2:
            h = gelu(product(keys, matrix(first_weights, first(state, tile, D, HIDDEN, TILE), ON_CHIP), OPERAND))
        else:
            h = keys
        weights = matrix(last_weights, last(state + (DEPTH - 1) * 2 * D * HIDDEN, tile, D, TILE), ON_CHIP)
        raw += product(h, weights, OPERAND)
    return raw


@triton.jit
def answer_of(raw, x, scale, shift, EPS: tl.constexpr):
    """M(x) of a network with LayerNorm from its MLP's output; with LayerNorm's value and inverse deviation."""
    normed, inverse_std = normalise(raw, EPS)
    return x + normed * scale[None, :] + shift[None, :], normed, inverse_std


@triton.jit
def errors_of(raw, keys, values, scale, shift, NORM: tl.constexpr, EPS: tl.constexpr):
    """From the MLP's output to the error of the answer and what of it arrives at the last matrix' output.

    Returns:
        The error 2 (M(k) - v) and the delta of the last matrix, both (b, D); LayerNorm's value (b, D) and inverse
        standard deviation (b,), without meaning in a plain network.
    """
    if NORM:
        answer, normed, inverse_std = answer_of(raw, keys, scale, shift, EPS)
        error = 2.0 * (answer - values)
        return error, norm_gradient(error * scale[None, :], normed, inverse_std), normed, inverse_std
    else:
        error = 2.0 * (raw - values)
        return error, error, raw, tl.sum(raw, 1)


@triton.jit
def errors_gradient(of_delta, error, delta, normed, inverse_std, scale, NORM: tl.constexpr):
    """Back through errors_of.

    Returns:
        Gradients at the error (b, D), at raw (b, D), and at the scale (D,), which without LayerNorm has no meaning.
    """
    if NORM:
        # What delta = LN'(s) owes to raw, s the error times scale: InnerGradient in memory/chunk_backward.py.
        of_sent = norm_gradient(of_delta, normed, inverse_std)
        of_error = of_sent * scale[None, :]
        per_channel = inverse_std / error.shape[1]
        along_sent = tl.sum(error * scale[None, :] * normed, 1) * per_channel
        along_normed = tl.sum(of_delta * normed, 1) * per_channel
        along_delta = tl.sum(of_delta * delta, 1) * per_channel
        of_raw = norm_gradient(2.0 * of_error * scale[None, :], normed, inverse_std)
        of_raw -= along_sent[:, None] * of_sent + along_normed[:, None] * delta + along_delta[:, None] * normed
        return of_error, of_raw, tl.sum(of_sent * error + 2.0 * of_error * normed, 0)
    else:
        return of_delta, 2.0 * of_delta, scale


@triton.jit
def meet(x, weights, momentum, anchor, keep, carried, OPERAND: tl.constexpr):
    """What queries x (b, d_in) find in a matrix as it was, a_t W x_t + f_t S x_t + (1 - a_t) M_0 x_t.

    Args:
        x: The matrix' input.
        weights: W at the chunk's start, (d_in, d_out) like momentum S and the anchor.
        momentum: S.
        anchor: M_0; None where forgetting leads to zero.
        keep: a_t, (b,).
        carried: f_t, (b,).
    """
    met = product(x, weights, OPERAND) * keep[:, None] + product(x, momentum, OPERAND) * carried[:, None]
    if anchor is not None:
        met += product(x, anchor, OPERAND) * (1.0 - keep)[:, None]
    return met


@triton.jit
def vector(pointer, fill: tl.constexpr, D: tl.constexpr):
    """D floats behind a pointer of which there may be none; then `fill`."""
    if pointer is not None:
        return tl.load(pointer + tl.arange(0, D)).to(tl.float32)
    else:
        return tl.full((D,), fill, tl.float32)
