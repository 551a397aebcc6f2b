"""The backward kernel of the states: one program takes one memory's gradient back through a group's chunks.

Only what the next chunk waits for is here. What the forward pass of a chunk was and what its reads owe to it,
backward_reads.py has found before, for all chunks at once; all gradients that nobody waits for, backward_rest.py finds
afterwards, from the gradients at the states that are left behind here.

Reading order of a chunk: the state shell; in one loop over tiles back through the chunk's end, to the inputs of the
last matrix, to the first delta and upward to the last one; through the errors (errors.py); in a second loop downward
along the keys' forward pass, and the gradient at the state before the chunk.
"""

import triton
import triton.language as tl

from .errors import centre, deltas_gradient, load_known, own_outputs_gradient
from .network import (
    COUNTS,
    before,
    first,
    gelu,
    gelu_bend,
    gelu_slope,
    last,
    product,
    tokens,
    vector,
)
from .shell import hand_over, shell_acts, state_into_shell_gradient


@triton.jit(do_not_specialize=COUNTS)
def chain_backward_kernel(
    queries,  # as in forward.py and backward_reads.py, like the others of these names
    keys,
    read,
    end,
    writes,
    write,
    scale,
    anchors,
    states,  # (g + 1, N, SIZE): the last is the state after the group
    of_states,  # (g + 1, N, SIZE): gradients there; the last is given, the others are written here
    factors,  # (g, N, 4), or None without a shell
    alike,  # (g, N, b, b)
    of_fresh,  # (N, SIZE), added to where a document begins; any where none does
    restarts,
    hidden,
    deltas,
    known,
    held,
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
    tiles,  # HIDDEN / TILE, not a constant: unrolled loops need more registers than there are
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    LIMIT: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    MATRIX: tl.constexpr = D * HIDDEN
    SIZE: tl.constexpr = 2 * DEPTH * MATRIX
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX
    memory = tl.program_id(0).to(tl.int64)
    batch, head = memory // heads, memory % heads
    rows = tl.arange(0, BLOCK)
    square_at = rows[:, None] * BLOCK + rows[None, :]
    anchor = anchors if anchors is None else anchors + head * (SIZE // 2)
    gamma = vector(scale if scale is None else scale + head * D, 1.0, D)
    for turn in range(group):
        chunk = chunk_begin + group - 1 - turn
        place = (group - 1 - turn) * memories + memory
        state = states + place * SIZE
        of_before, of_after = of_states + place * SIZE, of_states + (place + memories) * SIZE
        row1 = chunk * memories + memory
        row2 = row1 + (DEPTH - 1) * chunks * memories
        narrow_at = place * 5 * BLOCK * D + rows[:, None] * D + tl.arange(0, D)[None, :]
        deltas_here = deltas + place * 2 * BLOCK * D + rows[:, None] * D + tl.arange(0, D)[None, :]
        z_at = hidden + place * 2 * BLOCK * HIDDEN + rows[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
        wide_at = place * 4 * BLOCK * HIDDEN + rows[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
        held_at = place * 4 * BLOCK + rows
        tl.debug_barrier()

        # The state shell. A state that the next chunk has replaced has no gradient, so what is behind it is the same.
        if LIMIT is not None:
            found = factors + place * 4
            shrink_w1, shrink_s1 = tl.load(found), tl.load(found + 1)
            shrink_w2, shrink_s2 = tl.load(found + 2), tl.load(found + 3)
            if shell_acts(shrink_w1, shrink_s1, shrink_w2, shrink_s2):
                state_into_shell_gradient(
                    of_after, state + memories * SIZE, shrink_w1, shrink_s1, shrink_w2, shrink_s2, LIMIT, MATRIX, DEPTH
                )

        # Back through the chunk's end, to h, the deltas, and of the first one upward to the last.
        k = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        delta = tl.load(deltas_here)
        now2 = tl.load(write + row2 * BLOCK * 2 + rows * 2)
        later2 = tl.load(write + row2 * BLOCK * 2 + rows * 2 + 1)
        if DEPTH == 2:
            now1 = tl.load(write + row1 * BLOCK * 2 + rows * 2)
            later1 = tl.load(write + row1 * BLOCK * 2 + rows * 2 + 1)
        if held is not None:
            # The first delta is written scaled. What the scale owes to its size goes up to the last one as well, and
            # how much that is is known only when all tiles have been seen.
            share = tl.load(held + held_at)
            of_share_by = tl.full((BLOCK, TILE), 0.0, tl.float32)
        of_delta = tl.load(narrow + BLOCK * D + narrow_at)
        for tile in range(tiles):
            if DEPTH == 2:
                z = tl.load(z_at + tile * TILE)
                h = gelu(z)
            else:
                h = k
            to2 = last(of_after + LAST, tile, D, TILE)
            of_w2 = tl.load(to2)
            of_h = tl.load(wide + wide_at + tile * TILE)
            of_h -= product(delta * now2[:, None], tl.trans(of_w2), OPERAND)
            of_delta -= product(h * now2[:, None], of_w2, OPERAND)
            of_s2 = tl.load(to2 + MATRIX)
            of_h -= product(delta * later2[:, None], tl.trans(of_s2), OPERAND)
            of_delta -= product(h * later2[:, None], of_s2, OPERAND)
            tl.store(wide + wide_at + tile * TILE, of_h)
            if DEPTH == 2:
                to1 = first(of_after, tile, D, HIDDEN, TILE)
                of_delta1 = tl.load(wide + BLOCK * HIDDEN + wide_at + tile * TILE)
                of_delta1 -= product(k * now1[:, None], tl.load(to1), OPERAND)
                of_delta1 -= product(k * later1[:, None], tl.load(to1 + MATRIX), OPERAND)
                tl.store(wide + BLOCK * HIDDEN + wide_at + tile * TILE, of_delta1)
                by_arriving = of_delta1 * gelu_slope(z)
                if held is not None:
                    of_share_by += by_arriving * tl.load(z_at + BLOCK * HIDDEN + tile * TILE)
                    by_arriving *= share[:, None]
                of_delta += product(by_arriving, tl.load(last(state + LAST, tile, D, TILE)), OPERAND)
        if held is not None:
            of_share = tl.sum(of_share_by, 1)
            of_delta_square = of_share * tl.load(held + 2 * BLOCK + held_at)
            tl.store(held + 3 * BLOCK + held_at, of_share)
            of_delta += 2.0 * of_delta_square[:, None] * tl.load(narrow + 3 * BLOCK * D + narrow_at)
            of_raw_by_share = of_share[:, None] * tl.load(narrow + 4 * BLOCK * D + narrow_at)

        # Through the errors.
        of_delta = centre(of_delta, NORM)
        if EXACT:
            deltas_of_chunk = deltas + place * 2 * BLOCK * D
            known_here = known if known is None else known + place * 4 * BLOCK
            alike_here, writes_here = alike + place * BLOCK * BLOCK, writes + row2 * BLOCK * BLOCK
            if held is not None:
                # What a share owes to its output does not depend on of_delta, so what earlier tokens get of it is added
                # here for all of them.
                above = (rows[:, None] > 0) & (rows[None, :] < rows[:, None])
                reach = tl.load(alike_here + square_at)
                reach *= tl.load(writes_here + square_at - BLOCK, mask=above, other=0.0)
                of_delta -= product(tl.trans(reach), of_raw_by_share, OPERAND)
            of_delta = own_outputs_gradient(
                of_delta,
                deltas_of_chunk,
                deltas_of_chunk + BLOCK * D,
                known_here,
                alike_here,
                writes_here,
                gamma,
                NORM,
                BLOCK,
                D,
            )
        tl.store(narrow + BLOCK * D + narrow_at, of_delta)
        if NORM:
            normed = tl.load(deltas_here + BLOCK * D)
            inverse_std, along, tilt, along_slope = load_known(known + place * 4 * BLOCK + rows, BLOCK)
            _, of_raw = deltas_gradient(of_delta, delta, normed, inverse_std, along, tilt, along_slope, gamma)
            if held is not None:
                of_raw += of_raw_by_share
        else:
            of_raw = 2.0 * of_delta
        tl.store(narrow + 3 * BLOCK * D + narrow_at, of_raw)
        if EXACT:
            of_alike = of_products(of_raw, delta, writes + row2 * BLOCK * BLOCK, BLOCK, OPERAND)
            of_alike += tl.trans(of_alike)
            before_keep2 = before(read + row2 * BLOCK * 2, rows, 1.0)
            before_carried2 = before(read + row2 * BLOCK * 2 + 1, rows, 0.0)

        # Downward: from raw to the keys, and the gradient at the state before the chunk.
        tl.debug_barrier()
        of_answer = tl.load(narrow + 2 * BLOCK * D + narrow_at)
        read_keep2 = tl.load(read + row2 * BLOCK * 2 + rows * 2)
        read_carried2 = tl.load(read + row2 * BLOCK * 2 + rows * 2 + 1)
        keep2, carry2, decay2 = tl.load(end + row2 * 4), tl.load(end + row2 * 4 + 1), tl.load(end + row2 * 4 + 3)
        q = tl.load(tokens(queries, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        if DEPTH == 2:
            read_keep1 = tl.load(read + row1 * BLOCK * 2 + rows * 2)
            read_carried1 = tl.load(read + row1 * BLOCK * 2 + rows * 2 + 1)
            keep1, carry1, decay1 = tl.load(end + row1 * 4), tl.load(end + row1 * 4 + 1), tl.load(end + row1 * 4 + 3)
        for tile in range(tiles):
            if DEPTH == 2:
                z = tl.load(z_at + tile * TILE)
                h = gelu(z)
                x = tl.load(wide + 2 * BLOCK * HIDDEN + wide_at + tile * TILE)
            else:
                h = k
                x = q
            of_h = tl.load(wide + wide_at + tile * TILE)
            at2 = last(state + LAST, tile, D, TILE)
            if EXACT:
                of_h += product(of_raw * before_keep2[:, None], tl.trans(tl.load(at2)), OPERAND)
                of_h += product(of_raw * before_carried2[:, None], tl.trans(tl.load(at2 + MATRIX)), OPERAND)
                if anchors is not None:
                    m2 = tl.load(last(anchor + LAST // 2, tile, D, TILE))
                    of_h += product(of_raw * (1.0 - before_keep2)[:, None], tl.trans(m2), OPERAND)
                of_h += product(of_alike, h, OPERAND)
            else:
                of_h += product(of_raw, tl.trans(tl.load(at2)), OPERAND)
            # One matrix after the other: a load does not move ahead of a store, so few tiles are in registers.
            to2, new2 = last(of_after + LAST, tile, D, TILE), last(of_before + LAST, tile, D, TILE)
            of_s2 = carry2 * tl.load(to2) + decay2 * tl.load(to2 + MATRIX)
            of_s2 += product(tl.trans(x * read_carried2[:, None]), of_answer, OPERAND)
            if EXACT:
                of_s2 += product(tl.trans(h * before_carried2[:, None]), of_raw, OPERAND)
            tl.store(new2 + MATRIX, of_s2)
            of_w2 = keep2 * tl.load(to2) + product(tl.trans(x * read_keep2[:, None]), of_answer, OPERAND)
            if EXACT:
                h *= before_keep2[:, None]
            of_w2 += product(tl.trans(h), of_raw, OPERAND)
            if DEPTH == 2:
                slope, arriving = gelu_slope(z), tl.load(z_at + BLOCK * HIDDEN + tile * TILE)
                of_delta1 = tl.load(wide + BLOCK * HIDDEN + wide_at + tile * TILE)
                if held is not None:
                    of_delta1 = of_delta1 * share[:, None] + 2.0 * of_delta_square[:, None] * arriving * slope
                of_w2 += product(tl.trans(of_delta1 * slope), delta, OPERAND)
                of_h = of_h * slope + of_delta1 * arriving * gelu_bend(z)  # at z from here
            tl.store(new2, of_w2)
            tl.store(wide + wide_at + tile * TILE, of_h)
            if DEPTH == 2:
                to1, new1 = first(of_after, tile, D, HIDDEN, TILE), first(of_before, tile, D, HIDDEN, TILE)
                of_query_z = tl.load(wide + 3 * BLOCK * HIDDEN + wide_at + tile * TILE)
                of_s1 = carry1 * tl.load(to1) + decay1 * tl.load(to1 + MATRIX)
                of_s1 += product(tl.trans(q * read_carried1[:, None]), of_query_z, OPERAND)
                tl.store(new1 + MATRIX, of_s1)
                of_w1 = keep1 * tl.load(to1) + product(tl.trans(k), of_h, OPERAND)
                of_w1 += product(tl.trans(q * read_keep1[:, None]), of_query_z, OPERAND)
                tl.store(new1, of_w1)
        if tl.load(restarts + chunk * (memories // heads) + batch) != 0:
            # The state before the chunk was replaced by the fresh one, and the gradient belongs to that.
            tl.debug_barrier()
            hand_over(of_before, of_fresh + memory * SIZE, SIZE)


@triton.jit
def of_products(of_raw, delta, writes, BLOCK: tl.constexpr, OPERAND: tl.constexpr):
    """Half the gradient at the products h_t . h_j of a chunk's keys, (b, b): a token meets what the one before has.

    Args:
        of_raw: Gradient at the outputs of the keys' last matrix, (b, D).
        delta: (b, D).
        writes: Pointer to the chunk's G of the last matrix.
    """
    rows = tl.arange(0, BLOCK)
    above = (rows[:, None] > 0) & (rows[None, :] < rows[:, None])
    met = tl.load(writes + (rows[:, None] - 1) * BLOCK + rows[None, :], mask=above, other=0.0)
    return -product(of_raw, tl.trans(delta), OPERAND) * met
