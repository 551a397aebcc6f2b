"""The forward kernels: one takes each memory through its chunks, in order, the other reads all chunks at once.

`walk_kernel` is the loop over chunks, one program for each memory. A chunk is the keys' forward pass (network.py) and
their errors (errors.py), then tile by tile the new state, last the state shell (shell.py). `reads_kernel` has a
program for each memory and chunk: nothing waits for what is read.

Where things are:
- The states are float32 in global memory, one before each chunk of a group and one after the last. A chunk streams its
  own by tiles, weights twice or, where steps are held, three times: by how much is known only when all tiles have been
  seen. Momentum and M_0, to which forgetting leads and which is one for all rows, it streams once, those of the last
  matrix twice where errors are EXACT.
- Of what is `HIDDEN` wide the keys' z and what arrives there of the last delta are kept for whoever comes later.
- Everything else of a chunk is b tokens wide and in registers, but for what the loop over tokens of EXACT errors picks
  rows of: a few kilobytes that stay in the L1 cache.
- Barriers stand where threads read what other threads of the program have stored.
"""

import triton
import triton.language as tl

from .errors import aims_of, centre, deltas_of, lower_share, own_outputs
from .network import (
    COUNTS,
    answer_of,
    answer_queries,
    before,
    contiguous_tokens,
    first,
    gelu,
    gelu_slope,
    last,
    meet,
    product,
    save,
    tokens,
    vector,
)
from .shell import move, shell_acts, shell_factor, state_into_shell


