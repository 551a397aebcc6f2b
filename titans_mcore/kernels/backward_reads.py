"""The backward kernel of the reads: back from the outputs to the queries, and to all that they met.

The states are known by then, so every chunk of a group is on its own: one program for each memory and chunk. It reads
anew, goes back through that, and leaves to backward_chain.py, which follows the states, what that needs: gradients that
go on from here, in float32 scratch of the size of the group's tokens.
"""

import triton
import triton.language as tl

from .errors import aims_of, centre, lower_share_gradient
from .network import (
    COUNTS,
    answer_queries,
    contiguous_tokens,
    first,
    gelu,
    gelu_slope,
    last,
    norm_gradient,
    normalise,
    product,
    query_input,
    tokens,
    vector,
)


@triton.jit(do_not_specialize=COUNTS)
def reads_backward_kernel(
    queries,  # as in forward.py, like the others of these names
    keys,
    values,
    of_reads,  # (B, T, H, D) contiguous, gradient at the reads
    of_queries,  # (B, T, H, D) contiguous; written here
    read,
    writes,
    mass,
    of_read,  # gradients at the gates' coefficients, of their shapes; written here
    of_writes,
    scale,
    shift,
    anchors,
    states,  # (g + 1, N, SIZE) states with which the group's chunks begin
    hidden,
    deltas,
    known,
    held,
    wide,  # (g, N, 4, b, HIDDEN), see Scratch in launch.py
    narrow,  # (g, N, 5, b, D)
    of_norm,  # (C, N, 2, D) parts of the gradients at scale and shift
    stride_b,
    stride_t,
    stride_h,
    memories,
    heads,
    chunks,
    chunk_begin,
    tiles,  # HIDDEN / TILE, not a constant: unrolled loops need more registers than there are
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    MATRIX: tl.constexpr = D * HIDDEN
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX
    memory = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * memories + memory  # among the group's chunks
    chunk = chunk_begin + tl.program_id(1)
    batch, head = memory // heads, memory % heads
    rows = tl.arange(0, BLOCK)
    square_at = rows[:, None] * BLOCK + rows[None, :]
    narrow_at = place * 5 * BLOCK * D + rows[:, None] * D + tl.arange(0, D)[None, :]
    wide_at = place * 4 * BLOCK * HIDDEN + rows[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    state = states + place * (2 * DEPTH * MATRIX)
    anchor = anchors if anchors is None else anchors + head * (DEPTH * MATRIX)
    gamma = vector(scale if scale is None else scale + head * D, 1.0, D)
    row1 = chunk * memories + memory
    row2 = row1 + (DEPTH - 1) * chunks * memories

    # The queries' answers.
    q = tl.load(tokens(queries, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
    k = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
    deltas_here = deltas + place * 2 * BLOCK * D + rows[:, None] * D + tl.arange(0, D)[None, :]
    delta = tl.load(deltas_here)
    hidden_here = hidden + place * 2 * BLOCK * HIDDEN
    writes1 = tl.load(writes + row1 * BLOCK * BLOCK + square_at)
    writes2 = tl.load(writes + row2 * BLOCK * BLOCK + square_at)
    share = None if held is None else tl.load(held + place * 4 * BLOCK + rows)
    answer, similar1, similar2 = answer_queries(
        q,
        k,
        delta,
        state,
        anchor,
        hidden_here,
        share,
        read + row1 * BLOCK * 2,
        read + row2 * BLOCK * 2,
        writes + row1 * BLOCK * BLOCK,
        writes + row2 * BLOCK * BLOCK,
        tiles,
        BLOCK,
        D,
        HIDDEN,
        TILE,
        DEPTH,
        OPERAND,
    )
    attended1, attended2 = similar1 * writes1, similar2 * writes2
    read_keep2 = tl.load(read + row2 * BLOCK * 2 + rows * 2)
    read_carried2 = tl.load(read + row2 * BLOCK * 2 + rows * 2 + 1)
    read_keep1 = tl.load(read + row1 * BLOCK * 2 + rows * 2)
    read_carried1 = tl.load(read + row1 * BLOCK * 2 + rows * 2 + 1)

    if held is not None:
        # What of the errors' way back is in proportion to the gradient at the share, for a gradient of 1.
        v = tl.load(tokens(values, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        beta = vector(shift if shift is None else shift + head * D, 0.0, D)
        normed = tl.load(deltas_here + BLOCK * D)
        of_normed, _, _, _, of_delta_square = lower_share_gradient(
            tl.full((BLOCK,), 1.0, tl.float32),
            share,
            normed,
            aims_of(k, v, gamma, beta, NORM),
            tl.load(mass + row1 * BLOCK + rows),
            tl.sum(k * k, 1),
            tl.load(held + (place * 4 + 1) * BLOCK + rows),
        )
        by_share = centre(of_normed, NORM) - normed * (tl.sum(of_normed * normed, 1) / D)[:, None]
        by_share *= tl.load(known + place * 4 * BLOCK + rows)[:, None]
        tl.store(held + (place * 4 + 2) * BLOCK + rows, of_delta_square)
        tl.store(narrow + 4 * BLOCK * D + narrow_at, by_share)

    # Back through LayerNorm and what the last matrix has attended to.
    out = contiguous_tokens(of_reads, batch, head, chunk, chunks, heads, BLOCK, D)
    of_answer = tl.load(out).to(tl.float32)
    if NORM:
        normed, inverse_std = normalise(answer, EPS)
        part = of_norm + row1 * 2 * D + tl.arange(0, D)
        tl.store(part, tl.sum(of_answer * normed, 0))
        tl.store(part + D, tl.sum(of_answer, 0))
        of_raw = norm_gradient(of_answer * gamma[None, :], normed, inverse_std)
    else:
        of_raw = of_answer
    of_attended2 = -product(of_raw, tl.trans(delta), OPERAND)
    of_similar2 = of_attended2 * writes2
    tl.store(of_writes + row2 * BLOCK * BLOCK + square_at, of_attended2 * similar2)
    tl.store(narrow + BLOCK * D + narrow_at, -product(tl.trans(attended2), of_raw, OPERAND))
    tl.store(narrow + 2 * BLOCK * D + narrow_at, of_raw)

    # Tile by tile back to the inputs of the last matrix, and through the first.
    of_keep2 = tl.full((BLOCK,), 0.0, tl.float32)
    of_carried2 = tl.full((BLOCK,), 0.0, tl.float32)
    from_weights = tl.full((BLOCK, D), 0.0, tl.float32)
    from_momentum = tl.full((BLOCK, D), 0.0, tl.float32)
    from_anchor = tl.full((BLOCK, D), 0.0, tl.float32)
    of_attended1 = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    by_size = tl.full((BLOCK, D), 0.0, tl.float32)
    for tile in range(tiles):
        if DEPTH == 2:
            query_z, z, delta1 = query_input(
                q,
                state,
                anchor,
                hidden_here,
                share,
                attended1,
                read_keep1,
                read_carried1,
                tile,
                BLOCK,
                D,
                HIDDEN,
                TILE,
                OPERAND,
            )
            h, x = gelu(z), gelu(query_z)
        else:
            h, x = k, q
        at2 = last(state + LAST, tile, D, TILE)
        w2, s2 = tl.load(at2), tl.load(at2 + MATRIX)
        if held is not None:
            slope = gelu_slope(z)
            columns = tile * TILE + tl.arange(0, TILE)
            arriving = tl.load(hidden_here + (BLOCK + rows[:, None]) * HIDDEN + columns[None, :])
            by_size += product(arriving * slope * slope, w2, OPERAND)
        by_weights = product(of_raw, tl.trans(w2), OPERAND)
        by_momentum = product(of_raw, tl.trans(s2), OPERAND)
        of_x = by_weights * read_keep2[:, None] + by_momentum * read_carried2[:, None]
        if anchors is not None:
            by_anchor = product(of_raw, tl.trans(tl.load(last(anchor + LAST // 2, tile, D, TILE))), OPERAND)
            of_x += by_anchor * (1.0 - read_keep2)[:, None]
            by_weights -= by_anchor
        of_keep2 += tl.sum(by_weights * x, 1)
        of_carried2 += tl.sum(by_momentum * x, 1)
        of_x += product(of_similar2, h, OPERAND)
        tl.store(wide + wide_at + tile * TILE, product(tl.trans(of_similar2), x, OPERAND))
        if DEPTH == 2:
            of_query_z = of_x * gelu_slope(query_z)
            of_attended1 -= product(of_query_z, tl.trans(delta1), OPERAND)
            at1 = first(state, tile, D, HIDDEN, TILE)
            w1, s1 = tl.load(at1), tl.load(at1 + MATRIX)
            from_weights += product(of_query_z, tl.trans(w1), OPERAND)
            from_momentum += product(of_query_z, tl.trans(s1), OPERAND)
            if anchors is not None:
                m1 = tl.load(first(anchor, tile, D, HIDDEN, TILE))
                from_anchor += product(of_query_z, tl.trans(m1), OPERAND)
            of_delta1 = -product(tl.trans(attended1), of_query_z, OPERAND)
            tl.store(wide + BLOCK * HIDDEN + wide_at + tile * TILE, of_delta1)
            tl.store(wide + 2 * BLOCK * HIDDEN + wide_at + tile * TILE, x)
            tl.store(wide + 3 * BLOCK * HIDDEN + wide_at + tile * TILE, of_query_z)
        else:
            from_weights += of_x
    if held is not None:
        tl.store(narrow + 3 * BLOCK * D + narrow_at, by_size)
    tl.store(of_read + row2 * BLOCK * 2 + rows * 2, of_keep2)
    tl.store(of_read + row2 * BLOCK * 2 + rows * 2 + 1, of_carried2)
    if DEPTH == 2:
        of_similar1 = of_attended1 * writes1
        tl.store(of_writes + row1 * BLOCK * BLOCK + square_at, of_attended1 * similar1)
        tl.store(of_read + row1 * BLOCK * 2 + rows * 2, tl.sum((from_weights - from_anchor) * q, 1))
        tl.store(of_read + row1 * BLOCK * 2 + rows * 2 + 1, tl.sum(from_momentum * q, 1))
        tl.store(narrow + narrow_at, product(tl.trans(of_similar1), q, OPERAND))
        of_q = from_weights * read_keep1[:, None] + from_momentum * read_carried1[:, None]
        if anchors is not None:
            of_q += from_anchor * (1.0 - read_keep1)[:, None]
        of_q += product(of_similar1, k, OPERAND)
    else:
        of_q = from_weights
    if NORM:
        of_q += of_answer
    out = contiguous_tokens(of_queries, batch, head, chunk, chunks, heads, BLOCK, D)
    tl.store(out, of_q.to(of_queries.dtype.element_ty))
