"""Device functions: the memory network M for one chunk, in the pieces the kernels need.

Twin of memory/rule.py. The last matrix (HIDDEN, D) is worked off in tiles of TILE rows, and the first (D, HIDDEN) of
a network with two in tiles of as many columns; a single matrix is a last one whose input is the token itself, with
HIDDEN = TILE = D. So one kernel serves both depths.

Where a matrix is: the state of one memory is one run of float32, weights before momentum and the first matrix before
the last. `first` and `last` give the pointers of a tile of a matrix; that of the momentum is D * HIDDEN further on.
"""

import triton
import triton.language as tl

# Triton's interpreter multiplies bfloat16 numbers as the integers that hold them.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Arguments that change from call to call. Triton would compile a kernel again for those that are 1 or divisible by 16.
COUNTS = ("memories", "heads", "chunks", "chunk_begin", "chunk_end", "keep_every", "fresh_rows", "group")


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
def before(coefficient, rows, first: tl.constexpr):
    """A coefficient of the reads (b,) for the token before each; `first` for the chunk's first token.

    Args:
        coefficient: Pointer to that of the chunk's first token; the next is two numbers further on.
    """
    return tl.load(coefficient + (rows - 1) * 2, mask=rows > 0, other=first)


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
    inverse_std = tl.rsqrt(tl.sum(centred * centred, 1) / raw.shape[1] + EPS)
    return centred * inverse_std[:, None], inverse_std


@triton.jit
def norm_gradient(x, normed, inverse_std):
    """LayerNorm's derivative applied to x (b, D); it is its own transpose."""
    along = tl.sum(x * normed, 1) / x.shape[1]
    return inverse_std[:, None] * (x - (tl.sum(x, 1) / x.shape[1])[:, None] - normed * along[:, None])


@triton.jit
def answer_of(raw, x, scale, shift, EPS: tl.constexpr):
    """M(x) of a network with LayerNorm from its MLP's output; with LayerNorm's value and inverse deviation."""
    normed, inverse_std = normalise(raw, EPS)
    return x + normed * scale[None, :] + shift[None, :], normed, inverse_std


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
def meet_keys(
    keys,
    first_weights,
    last_weights,
    last_momentum,
    state,
    anchor,
    keep,
    carried,
    tiles,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
    ON_CHIP: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """What the keys (b, D) meet in the last matrix, (b, D), and the products h_t . h_j of its inputs for them, (b, b).

    Without EXACT it is the matrix at the chunk's start that they meet, and there are no products.

    Args:
        keys: The keys.
        first_weights: The state where it is in registers, like the other two.
        last_weights: W.
        last_momentum: S.
        state: The state where it is not.
        anchor: M_0, both matrices; None where forgetting leads to zero.
        keep: As for `meet`, but those of the token before each, like `carried`.
        carried: f_{t-1}, (b,).
        tiles: HIDDEN / TILE.
    """
    LAST: tl.constexpr = (DEPTH - 1) * 2 * D * HIDDEN
    met = tl.full((BLOCK, D), 0.0, tl.float32)
    alike = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for tile in range(tiles):
        if DEPTH == 2:
            h = gelu(product(keys, matrix(first_weights, first(state, tile, D, HIDDEN, TILE), ON_CHIP), OPERAND))
        else:
            h = keys
        at = last(state + LAST, tile, D, TILE)
        weights = matrix(last_weights, at, ON_CHIP)
        if EXACT:
            momentum = matrix(last_momentum, at + D * HIDDEN, ON_CHIP)
            led = None if anchor is None else tl.load(last(anchor + LAST // 2, tile, D, TILE))
            met += meet(h, weights, momentum, led, keep, carried, OPERAND)
            alike += product(h, tl.trans(h), OPERAND)
        else:
            met += product(h, weights, OPERAND)
    return met, alike


@triton.jit
def first_delta_square(
    keys,
    delta,
    first_weights,
    last_weights,
    state,
    tiles,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    ON_CHIP: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """|delta|^2 at the first of two matrices, (b,), for the deltas (b, D) of the last; arguments as for meet_keys."""
    square = tl.full((BLOCK,), 0.0, tl.float32)
    for tile in range(tiles):
        z = product(keys, matrix(first_weights, first(state, tile, D, HIDDEN, TILE), ON_CHIP), OPERAND)
        weights = matrix(last_weights, last(state + 2 * D * HIDDEN, tile, D, TILE), ON_CHIP)
        delta1 = product(delta, tl.trans(weights), OPERAND) * gelu_slope(z)
        square += tl.sum(delta1 * delta1, 1)
    return square


@triton.jit
def vector(pointer, fill: tl.constexpr, D: tl.constexpr):
    """D floats behind a pointer of which there may be none; then `fill`."""
    if pointer is not None:
        return tl.load(pointer + tl.arange(0, D)).to(tl.float32)
    else:
        return tl.full((D,), fill, tl.float32)
