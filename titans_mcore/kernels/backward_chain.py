"""The backward kernel of the states: one program takes one memory's gradient back through a group's chunks.

Reading order of a chunk: the state shell, back through the chunk's end (what it wrote into the state), the step bound,
then back through the keys' inner gradient, upward along the error and downward along the forward pass, as in
memory/network_gradient.py. The gradient at the state before the chunk is what the next turn begins with.

Where things are: the gradient at the state is in registers over the loop when ON_CHIP, else in the global float32
buffer `of_state`, streamed by tiles twice a chunk like the chunk's own state. The gradients at h and at the first delta
(b, HIDDEN) are in the scratch `wide`, where backward_reads.py has begun them; a tile is a few kilobytes and stays in
the L1 cache.
"""

import triton
import triton.language as tl

from .bounds import chunk_load, load_gradient, step_scale_gradient
from .network import (
    contiguous_tokens,
    errors_gradient,
    errors_of,
    first,
    gelu,
    gelu_bend,
    gelu_slope,
    last,
    load_state,
    matrix,
    product,
    replace,
    save_state,
    tokens,
    vector,
)
from .shell import hand_over, shell_acts, state_into_shell_gradient


@triton.jit
def chain_backward_kernel(
    queries,  # as in forward.py and backward_reads.py, like the others of these names
    keys,
    values,
    of_keys,  # (B, T, H, D) contiguous; written here, like of_values
    of_values,
    read,
    end,
    write,
    mass,
    of_end,  # gradients at the gates' coefficients, of their shapes; written here
    of_write,
    of_mass,
    scale,
    shift,
    states,  # (g + 1, N, SIZE): the last is the state after the group
    of_state,  # (N, SIZE): gradient at the state after the group; becomes that at the state before it
    squares,  # (g, N, 4)
    of_fresh,  # (N, SIZE), added to where a document begins
    anchors,
    of_anchors,  # (N, SIZE / 2), added to where the shell acts
    restarts,
    closed,
    wide,
    narrow,
    overlaps,
    token_rows,
    of_norm,
    stride_b,
    stride_t,
    stride_h,
    memories,
    heads,
    chunks,
    chunk_begin,
    group,
    anchor_rows,
    first_floor,
    last_floor,
    tiles,  # HIDDEN / TILE, not a constant: unrolled loops need more registers than there are
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    GROWTH: tl.constexpr,
    CLOSED: tl.constexpr,
    ON_CHIP: tl.constexpr,
    OPERAND: tl.constexpr,
):
    MATRIX: tl.constexpr = D * HIDDEN
    SIZE: tl.constexpr = 2 * DEPTH * MATRIX
    memory = tl.program_id(0).to(tl.int64)
    batch, head = memory // heads, memory % heads
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    square_at = rows[:, None] * BLOCK + rows[None, :]
    of_state += memory * SIZE
    gamma = vector(scale if scale is None else scale + head * D, 1.0, D)
    beta = vector(shift if shift is None else shift + head * D, 0.0, D)
    if ON_CHIP:
        g_w1, g_s1, g_w2, g_s2 = load_state(of_state, D, HIDDEN, TILE, DEPTH)
    else:
        nothing = tl.full((1, 1), 0.0, tl.float32)
        g_w1, g_s1, g_w2, g_s2 = nothing, nothing, nothing, nothing
    for turn in range(group):
        chunk = chunk_begin + group - 1 - turn
        place = (group - 1 - turn) * memories + memory
        state = states + place * SIZE
        row1 = chunk * memories + memory
        row2 = row1 + (DEPTH - 1) * chunks * memories
        narrow_at = place * 5 * BLOCK * D + rows[:, None] * D + columns[None, :]
        wide_at = place * 4 * BLOCK * HIDDEN + rows[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]

        # The state shell. A state that the next chunk has replaced has no gradient, so what is behind it is the same.
        if CLOSED:
            found = squares + place * 4
            square_w1, square_s1 = tl.load(found), tl.load(found + 1)
            square_w2, square_s2 = tl.load(found + 2), tl.load(found + 3)
            acts = shell_acts(square_w1, square_s1, square_w2, square_s2, first_floor, last_floor, DEPTH)
            if closed is not None:
                acts &= tl.load(closed + chunk * (memories // heads) + batch) != 0
            if acts:
                if ON_CHIP:
                    save_state(of_state, g_w1, g_s1, g_w2, g_s2, D, HIDDEN, TILE, DEPTH)
                state_into_shell_gradient(
                    of_state, state + memories * SIZE, anchors, of_anchors, memory, anchor_rows,
                    square_w1, square_s1, square_w2, square_s2, first_floor, last_floor, MATRIX, DEPTH,
                )  # fmt: skip
                if ON_CHIP:
                    g_w1, g_s1, g_w2, g_s2 = load_state(of_state, D, HIDDEN, TILE, DEPTH)

        # Back through the chunk's end: to h, delta and the coefficients.
        k = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        delta = tl.load(narrow + 4 * BLOCK * D + narrow_at)
        factor = tl.load(token_rows + place * 3 * BLOCK + 2 * BLOCK + rows)
        now2 = tl.load(write + row2 * BLOCK * 2 + rows * 2)
        later2 = tl.load(write + row2 * BLOCK * 2 + rows * 2 + 1)
        if DEPTH == 2:
            now1 = tl.load(write + row1 * BLOCK * 2 + rows * 2)
            later1 = tl.load(write + row1 * BLOCK * 2 + rows * 2 + 1)
        of_delta = tl.load(narrow + BLOCK * D + narrow_at)
        of_k_now = tl.full((BLOCK, D), 0.0, tl.float32)
        of_k_later = tl.full((BLOCK, D), 0.0, tl.float32)
        of_now2 = tl.full((BLOCK,), 0.0, tl.float32)
        of_later2 = tl.full((BLOCK,), 0.0, tl.float32)
        of_keep1, of_carry1, of_decay1 = 0.0, 0.0, 0.0
        of_keep2, of_carry2, of_decay2 = 0.0, 0.0, 0.0
        tl.debug_barrier()
        for tile in range(tiles):
            at2 = last(state, tile, D, HIDDEN, TILE, DEPTH)
            to2 = last(of_state, tile, D, HIDDEN, TILE, DEPTH)
            w2 = tl.load(at2)
            if DEPTH == 2:
                at1 = first(state, tile, D, HIDDEN, TILE)
                to1 = first(of_state, tile, D, HIDDEN, TILE)
                w1 = tl.load(at1)
                of_w1, of_s1 = matrix(g_w1, to1, ON_CHIP), matrix(g_s1, to1 + MATRIX, ON_CHIP)
                of_keep1 += tl.sum(of_w1 * w1)
                s1 = tl.load(at1 + MATRIX)
                of_carry1 += tl.sum(of_w1 * s1)
                of_decay1 += tl.sum(of_s1 * s1)
                z = product(k, w1, OPERAND)
                h = gelu(z)
                delta1 = product(delta, tl.trans(w2), OPERAND) * gelu_slope(z)
                of_delta1 = tl.load(wide + BLOCK * HIDDEN + wide_at + tile * TILE)
                of_delta1 -= product(k * (now1 * factor)[:, None], of_w1, OPERAND)
                of_delta1 -= product(k * (later1 * factor)[:, None], of_s1, OPERAND)
                tl.store(wide + BLOCK * HIDDEN + wide_at + tile * TILE, of_delta1)
                of_k_now += product(delta1, tl.trans(of_w1), OPERAND)
                of_k_later += product(delta1, tl.trans(of_s1), OPERAND)
            else:
                h = k
            of_w2, of_s2 = matrix(g_w2, to2, ON_CHIP), matrix(g_s2, to2 + MATRIX, ON_CHIP)
            of_keep2 += tl.sum(of_w2 * w2)
            s2 = tl.load(at2 + MATRIX)
            of_carry2 += tl.sum(of_w2 * s2)
            of_decay2 += tl.sum(of_s2 * s2)
            of_h_now = product(delta, tl.trans(of_w2), OPERAND)
            of_h_later = product(delta, tl.trans(of_s2), OPERAND)
            of_h = tl.load(wide + wide_at + tile * TILE)
            of_h -= of_h_now * (now2 * factor)[:, None] + of_h_later * (later2 * factor)[:, None]
            tl.store(wide + wide_at + tile * TILE, of_h)
            of_now2 -= tl.sum(of_h_now * h, 1)
            of_later2 -= tl.sum(of_h_later * h, 1)
            of_delta -= product(h * (now2 * factor)[:, None], of_w2, OPERAND)
            of_delta -= product(h * (later2 * factor)[:, None], of_s2, OPERAND)
        of_factor = tl.load(token_rows + place * 3 * BLOCK + rows) + of_now2 * now2 + of_later2 * later2
        tl.store(of_write + row2 * BLOCK * 2 + rows * 2, of_now2 * factor)
        tl.store(of_write + row2 * BLOCK * 2 + rows * 2 + 1, of_later2 * factor)
        tl.store(of_end + row2 * 4, of_keep2)
        tl.store(of_end + row2 * 4 + 1, of_carry2)
        tl.store(of_end + row2 * 4 + 2, 0.0)
        tl.store(of_end + row2 * 4 + 3, of_decay2)
        if DEPTH == 2:
            of_now1 = -tl.sum(of_k_now * k, 1)
            of_later1 = -tl.sum(of_k_later * k, 1)
            of_factor += of_now1 * now1 + of_later1 * later1
            of_k = tl.load(narrow + narrow_at)
            of_k -= of_k_now * (now1 * factor)[:, None] + of_k_later * (later1 * factor)[:, None]
            tl.store(of_write + row1 * BLOCK * 2 + rows * 2, of_now1 * factor)
            tl.store(of_write + row1 * BLOCK * 2 + rows * 2 + 1, of_later1 * factor)
            tl.store(of_end + row1 * 4, of_keep1)
            tl.store(of_end + row1 * 4 + 1, of_carry1)
            tl.store(of_end + row1 * 4 + 2, 0.0)
            tl.store(of_end + row1 * 4 + 3, of_decay1)
        else:
            of_k = tl.full((BLOCK, D), 0.0, tl.float32)

        # The step bound. What the forward pass has found of it comes from what backward_reads.py has kept.
        v = tl.load(tokens(values, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        raw = tl.load(narrow + 3 * BLOCK * D + narrow_at)
        overlap = tl.load(overlaps + place * BLOCK * BLOCK + square_at)
        reached = tl.load(token_rows + place * 3 * BLOCK + BLOCK + rows)
        error, _, reach, normed, inverse_std = errors_of(raw, k, v, gamma, beta, NORM, EPS)
        mass1 = tl.load(mass + row1 * BLOCK + rows)
        mass2 = tl.load(mass + row2 * BLOCK + rows)
        own, before, gain1, gain2, error_square, overlap1 = chunk_load(
            k, overlap, error, reach, reached, mass1, mass2, GROWTH, BLOCK, DEPTH, OPERAND
        )
        of_own, of_load = step_scale_gradient(own, before, of_factor)
        of_overlap, of_mass2, along_error, along2 = load_gradient(
            overlap, mass2, gain2, error_square, of_own, of_load, GROWTH, BLOCK
        )
        of_reach = reach * along2[:, None]
        tl.store(of_mass + row2 * BLOCK + rows, of_mass2)
        if DEPTH == 2:
            of_overlap1, of_mass1, along_error1, along1 = load_gradient(
                overlap1, mass1, gain1, error_square, of_own, of_load, GROWTH, BLOCK
            )
            along_error += along_error1
            of_k += product(of_overlap1, k, OPERAND)
            tl.store(of_mass + row1 * BLOCK + rows, of_mass1)
        of_error = -error * (along_error / error_square)[:, None]
        tl.debug_barrier()

        # Upward: from the deltas to the error. What arrives at a GELU is `arriving`, of the reach `reaching`.
        if DEPTH == 2:
            for tile in range(tiles):
                w2 = tl.load(last(state, tile, D, HIDDEN, TILE, DEPTH))
                slope = gelu_slope(product(k, tl.load(first(state, tile, D, HIDDEN, TILE)), OPERAND))
                of_arriving = tl.load(wide + BLOCK * HIDDEN + wide_at + tile * TILE) * slope
                of_reaching = product(reach, tl.trans(w2), OPERAND) * slope * slope * along1[:, None]
                of_delta += product(of_arriving, w2, OPERAND)
                of_reach += product(of_reaching, w2, OPERAND)
        of_error, of_raw, of_scale = errors_gradient(
            of_error, of_delta, of_reach, error, delta, reach, normed, inverse_std, gamma, NORM
        )
        if NORM:
            part = of_norm + row1 * 2 * D + columns
            tl.store(part, tl.load(part) + of_scale)
            tl.store(part + D, tl.load(part + D) + tl.sum(2.0 * of_error, 0))
            of_k += 2.0 * of_error

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
            w2 = tl.load(last(state, tile, D, HIDDEN, TILE, DEPTH))
            if DEPTH == 2:
                w1 = tl.load(first(state, tile, D, HIDDEN, TILE))
                z = product(k, w1, OPERAND)
                h = gelu(z)
                x = tl.load(wide + 2 * BLOCK * HIDDEN + wide_at + tile * TILE)
            else:
                h = k
                x = q
            of_h = tl.load(wide + wide_at + tile * TILE)
            of_h += product(of_raw, tl.trans(w2), OPERAND) + product(of_overlap, h, OPERAND)
            to2 = last(of_state, tile, D, HIDDEN, TILE, DEPTH)
            of_w2, of_s2 = matrix(g_w2, to2, ON_CHIP), matrix(g_s2, to2 + MATRIX, ON_CHIP)
            new_s2 = carry2 * of_w2 + decay2 * of_s2
            new_s2 += product(tl.trans(x * read_carried2[:, None]), of_answer, OPERAND)
            new_w2 = keep2 * of_w2 + product(tl.trans(h), of_raw, OPERAND)
            new_w2 += product(tl.trans(x * read_keep2[:, None]), of_answer, OPERAND)
            if DEPTH == 2:
                slope, bend = gelu_slope(z), gelu_bend(z)
                arriving = product(delta, tl.trans(w2), OPERAND)
                reaching = product(reach, tl.trans(w2), OPERAND)
                of_delta1 = tl.load(wide + BLOCK * HIDDEN + wide_at + tile * TILE)
                of_reach1 = reaching * slope * along1[:, None]
                new_w2 += product(tl.trans(of_delta1 * slope), delta, OPERAND)
                new_w2 += product(tl.trans(of_reach1 * slope), reach, OPERAND)
                of_z = of_h * slope + (of_delta1 * arriving + of_reach1 * reaching) * bend
                of_k += product(of_z, tl.trans(w1), OPERAND)
            else:
                of_k += of_h
            if ON_CHIP:
                g_w2, g_s2 = new_w2, new_s2
            else:
                replace(to2, new_w2, new_s2, MATRIX)
            if DEPTH == 2:
                to1 = first(of_state, tile, D, HIDDEN, TILE)
                of_w1, of_s1 = matrix(g_w1, to1, ON_CHIP), matrix(g_s1, to1 + MATRIX, ON_CHIP)
                of_query_z = tl.load(wide + 3 * BLOCK * HIDDEN + wide_at + tile * TILE)
                new_s1 = carry1 * of_w1 + decay1 * of_s1
                new_s1 += product(tl.trans(q * read_carried1[:, None]), of_query_z, OPERAND)
                new_w1 = keep1 * of_w1 + product(tl.trans(k), of_z, OPERAND)
                new_w1 += product(tl.trans(q * read_keep1[:, None]), of_query_z, OPERAND)
                if ON_CHIP:
                    g_w1, g_s1 = new_w1, new_s1
                else:
                    replace(to1, new_w1, new_s1, MATRIX)
        if restarts is not None:  # noqa: SIM102 (whether it is there is settled in compiling)
            if tl.load(restarts + chunk * (memories // heads) + batch) != 0:
                # The state before the chunk was replaced by the fresh one, and the gradient belongs to that.
                if ON_CHIP:
                    save_state(of_state, g_w1, g_s1, g_w2, g_s2, D, HIDDEN, TILE, DEPTH)
                tl.debug_barrier()
                hand_over(of_state, of_fresh + memory * SIZE, SIZE)
                tl.debug_barrier()
                if ON_CHIP:
                    g_w1, g_s1, g_w2, g_s2 = load_state(of_state, D, HIDDEN, TILE, DEPTH)
        place_of = contiguous_tokens(of_keys, batch, head, chunk, chunks, heads, BLOCK, D)
        tl.store(place_of, of_k.to(of_keys.dtype.element_ty))
        place_of = contiguous_tokens(of_values, batch, head, chunk, chunks, heads, BLOCK, D)
        tl.store(place_of, (-2.0 * of_error).to(of_values.dtype.element_ty))
        tl.debug_barrier()
    if ON_CHIP:
        save_state(of_state, g_w1, g_s1, g_w2, g_s2, D, HIDDEN, TILE, DEPTH)
