"""The backward kernel of the states: one program takes one memory's gradient back through a group's chunks.

Reading order of a chunk: the state shell, back through the chunk's end (what it wrote into the state) and, in the same
loop, upward along the keys' inner gradient to the last delta; through the errors (errors.py); then downward along the
keys' forward pass. The gradient at the state before the chunk is what the next turn begins with.

Where things are: the gradient at the state is in registers over the loop when ON_CHIP, which is for one matrix only;
else in the global float32 buffer `of_state`, streamed by tiles twice a chunk like the chunk's own state. With it goes
the sum of what the chunks give to M_0, streamed once. The gradients at h and at the first delta (b, HIDDEN) are in the
scratch `wide`, where backward_reads.py has begun them; a tile is a few kilobytes and stays in the L1 cache.
"""

import triton
import triton.language as tl

from .errors import aims_of, centre, deltas_gradient, load_known, lower_share_gradient, own_outputs_gradient
from .network import (
    COUNTS,
    before,
    contiguous_tokens,
    first,
    gelu,
    gelu_bend,
    gelu_slope,
    last,
    matrix,
    product,
    replace,
    save,
    tokens,
    vector,
)
from .shell import hand_over, shell_acts, state_into_shell_gradient


@triton.jit(do_not_specialize=COUNTS)
def chain_backward_kernel(
    queries,  # as in forward.py and backward_reads.py, like the others of these names
    keys,
    values,
    of_keys,  # (B, T, H, D) contiguous; written here, like of_values
    of_values,
    read,
    end,
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
    states,  # (g + 1, N, SIZE): the last is the state after the group
    of_state,  # (N, SIZE): gradient at the state after the group; becomes that at the state before it
    factors,  # (g, N, 4), or None without a shell
    alike,  # (g, N, b, b)
    of_fresh,  # (N, SIZE), added to where a document begins
    of_anchors,  # (N, SIZE / 2), added to
    restarts,
    wide,
    narrow,
    known,
    held,
    of_norm,
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
    ON_CHIP: tl.constexpr,
    OPERAND: tl.constexpr,
):
    MATRIX: tl.constexpr = D * HIDDEN
    SIZE: tl.constexpr = 2 * DEPTH * MATRIX
    LAST: tl.constexpr = (DEPTH - 1) * 2 * MATRIX
    memory = tl.program_id(0).to(tl.int64)
    batch, head = memory // heads, memory % heads
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    square_at = rows[:, None] * BLOCK + rows[None, :]
    of_state += memory * SIZE
    anchor = anchors if anchors is None else anchors + head * (SIZE // 2)
    of_anchor = of_anchors if of_anchors is None else of_anchors + memory * (SIZE // 2)
    gamma = vector(scale if scale is None else scale + head * D, 1.0, D)
    beta = vector(shift if shift is None else shift + head * D, 0.0, D)
    on_chip = last(of_state, 0, D, TILE)
    if ON_CHIP:
        g_w, g_s = tl.load(on_chip), tl.load(on_chip + MATRIX)
        g_m = 0.0 if anchors is None else tl.load(last(of_anchor, 0, D, TILE))
    else:
        g_w, g_s, g_m = 0.0, 0.0, 0.0
    for turn in range(group):
        chunk = chunk_begin + group - 1 - turn
        place = (group - 1 - turn) * memories + memory
        state = states + place * SIZE
        row1 = chunk * memories + memory
        row2 = row1 + (DEPTH - 1) * chunks * memories
        narrow_at = place * 5 * BLOCK * D + rows[:, None] * D + columns[None, :]
        wide_at = place * 4 * BLOCK * HIDDEN + rows[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
        tl.debug_barrier()

        # The state shell. A state that the next chunk has replaced has no gradient, so what is behind it is the same.
        if LIMIT is not None:
            found = factors + place * 4
            shrink_w1, shrink_s1 = tl.load(found), tl.load(found + 1)
            shrink_w2, shrink_s2 = tl.load(found + 2), tl.load(found + 3)
            if shell_acts(shrink_w1, shrink_s1, shrink_w2, shrink_s2):
                if ON_CHIP:
                    save(on_chip, g_w, g_s, MATRIX)
                state_into_shell_gradient(
                    of_state, state + memories * SIZE, shrink_w1, shrink_s1, shrink_w2, shrink_s2, LIMIT, MATRIX, DEPTH
                )
                if ON_CHIP:
                    g_w, g_s = tl.load(on_chip), tl.load(on_chip + MATRIX)

        # Back through the chunk's end, to h, delta and the coefficients; and of delta upward, to the error. What
        # arrives at the GELU is `arriving`.
        k = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        delta = tl.load(narrow + 3 * BLOCK * D + narrow_at)
        now2 = tl.load(write + row2 * BLOCK * 2 + rows * 2)
        later2 = tl.load(write + row2 * BLOCK * 2 + rows * 2 + 1)
        if DEPTH == 2:
            now1 = tl.load(write + row1 * BLOCK * 2 + rows * 2)
            later1 = tl.load(write + row1 * BLOCK * 2 + rows * 2 + 1)
        if mass is not None:
            # The first delta is written scaled. What the scale owes to its size goes up to the last one as well, and
            # how much that is is known only when all tiles have been seen.
            share = tl.load(held + place * 2 * BLOCK + rows)
            of_share = tl.full((BLOCK,), 0.0, tl.float32)
            by_size = tl.full((BLOCK, D), 0.0, tl.float32)
        of_delta = tl.load(narrow + BLOCK * D + narrow_at)
        of_k_now = tl.full((BLOCK, D), 0.0, tl.float32)
        of_k_later = tl.full((BLOCK, D), 0.0, tl.float32)
        of_now2 = tl.full((BLOCK,), 0.0, tl.float32)
        of_later2 = tl.full((BLOCK,), 0.0, tl.float32)
        of_keep1, of_carry1, of_decay1 = 0.0, 0.0, 0.0
        of_keep2, of_carry2, of_decay2 = 0.0, 0.0, 0.0
        for tile in range(tiles):
            at2 = last(state + LAST, tile, D, TILE)
            to2 = last(of_state + LAST, tile, D, TILE)
            w2 = tl.load(at2)
            if DEPTH == 2:
                at1 = first(state, tile, D, HIDDEN, TILE)
                to1 = first(of_state, tile, D, HIDDEN, TILE)
                w1 = tl.load(at1)
                of_w1, of_s1 = tl.load(to1), tl.load(to1 + MATRIX)
                if anchors is None:
                    of_keep1 += tl.sum(of_w1 * w1)
                else:
                    of_keep1 += tl.sum(of_w1 * (w1 - tl.load(first(anchor, tile, D, HIDDEN, TILE))))
                s1 = tl.load(at1 + MATRIX)
                of_carry1 += tl.sum(of_w1 * s1)
                of_decay1 += tl.sum(of_s1 * s1)
                z = product(k, w1, OPERAND)
                h = gelu(z)
                slope = gelu_slope(z)
                delta1 = product(delta, tl.trans(w2), OPERAND) * slope
                of_delta1 = tl.load(wide + BLOCK * HIDDEN + wide_at + tile * TILE)
                of_delta1 -= product(k * now1[:, None], of_w1, OPERAND)
                of_delta1 -= product(k * later1[:, None], of_s1, OPERAND)
                tl.store(wide + BLOCK * HIDDEN + wide_at + tile * TILE, of_delta1)
                if mass is not None:
                    of_share += tl.sum(of_delta1 * delta1, 1)
                    by_size += product(delta1 * slope, w2, OPERAND)
                    delta1 *= share[:, None]
                    of_delta1 *= share[:, None]
                of_delta += product(of_delta1 * slope, w2, OPERAND)
                of_k_now += product(delta1, tl.trans(of_w1), OPERAND)
                of_k_later += product(delta1, tl.trans(of_s1), OPERAND)
            else:
                h = k
            of_w2, of_s2 = matrix(g_w, to2, ON_CHIP), matrix(g_s, to2 + MATRIX, ON_CHIP)
            if anchors is None:
                of_keep2 += tl.sum(of_w2 * w2)
            else:
                of_keep2 += tl.sum(of_w2 * (w2 - tl.load(last(anchor + LAST // 2, tile, D, TILE))))
            s2 = tl.load(at2 + MATRIX)
            of_carry2 += tl.sum(of_w2 * s2)
            of_decay2 += tl.sum(of_s2 * s2)
            of_h_now = product(delta, tl.trans(of_w2), OPERAND)
            of_h_later = product(delta, tl.trans(of_s2), OPERAND)
            of_h = tl.load(wide + wide_at + tile * TILE)
            of_h -= of_h_now * now2[:, None] + of_h_later * later2[:, None]
            tl.store(wide + wide_at + tile * TILE, of_h)
            of_now2 -= tl.sum(of_h_now * h, 1)
            of_later2 -= tl.sum(of_h_later * h, 1)
            of_delta -= product(h * now2[:, None], of_w2, OPERAND)
            of_delta -= product(h * later2[:, None], of_s2, OPERAND)
        tl.store(of_write + row2 * BLOCK * 2 + rows * 2, of_now2)
        tl.store(of_write + row2 * BLOCK * 2 + rows * 2 + 1, of_later2)
        tl.store(of_end + row2 * 4, of_keep2)
        tl.store(of_end + row2 * 4 + 1, of_carry2)
        tl.store(of_end + row2 * 4 + 2, 0.0)
        tl.store(of_end + row2 * 4 + 3, of_decay2)
        if DEPTH == 2:
            of_now1 = -tl.sum(of_k_now * k, 1)
            of_later1 = -tl.sum(of_k_later * k, 1)
            of_k = tl.load(narrow + narrow_at)
            of_k -= of_k_now * now1[:, None] + of_k_later * later1[:, None]
            tl.store(of_write + row1 * BLOCK * 2 + rows * 2, of_now1)
            tl.store(of_write + row1 * BLOCK * 2 + rows * 2 + 1, of_later1)
            tl.store(of_end + row1 * 4, of_keep1)
            tl.store(of_end + row1 * 4 + 1, of_carry1)
            tl.store(of_end + row1 * 4 + 2, 0.0)
            tl.store(of_end + row1 * 4 + 3, of_decay1)
        else:
            of_k = tl.full((BLOCK, D), 0.0, tl.float32)

        if mass is not None:
            mass_here, key_square = tl.load(mass + row1 * BLOCK + rows), tl.sum(k * k, 1)
            delta_square = tl.load(held + (place * 2 + 1) * BLOCK + rows)
            v = tl.load(tokens(values, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
            normed = tl.load(narrow + 4 * BLOCK * D + narrow_at)
            of_normed, of_aim_by_share, of_mass_here, of_key_square, of_delta_square = lower_share_gradient(
                of_share, share, normed, aims_of(k, v, gamma, beta, NORM), mass_here, key_square, delta_square
            )
            of_aim_by_share = centre(of_aim_by_share, NORM)
            tl.store(of_mass + row1 * BLOCK + rows, of_mass_here)
            of_k += 2.0 * of_key_square[:, None] * k
            of_delta += 2.0 * of_delta_square[:, None] * by_size
        of_delta = centre(of_delta, NORM)
        if EXACT:
            deltas_here = narrow + (place * 5 + 3) * BLOCK * D
            known_here = known if known is None else known + place * 4 * BLOCK
            alike_here, writes_here = alike + place * BLOCK * BLOCK, writes + row2 * BLOCK * BLOCK
            above = (rows[:, None] > 0) & (rows[None, :] < rows[:, None])
            if mass is not None:
                # What a share owes to its output does not depend on of_delta, so what earlier tokens get of it is added
                # here for all of them.
                of_raw_by_share = centre(of_normed, NORM) - normed * (tl.sum(of_normed * normed, 1) / D)[:, None]
                of_raw_by_share *= tl.load(known_here + rows)[:, None]
                reach = tl.load(alike_here + square_at)
                reach *= tl.load(writes_here + square_at - BLOCK, mask=above, other=0.0)
                of_delta -= product(tl.trans(reach), of_raw_by_share, OPERAND)
            of_delta = own_outputs_gradient(
                of_delta,
                deltas_here,
                deltas_here + BLOCK * D,
                known_here,
                alike_here,
                writes_here,
                gamma,
                NORM,
                BLOCK,
                D,
            )
        if NORM:
            normed = tl.load(narrow + 4 * BLOCK * D + narrow_at)
            inverse_std, along, tilt, along_slope = load_known(known + place * 4 * BLOCK + rows, BLOCK)
            of_aim, of_raw = deltas_gradient(of_delta, delta, normed, inverse_std, along, tilt, along_slope, gamma)
            # The error is 2 (k + scale n + shift - v), and scale times it the aim and what n adds.
            of_error = of_aim * gamma[None, :]
            if mass is not None:
                of_raw += of_raw_by_share
            v = tl.load(tokens(values, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
            error = 2.0 * (k + normed * gamma[None, :] + beta[None, :] - v)
            part = of_norm + row1 * 2 * D + columns
            of_gamma = of_aim * error + 2.0 * of_error * normed
            if mass is not None:
                of_gamma += of_aim_by_share * (error - 2.0 * gamma[None, :] * normed)
                of_error += of_aim_by_share * gamma[None, :]
            tl.store(part, tl.load(part) + tl.sum(of_gamma, 0))
            tl.store(part + D, tl.load(part + D) + tl.sum(2.0 * of_error, 0))
            of_k += 2.0 * of_error
        else:
            of_error, of_raw = of_delta, 2.0 * of_delta
        if EXACT:
            # What a token meets of its chunk, and with which coefficients: those of the token before, a row further up.
            of_reach = -product(of_raw, tl.trans(delta), OPERAND)
            of_writes_at = of_writes + row2 * BLOCK * BLOCK + square_at - BLOCK
            of_own_writes = of_reach * tl.load(alike_here + square_at)
            tl.store(of_writes_at, tl.load(of_writes_at, mask=above, other=0.0) + of_own_writes, mask=above)
            of_alike = of_reach * tl.load(writes_here + square_at - BLOCK, mask=above, other=0.0)
            of_alike += tl.trans(of_alike)
            before_keep2 = before(read + row2 * BLOCK * 2, rows, 1.0)
            before_carried2 = before(read + row2 * BLOCK * 2 + 1, rows, 0.0)
            of_before_keep2 = tl.full((BLOCK,), 0.0, tl.float32)
            of_before_carried2 = tl.full((BLOCK,), 0.0, tl.float32)

        # Downward: from raw to the keys, and the gradient at the state before the chunk.
        tl.debug_barrier()
        q = tl.load(tokens(queries, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        of_answer = tl.load(narrow + 2 * BLOCK * D + narrow_at)
        read_keep2 = tl.load(read + row2 * BLOCK * 2 + rows * 2)
        read_carried2 = tl.load(read + row2 * BLOCK * 2 + rows * 2 + 1)
        keep2, carry2, decay2 = tl.load(end + row2 * 4), tl.load(end + row2 * 4 + 1), tl.load(end + row2 * 4 + 3)
        if DEPTH == 2:
            read_keep1 = tl.load(read + row1 * BLOCK * 2 + rows * 2)
            read_carried1 = tl.load(read + row1 * BLOCK * 2 + rows * 2 + 1)
            keep1, carry1, decay1 = tl.load(end + row1 * 4), tl.load(end + row1 * 4 + 1), tl.load(end + row1 * 4 + 3)
        for tile in range(tiles):
            w2 = tl.load(last(state + LAST, tile, D, TILE))
            if DEPTH == 2:
                w1 = tl.load(first(state, tile, D, HIDDEN, TILE))
                z = product(k, w1, OPERAND)
                h = gelu(z)
                x = tl.load(wide + 2 * BLOCK * HIDDEN + wide_at + tile * TILE)
            else:
                h = k
                x = q
            of_h = tl.load(wide + wide_at + tile * TILE)
            by_weights = product(of_raw, tl.trans(w2), OPERAND)
            if EXACT:
                by_momentum = product(of_raw, tl.trans(tl.load(last(state + LAST, tile, D, TILE) + MATRIX)), OPERAND)
                of_h += by_weights * before_keep2[:, None] + by_momentum * before_carried2[:, None]
                if anchors is not None:
                    m2 = tl.load(last(anchor + LAST // 2, tile, D, TILE))
                    by_anchor = product(of_raw, tl.trans(m2), OPERAND)
                    of_h += by_anchor * (1.0 - before_keep2)[:, None]
                    by_weights -= by_anchor
                of_before_keep2 += tl.sum(by_weights * h, 1)
                of_before_carried2 += tl.sum(by_momentum * h, 1)
                of_h += product(of_alike, h, OPERAND)
            else:
                of_h += by_weights
            to2 = last(of_state + LAST, tile, D, TILE)
            of_w2, of_s2 = matrix(g_w, to2, ON_CHIP), matrix(g_s, to2 + MATRIX, ON_CHIP)
            new_s2 = carry2 * of_w2 + decay2 * of_s2
            new_s2 += product(tl.trans(x * read_carried2[:, None]), of_answer, OPERAND)
            if EXACT:
                new_s2 += product(tl.trans(h * before_carried2[:, None]), of_raw, OPERAND)
                new_w2 = keep2 * of_w2 + product(tl.trans(h * before_keep2[:, None]), of_raw, OPERAND)
            else:
                new_w2 = keep2 * of_w2 + product(tl.trans(h), of_raw, OPERAND)
            new_w2 += product(tl.trans(x * read_keep2[:, None]), of_answer, OPERAND)
            if anchors is not None:
                to_m2 = last(of_anchor + LAST // 2, tile, D, TILE)
                new_m2 = matrix(g_m, to_m2, ON_CHIP) + (1.0 - keep2) * of_w2
                new_m2 += product(tl.trans(x * (1.0 - read_keep2)[:, None]), of_answer, OPERAND)
                if EXACT:
                    new_m2 += product(tl.trans(h * (1.0 - before_keep2)[:, None]), of_raw, OPERAND)
            if DEPTH == 2:
                slope, bend = gelu_slope(z), gelu_bend(z)
                arriving = product(delta, tl.trans(w2), OPERAND)
                of_delta1 = tl.load(wide + BLOCK * HIDDEN + wide_at + tile * TILE)
                if mass is not None:
                    of_delta1 = of_delta1 * share[:, None] + 2.0 * of_delta_square[:, None] * arriving * slope
                new_w2 += product(tl.trans(of_delta1 * slope), delta, OPERAND)
                of_z = of_h * slope + of_delta1 * arriving * bend
                of_k += product(of_z, tl.trans(w1), OPERAND)
            else:
                of_k += of_h
            if ON_CHIP:
                g_w, g_s = new_w2, new_s2
                if anchors is not None:
                    g_m = new_m2
            else:
                replace(to2, new_w2, new_s2, MATRIX)
                if anchors is not None:
                    tl.store(to_m2, new_m2)
            if DEPTH == 2:
                to1 = first(of_state, tile, D, HIDDEN, TILE)
                of_w1, of_s1 = tl.load(to1), tl.load(to1 + MATRIX)
                of_query_z = tl.load(wide + 3 * BLOCK * HIDDEN + wide_at + tile * TILE)
                new_s1 = carry1 * of_w1 + decay1 * of_s1
                new_s1 += product(tl.trans(q * read_carried1[:, None]), of_query_z, OPERAND)
                new_w1 = keep1 * of_w1 + product(tl.trans(k), of_z, OPERAND)
                new_w1 += product(tl.trans(q * read_keep1[:, None]), of_query_z, OPERAND)
                if anchors is not None:
                    to_m1 = first(of_anchor, tile, D, HIDDEN, TILE)
                    new_m1 = tl.load(to_m1) + (1.0 - keep1) * of_w1
                    new_m1 += product(tl.trans(q * (1.0 - read_keep1)[:, None]), of_query_z, OPERAND)
                replace(to1, new_w1, new_s1, MATRIX)
                if anchors is not None:
                    tl.store(to_m1, new_m1)
        if EXACT:
            of_before = of_read + row2 * BLOCK * 2 + (rows - 1) * 2
            there = rows > 0
            tl.store(of_before, tl.load(of_before, mask=there) + of_before_keep2, mask=there)
            tl.store(of_before + 1, tl.load(of_before + 1, mask=there) + of_before_carried2, mask=there)
        if restarts is not None:  # noqa: SIM102 (whether it is there is settled in compiling)
            if tl.load(restarts + chunk * (memories // heads) + batch) != 0:
                # The state before the chunk was replaced by the fresh one, and the gradient belongs to that.
                if ON_CHIP:
                    save(on_chip, g_w, g_s, MATRIX)
                tl.debug_barrier()
                hand_over(of_state, of_fresh + memory * SIZE, SIZE)
                tl.debug_barrier()
                if ON_CHIP:
                    g_w, g_s = tl.load(on_chip), tl.load(on_chip + MATRIX)
        place_of = contiguous_tokens(of_keys, batch, head, chunk, chunks, heads, BLOCK, D)
        tl.store(place_of, of_k.to(of_keys.dtype.element_ty))
        place_of = contiguous_tokens(of_values, batch, head, chunk, chunks, heads, BLOCK, D)
        tl.store(place_of, (-2.0 * of_error).to(of_values.dtype.element_ty))
    if ON_CHIP:
        save(on_chip, g_w, g_s, MATRIX)
        if anchors is not None:
            tl.store(last(of_anchor, 0, D, TILE), g_m)
