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
COUNTS = ("memories", "heads", "chunks", "chunk_begin", "fresh_rows", "group")


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
    return pointer + tile * TILE + (tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :])


@triton.jit
def last(pointer, tile, D: tl.constexpr, TILE: tl.constexpr):
    """Pointers (TILE, D) to a tile of a last matrix."""
    return pointer + tile * TILE * D + (tl.arange(0, TILE)[:, None] * D + tl.arange(0, D)[None, :])


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
def query_input(
    q, state, anchor, hidden, share, attended, keep, carried, tile,
    BLOCK: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Of a tile of the first of two matrices: the queries' z, the keys' z and first delta, (b, TILE) each.

    Args:
        hidden: Pointer to the keys' z and what arrives there of the last delta, (2, b, HIDDEN).
        share: Factor on the first delta, (b,); None for none.
        attended: How much of it each query finds, (b, b).
        keep: As for `meet`, like carried.
    """
    at = hidden + tl.arange(0, BLOCK)[:, None] * HIDDEN + tile * TILE + tl.arange(0, TILE)[None, :]
    z = tl.load(at)
    delta1 = tl.load(at + BLOCK * HIDDEN) * gelu_slope(z)
    if share is not None:
        delta1 *= share[:, None]
    at1 = first(state, tile, D, HIDDEN, TILE)
    m1 = None if anchor is None else tl.load(first(anchor, tile, D, HIDDEN, TILE))
    met = meet(q, tl.load(at1), tl.load(at1 + D * HIDDEN), m1, keep, carried, OPERAND)
    return met - product(attended, delta1, OPERAND), z, delta1


@triton.jit
def answer_queries(
    q, k, delta, state, anchor, hidden, share, read1, read2, writes1, writes2, tiles,
    BLOCK: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """What a chunk's queries make of its memory before LayerNorm, (b, D).

    Args:
        q: Queries, (b, D), like k and the last delta.
        state: Pointer to the state before the chunk.
        anchor: Pointer to M_0; None where forgetting leads to zero.
        hidden: As for query_input.
        share: As for query_input.
        read1: Pointer to a and f of the first matrix, (b, 2), as read2 of the last.
        writes1: Pointer to G of the first matrix, (b, b), as writes2 of the last.
        tiles: HIDDEN / TILE.

    Returns:
        The answers; products of the queries' inputs with the keys', (b, b), at the first and at the last matrix.
    """
    LAST: tl.constexpr = (DEPTH - 1) * 2 * D * HIDDEN
    rows = tl.arange(0, BLOCK)
    square_at = rows[:, None] * BLOCK + rows[None, :]
    keep2, carried2 = tl.load(read2 + rows * 2), tl.load(read2 + rows * 2 + 1)
    similar1 = product(q, tl.trans(k), OPERAND)
    if DEPTH == 2:
        keep1, carried1 = tl.load(read1 + rows * 2), tl.load(read1 + rows * 2 + 1)
        attended1 = similar1 * tl.load(writes1 + square_at)
    answer = tl.full((BLOCK, D), 0.0, tl.float32)
    similar2 = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for tile in range(tiles):
        if DEPTH == 2:
            query_z, z, _ = query_input(
                q, state, anchor, hidden, share, attended1, keep1, carried1, tile, BLOCK, D, HIDDEN, TILE, OPERAND
            )
            x, h = gelu(query_z), gelu(z)
        else:
            x, h = q, k
        at2 = last(state + LAST, tile, D, TILE)
        m2 = None if anchor is None else tl.load(last(anchor + LAST // 2, tile, D, TILE))
        answer += meet(x, tl.load(at2), tl.load(at2 + D * HIDDEN), m2, keep2, carried2, OPERAND)
        similar2 += product(x, tl.trans(h), OPERAND)
    answer -= product(similar2 * tl.load(writes2 + square_at), delta, OPERAND)
    return answer, similar1, similar2


@triton.jit
def vector(pointer, fill: tl.constexpr, D: tl.constexpr):
    """D floats behind a pointer of which there may be none; then `fill`."""
    if pointer is not None:
        return tl.load(pointer + tl.arange(0, D)).to(tl.float32)
    else:
        return tl.full((D,), fill, tl.float32)