@triton.jit(do_not_specialize=COUNTS)
def walk_kernel(
    keys,  # (B, T, H, D), T = chunks b, with the strides below; values alike
    values,
    read,  # (L, C, N, b, 2): the gates' coefficients, see memory/fused.py
    end,  # (L, C, N, 2, 2)
    writes,  # (L, C, N, b, b)
    write,  # (L, C, N, b, 2)
    mass,  # (C, N, b) of a chunk's steps, see lower_share in errors.py; None where none are held
    scale,  # (H, D) or None
    shift,  # (H, D) or None
    start,  # (N, SIZE) state before the group
    states,  # (g + 1, N, SIZE); this and what is (g, N, ...) is written here, see Walk in launch.py
    factors,  # None without a shell
    aims,  # (N, b, D) room for what of a chunk's errors does not depend on the memory; None if not EXACT, like alike
    alike,
    hidden,
    deltas,
    known,  # None in a plain network
    held,  # None without mass
    fresh,  # (N or H, SIZE) state in which a document begins; any where none does
    anchors,  # (H, SIZE / 2), M_0, or None where forgetting leads to zero
    restarts,  # (C, B) int8, which chunks begin a document
    closed,  # (C, B) int8, after which chunks the shell is; None without one
    stride_b,
    stride_t,
    stride_h,
    memories,
    heads,
    chunks,
    chunk_begin,
    group,
    fresh_rows,
    tiles,  # HIDDEN / TILE, not a constant: unrolled loops need more registers than there are
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    LIMIT: tl.constexpr,  # of the shell; None for no shell
    EXACT: tl.constexpr,  # errors are those at the token's own last matrix
    OPERAND: tl.constexpr,
):
    MATRIX: tl.constexpr = D * HIDDEN
    SIZE: tl.constexpr = 2 * DEPTH * MATRIX
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX  # where the last matrix is in a state
    memory = tl.program_id(0).to(tl.int64)
    batch, head = memory // heads, memory % heads
    rows = tl.arange(0, BLOCK)
    square_at = rows[:, None] * BLOCK + rows[None, :]
    narrow_at = rows[:, None] * D + tl.arange(0, D)[None, :]
    anchor = anchors if anchors is None else anchors + head * (SIZE // 2)
    gamma = vector(scale if scale is None else scale + head * D, 1.0, D)
    beta = vector(shift if shift is None else shift + head * D, 0.0, D)
    move(start + memory * SIZE, states + memory * SIZE, SIZE)
    for turn in range(group):
        chunk, place = chunk_begin + turn, turn * memories + memory
        state, after = states + place * SIZE, states + (place + memories) * SIZE
        tl.debug_barrier()
        if tl.load(restarts + chunk * (memories // heads) + batch) != 0:
            move(fresh + (memory % fresh_rows) * SIZE, state, SIZE)
            tl.debug_barrier()

        # What the keys meet in the last matrix, and the products h_t . h_j of its inputs for them. Without EXACT it is
        # the matrix at the chunk's start that they meet.
        k = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        v = tl.load(tokens(values, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        row1 = chunk * memories + memory  # of the first matrix' gates; the last one's is row2
        row2 = row1 + (DEPTH - 1) * chunks * memories
        before_keep2 = before(read + row2 * BLOCK * 2, rows, 1.0)
        before_carried2 = before(read + row2 * BLOCK * 2 + 1, rows, 0.0)
        z_at = hidden + place * 2 * BLOCK * HIDDEN + rows[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
        raw = tl.full((BLOCK, D), 0.0, tl.float32)
        similar = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
        for tile in range(tiles):
            if DEPTH == 2:
                z = product(k, tl.load(first(state, tile, D, HIDDEN, TILE)), OPERAND)
                tl.store(z_at + tile * TILE, z)
                h = gelu(z)
            else:
                h = k
            at2 = last(state + LAST, tile, D, TILE)
            if EXACT:
                m2 = None if anchors is None else tl.load(last(anchor + LAST // 2, tile, D, TILE))
                raw += meet(h, tl.load(at2), tl.load(at2 + MATRIX), m2, before_keep2, before_carried2, OPERAND)
                similar += product(h, tl.trans(h), OPERAND)
            else:
                raw += product(h, tl.load(at2), OPERAND)

        # Their errors.
        raw = centre(raw, NORM)
        aim = aims_of(k, v, gamma, beta, NORM)
        if EXACT:
            alike_here, aims_here = alike + place * BLOCK * BLOCK, aims + memory * BLOCK * D
            tl.store(alike_here + square_at, similar)
            tl.store(aims_here + narrow_at, aim)
            tl.debug_barrier()
            writes_here = writes + row2 * BLOCK * BLOCK
            raw = own_outputs(raw, alike_here, aims_here, writes_here, gamma, NORM, BLOCK, D, EPS)
        delta, normed, inverse_std, along, tilt, along_slope = deltas_of(raw, aim, gamma, NORM, EPS)
        deltas_here = deltas + place * 2 * BLOCK * D + narrow_at
        tl.store(deltas_here, delta)
        if NORM:
            tl.store(deltas_here + BLOCK * D, normed)
            known_at = known + place * 4 * BLOCK + rows
            tl.store(known_at, inverse_std)
            tl.store(known_at + BLOCK, along)
            tl.store(known_at + 2 * BLOCK, tilt)
            tl.store(known_at + 3 * BLOCK, along_slope)
        if DEPTH == 2:
            tl.debug_barrier()
            delta_square_by = tl.full((BLOCK, TILE), 0.0, tl.float32)
            for tile in range(tiles):
                arriving = product(delta, tl.trans(tl.load(last(state + LAST, tile, D, TILE))), OPERAND)
                tl.store(z_at + BLOCK * HIDDEN + tile * TILE, arriving)
                if mass is not None:
                    delta1 = arriving * gelu_slope(tl.load(z_at + tile * TILE))
                    delta_square_by += delta1 * delta1
            tl.debug_barrier()
        if mass is not None:
            delta_square = tl.sum(delta_square_by, 1)
            share = lower_share(normed, aim, tl.load(mass + row1 * BLOCK + rows), tl.sum(k * k, 1), delta_square)
            held_at = held + place * 4 * BLOCK + rows
            tl.store(held_at, share)
            tl.store(held_at + BLOCK, delta_square)
        now2 = tl.load(write + row2 * BLOCK * 2 + rows * 2)
        later2 = tl.load(write + row2 * BLOCK * 2 + rows * 2 + 1)
        keep2, carry2, decay2 = tl.load(end + row2 * 4), tl.load(end + row2 * 4 + 1), tl.load(end + row2 * 4 + 3)
        if DEPTH == 2:
            now1 = tl.load(write + row1 * BLOCK * 2 + rows * 2)
            later1 = tl.load(write + row1 * BLOCK * 2 + rows * 2 + 1)
            keep1, carry1, decay1 = tl.load(end + row1 * 4), tl.load(end + row1 * 4 + 1), tl.load(end + row1 * 4 + 3)

        # The chunk's steps into the state. The first matrix is done with before the last one's is loaded, and in the
        # backward kernels likewise: a load does not move ahead of a store, so fewer tiles are in registers at a time.
        square_w1, square_s1, square_w2, square_s2 = 0.0, 0.0, 0.0, 0.0
        for tile in range(tiles):
            if DEPTH == 2:
                z = tl.load(z_at + tile * TILE)
                h = gelu(z)
                delta1 = tl.load(z_at + BLOCK * HIDDEN + tile * TILE) * gelu_slope(z)
                if mass is not None:
                    delta1 *= share[:, None]
                at1 = first(state, tile, D, HIDDEN, TILE)
                w1, s1 = tl.load(at1), tl.load(at1 + MATRIX)
                new_w1 = keep1 * w1 + carry1 * s1 - product(tl.trans(k * now1[:, None]), delta1, OPERAND)
                if anchors is not None:
                    new_w1 += (1.0 - keep1) * tl.load(first(anchor, tile, D, HIDDEN, TILE))
                new_s1 = decay1 * s1 - product(tl.trans(k * later1[:, None]), delta1, OPERAND)
                square_w1 += tl.sum(new_w1 * new_w1)
                square_s1 += tl.sum(new_s1 * new_s1)
                save(first(after, tile, D, HIDDEN, TILE), new_w1, new_s1, MATRIX)
            else:
                h = k
            at2 = last(state + LAST, tile, D, TILE)
            w2, s2 = tl.load(at2), tl.load(at2 + MATRIX)
            new_w2 = keep2 * w2 + carry2 * s2 - product(tl.trans(h * now2[:, None]), delta, OPERAND)
            if anchors is not None:
                new_w2 += (1.0 - keep2) * tl.load(last(anchor + LAST // 2, tile, D, TILE))
            new_s2 = decay2 * s2 - product(tl.trans(h * later2[:, None]), delta, OPERAND)
            square_w2 += tl.sum(new_w2 * new_w2)
            square_s2 += tl.sum(new_s2 * new_s2)
            save(last(after + LAST, tile, D, TILE), new_w2, new_s2, MATRIX)

        # The state shell.
        if LIMIT is not None:
            shrink_w1, shrink_s1 = shell_factor(square_w1 / MATRIX, LIMIT), shell_factor(square_s1 / MATRIX, LIMIT)
            shrink_w2, shrink_s2 = shell_factor(square_w2 / MATRIX, LIMIT), shell_factor(square_s2 / MATRIX, LIMIT)
            there = tl.load(closed + chunk * (memories // heads) + batch) != 0
            shrink_w1, shrink_s1 = tl.where(there, shrink_w1, 1.0), tl.where(there, shrink_s1, 1.0)
            shrink_w2, shrink_s2 = tl.where(there, shrink_w2, 1.0), tl.where(there, shrink_s2, 1.0)
            found = factors + place * 4
            tl.store(found, shrink_w1)
            tl.store(found + 1, shrink_s1)
            tl.store(found + 2, shrink_w2)
            tl.store(found + 3, shrink_s2)
            if shell_acts(shrink_w1, shrink_s1, shrink_w2, shrink_s2):
                state_into_shell(after, shrink_w1, shrink_s1, shrink_w2, shrink_s2, MATRIX, DEPTH)


@triton.jit(do_not_specialize=COUNTS)
def reads_kernel(
    queries,  # as above, like the others of these names
    keys,
    reads,  # (B, T, H, D) contiguous, written here
    read,
    writes,
    scale,
    shift,
    anchors,
    states,
    hidden,
    deltas,
    held,
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
    OPERAND: tl.constexpr,
):
    SIZE: tl.constexpr = 2 * DEPTH * D * HIDDEN
    memory = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * memories + memory
    chunk = chunk_begin + tl.program_id(1)
    batch, head = memory // heads, memory % heads
    q = tl.load(tokens(queries, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
    k = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, D)
    delta = tl.load(deltas + place * 2 * BLOCK * D + rows[:, None] * D + columns[None, :])
    row1 = chunk * memories + memory
    row2 = row1 + (DEPTH - 1) * chunks * memories
    answer, _, _ = answer_queries(
        q,
        k,
        delta,
        states + place * SIZE,
        anchors if anchors is None else anchors + head * (SIZE // 2),
        hidden + place * 2 * BLOCK * HIDDEN,
        None if held is None else tl.load(held + place * 4 * BLOCK + rows),
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
    if NORM:
        gamma = vector(scale if scale is None else scale + head * D, 1.0, D)
        beta = vector(shift if shift is None else shift + head * D, 0.0, D)
        answer, _, _ = answer_of(answer, q, gamma, beta, EPS)
    out = contiguous_tokens(reads, batch, head, chunk, chunks, heads, BLOCK, D)
    tl.store(out, answer.to(reads.dtype.element_ty))
