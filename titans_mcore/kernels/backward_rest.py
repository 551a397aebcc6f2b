"""The backward kernels behind the states': gradients that no other chunk waits for, all chunks at once.

By then the gradient at the state after every chunk is known, and within the chunk those that backward_chain.py has
left: at the last delta, at the outputs of the keys' last matrix and at the first one's. One kernel finds the gradients
at keys, values, gates and LayerNorm, a program for each memory and chunk; the other the one at M_0, a program for each
memory and tile, which goes over the chunks and adds.
"""

import triton
import triton.language as tl

from .errors import aims_of, centre, deltas_gradient, load_known, lower_share_gradient
from .network import (
    COUNTS,
    before,
    contiguous_tokens,
    first,
    gelu,
    gelu_slope,
    last,
    product,
    tokens,
    vector,
)


@triton.jit(do_not_specialize=COUNTS)
def rest_backward_kernel(
    keys,  # as in forward.py, backward_reads.py and backward_chain.py, like the others of these names
    values,
    of_keys,  # (B, T, H, D) contiguous; written here, like of_values
    of_values,
    read,
    writes,
    write,
    mass,
    of_read,  # gradients at the gates' coefficients, of their shapes; added to here, EXACT only, like of_writes
    of_writes,
    of_end,  # written here, like of_write and of_mass
    of_write,
    of_mass,
    scale,
    shift,
    anchors,
    states,
    of_states,
    alike,
    hidden,
    deltas,
    known,
    held,
    wide,
    narrow,
    of_norm,
    stride_b,
    stride_t,
    stride_h,
    memories,
    heads,
    chunks,
    chunk_begin,
    tiles,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    MATRIX: tl.constexpr = D * HIDDEN
    SIZE: tl.constexpr = 2 * DEPTH * MATRIX
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX
    memory = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * memories + memory
    chunk = chunk_begin + tl.program_id(1)
    batch, head = memory // heads, memory % heads
    rows = tl.arange(0, BLOCK)
    square_at = rows[:, None] * BLOCK + rows[None, :]
    narrow_at = place * 5 * BLOCK * D + rows[:, None] * D + tl.arange(0, D)[None, :]
    deltas_here = deltas + place * 2 * BLOCK * D + rows[:, None] * D + tl.arange(0, D)[None, :]
    z_at = hidden + place * 2 * BLOCK * HIDDEN + rows[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    wide_at = place * 4 * BLOCK * HIDDEN + rows[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    state, of_after = states + place * SIZE, of_states + (place + memories) * SIZE
    anchor = anchors if anchors is None else anchors + head * (SIZE // 2)
    gamma = vector(scale if scale is None else scale + head * D, 1.0, D)
    beta = vector(shift if shift is None else shift + head * D, 0.0, D)
    row1 = chunk * memories + memory
    row2 = row1 + (DEPTH - 1) * chunks * memories

    # The chunk's end, and what the keys have met of the state before the chunk.
    k = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
    delta = tl.load(deltas_here)
    of_raw = tl.load(narrow + 3 * BLOCK * D + narrow_at)
    if held is not None:
        share = tl.load(held + place * 4 * BLOCK + rows)
    of_k = tl.full((BLOCK, D), 0.0, tl.float32)
    of_k_now = tl.full((BLOCK, D), 0.0, tl.float32)
    of_k_later = tl.full((BLOCK, D), 0.0, tl.float32)
    of_now2 = tl.full((BLOCK,), 0.0, tl.float32)
    of_later2 = tl.full((BLOCK,), 0.0, tl.float32)
    of_before_keep2 = tl.full((BLOCK,), 0.0, tl.float32)
    of_before_carried2 = tl.full((BLOCK,), 0.0, tl.float32)
    of_keep1, of_carry1, of_decay1 = 0.0, 0.0, 0.0
    of_keep2, of_carry2, of_decay2 = 0.0, 0.0, 0.0
    for tile in range(tiles):
        of_h = tl.load(wide + wide_at + tile * TILE)
        if DEPTH == 2:
            z = tl.load(z_at + tile * TILE)
            h = gelu(z)
            delta1 = tl.load(z_at + BLOCK * HIDDEN + tile * TILE) * gelu_slope(z)
            if held is not None:
                delta1 *= share[:, None]
            at1 = first(state, tile, D, HIDDEN, TILE)
            to1 = first(of_after, tile, D, HIDDEN, TILE)
            w1, of_w1 = tl.load(at1), tl.load(to1)
            of_k += product(of_h, tl.trans(w1), OPERAND)
            of_k_now += product(delta1, tl.trans(of_w1), OPERAND)
            if anchors is not None:
                w1 -= tl.load(first(anchor, tile, D, HIDDEN, TILE))
            of_keep1 += tl.sum(of_w1 * w1)
            s1, of_s1 = tl.load(at1 + MATRIX), tl.load(to1 + MATRIX)
            of_k_later += product(delta1, tl.trans(of_s1), OPERAND)
            of_carry1 += tl.sum(of_w1 * s1)
            of_decay1 += tl.sum(of_s1 * s1)
        else:
            h = k
            of_k += of_h
        at2 = last(state + LAST, tile, D, TILE)
        to2 = last(of_after + LAST, tile, D, TILE)
        w2, of_w2 = tl.load(at2), tl.load(to2)
        of_now2 -= tl.sum(product(delta, tl.trans(of_w2), OPERAND) * h, 1)
        if anchors is not None:
            w2 -= tl.load(last(anchor + LAST // 2, tile, D, TILE))
        of_keep2 += tl.sum(of_w2 * w2)
        if EXACT:
            of_before_keep2 += tl.sum(product(of_raw, tl.trans(w2), OPERAND) * h, 1)
        s2, of_s2 = tl.load(at2 + MATRIX), tl.load(to2 + MATRIX)
        of_later2 -= tl.sum(product(delta, tl.trans(of_s2), OPERAND) * h, 1)
        of_carry2 += tl.sum(of_w2 * s2)
        of_decay2 += tl.sum(of_s2 * s2)
        if EXACT:
            of_before_carried2 += tl.sum(product(of_raw, tl.trans(s2), OPERAND) * h, 1)
    tl.store(of_write + row2 * BLOCK * 2 + rows * 2, of_now2)
    tl.store(of_write + row2 * BLOCK * 2 + rows * 2 + 1, of_later2)
    tl.store(of_end + row2 * 4, of_keep2)
    tl.store(of_end + row2 * 4 + 1, of_carry2)
    tl.store(of_end + row2 * 4 + 2, 0.0)
    tl.store(of_end + row2 * 4 + 3, of_decay2)
    if DEPTH == 2:
        tl.store(of_write + row1 * BLOCK * 2 + rows * 2, -tl.sum(of_k_now * k, 1))
        tl.store(of_write + row1 * BLOCK * 2 + rows * 2 + 1, -tl.sum(of_k_later * k, 1))
        tl.store(of_end + row1 * 4, of_keep1)
        tl.store(of_end + row1 * 4 + 1, of_carry1)
        tl.store(of_end + row1 * 4 + 2, 0.0)
        tl.store(of_end + row1 * 4 + 3, of_decay1)
        now1 = tl.load(write + row1 * BLOCK * 2 + rows * 2)
        later1 = tl.load(write + row1 * BLOCK * 2 + rows * 2 + 1)
        of_k += tl.load(narrow + narrow_at) - of_k_now * now1[:, None] - of_k_later * later1[:, None]
    if EXACT:
        of_before = of_read + row2 * BLOCK * 2 + (rows - 1) * 2
        there = rows > 0
        tl.store(of_before, tl.load(of_before, mask=there) + of_before_keep2, mask=there)
        tl.store(of_before + 1, tl.load(of_before + 1, mask=there) + of_before_carried2, mask=there)
        # What a token meets of its chunk, and with which coefficients: those of the token before, a row further up.
        above = (rows[:, None] > 0) & (rows[None, :] < rows[:, None])
        of_own_writes = -product(of_raw, tl.trans(delta), OPERAND)
        of_own_writes *= tl.load(alike + place * BLOCK * BLOCK + square_at)
        of_writes_at = of_writes + row2 * BLOCK * BLOCK + square_at - BLOCK
        tl.store(of_writes_at, tl.load(of_writes_at, mask=above, other=0.0) + of_own_writes, mask=above)

    # The errors' other ends.
    of_delta = tl.load(narrow + BLOCK * D + narrow_at)
    if NORM:
        v = tl.load(tokens(values, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        normed = tl.load(deltas_here + BLOCK * D)
        inverse_std, along, tilt, along_slope = load_known(known + place * 4 * BLOCK + rows, BLOCK)
        of_aim, _ = deltas_gradient(of_delta, delta, normed, inverse_std, along, tilt, along_slope, gamma)
        # The error is 2 (k + scale n + shift - v), and scale times it the aim and what n adds.
        of_error = of_aim * gamma[None, :]
        error = 2.0 * (k + normed * gamma[None, :] + beta[None, :] - v)
        of_gamma = of_aim * error + 2.0 * of_error * normed
        if held is not None:
            key_square, of_share = tl.sum(k * k, 1), tl.load(held + (place * 4 + 3) * BLOCK + rows)
            _, of_aim_by_share, of_mass_here, of_key_square, _ = lower_share_gradient(
                of_share,
                share,
                normed,
                aims_of(k, v, gamma, beta, NORM),
                tl.load(mass + row1 * BLOCK + rows),
                key_square,
                tl.load(held + (place * 4 + 1) * BLOCK + rows),
            )
            of_aim_by_share = centre(of_aim_by_share, NORM)
            tl.store(of_mass + row1 * BLOCK + rows, of_mass_here)
            of_k += 2.0 * of_key_square[:, None] * k
            of_gamma += of_aim_by_share * (error - 2.0 * gamma[None, :] * normed)
            of_error += of_aim_by_share * gamma[None, :]
        part = of_norm + row1 * 2 * D + tl.arange(0, D)
        tl.store(part, tl.load(part) + tl.sum(of_gamma, 0))
        tl.store(part + D, tl.load(part + D) + tl.sum(2.0 * of_error, 0))
        of_k += 2.0 * of_error
    else:
        of_error = of_delta
    place_of = contiguous_tokens(of_keys, batch, head, chunk, chunks, heads, BLOCK, D)
    tl.store(place_of, of_k.to(of_keys.dtype.element_ty))
    place_of = contiguous_tokens(of_values, batch, head, chunk, chunks, heads, BLOCK, D)
    tl.store(place_of, (-2.0 * of_error).to(of_values.dtype.element_ty))


@triton.jit(do_not_specialize=COUNTS)
def anchors_backward_kernel(
    queries,  # as above
    keys,
    read,
    end,
    of_anchors,  # (N, SIZE / 2), added to
    of_states,
    hidden,
    wide,
    narrow,
    stride_b,
    stride_t,
    stride_h,
    memories,
    heads,
    chunks,
    chunk_begin,
    group,
    tiles,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    MATRIX: tl.constexpr = D * HIDDEN
    SIZE: tl.constexpr = 2 * DEPTH * MATRIX
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX
    memory, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = memory // heads, memory % heads
    rows = tl.arange(0, BLOCK)
    of_anchor = of_anchors + memory * (SIZE // 2)
    to_m1, to_m2 = first(of_anchor, tile, D, HIDDEN, TILE), last(of_anchor + LAST // 2, tile, D, TILE)
    of_m2 = tl.load(to_m2)
    if DEPTH == 2:
        of_m1 = tl.load(to_m1)
    for turn in range(group):
        chunk, place = chunk_begin + turn, turn * memories + memory
        of_after = of_states + (place + memories) * SIZE
        row1 = chunk * memories + memory
        row2 = row1 + (DEPTH - 1) * chunks * memories
        narrow_at = place * 5 * BLOCK * D + rows[:, None] * D + tl.arange(0, D)[None, :]
        at = rows[:, None] * HIDDEN + tile * TILE + tl.arange(0, TILE)[None, :]
        wide_at = place * 4 * BLOCK * HIDDEN + at
        q = tl.load(tokens(queries, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        if DEPTH == 2:
            x = tl.load(wide + 2 * BLOCK * HIDDEN + wide_at)
            h = gelu(tl.load(hidden + place * 2 * BLOCK * HIDDEN + at))
            of_query_z = tl.load(wide + 3 * BLOCK * HIDDEN + wide_at)
            of_m1 += (1.0 - tl.load(end + row1 * 4)) * tl.load(first(of_after, tile, D, HIDDEN, TILE))
            lost1 = 1.0 - tl.load(read + row1 * BLOCK * 2 + rows * 2)
            of_m1 += product(tl.trans(q * lost1[:, None]), of_query_z, OPERAND)
        else:
            x = q
            h = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        of_m2 += (1.0 - tl.load(end + row2 * 4)) * tl.load(last(of_after + LAST, tile, D, TILE))
        lost2 = 1.0 - tl.load(read + row2 * BLOCK * 2 + rows * 2)
        of_m2 += product(tl.trans(x * lost2[:, None]), tl.load(narrow + 2 * BLOCK * D + narrow_at), OPERAND)
        if EXACT:
            lost2 = 1.0 - before(read + row2 * BLOCK * 2, rows, 1.0)
            of_m2 += product(tl.trans(h * lost2[:, None]), tl.load(narrow + 3 * BLOCK * D + narrow_at), OPERAND)
    tl.store(to_m2, of_m2)
    if DEPTH == 2:
        tl.store(to_m1, of_m1)
