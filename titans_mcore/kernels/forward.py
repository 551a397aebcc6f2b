"""The forward kernel: one program takes one memory through its chunks, in order.

Reading order: `scan_kernel` is the loop; a chunk is the keys' forward pass and their errors (network.py), the step
bound (bounds.py), then tile by tile the queries' reads and the new state, last the state shell (shell.py).

Where things are:
- The state is in registers over the whole loop when ON_CHIP: one tile holds each matrix (L = 1, and L = 2 up to
  64 x 64). Else it is float32 in the global buffer `after`, in place. One memory's state is read and written by one
  program only, and there are at most some hundred of 16 * D * HIDDEN bytes: it stays in the L2 cache. Each chunk
  streams it by tiles, weights three times (answer, reach, read and write), momentum once, and writes it once.
- Everything else of a chunk is b tokens wide and in registers. Hidden activations are made anew in each pass: the
  tiles of weights that takes are there anyhow.
- Barriers stand where threads read what other threads of the program have stored.
"""

import triton
import triton.language as tl

from .bounds import chunk_load, step_scale
from .network import (
    answer_keys,
    answer_of,
    contiguous_tokens,
    errors_of,
    first,
    gelu,
    gelu_slope,
    last,
    load_state,
    matrix,
    meet,
    product,
    reach_first,
    replace,
    save,
    save_state,
    tokens,
    vector,
)
from .shell import move, shell_acts, state_into_shell


@triton.jit
def scan_kernel(
    queries,  # (B, T, H, D), T = chunks b, with the strides below; keys and values alike
    keys,
    values,
    reads,  # (B, T, H, D) contiguous; None for a walk that only finds the states
    read,  # (L, C, N, b, 2): the gates' coefficients, see memory/chunked.py
    end,  # (L, C, N, 2, 2)
    writes,  # (L, C, N, b, b)
    write,  # (L, C, N, b, 2)
    mass,  # (L, C, N, b)
    scale,  # (H, D) or None
    shift,  # (H, D) or None
    start,  # (N, SIZE) state before chunk_begin
    after,  # (N, SIZE) state after the last chunk, and the state at work when it is not in registers
    kept,  # (., N, SIZE) states with which every keep_every-th chunk begins, or None
    squares,  # (., N, 4) mean squares of each chunk's matrices as they reach the shell, or None
    fresh,  # (N or H, SIZE) state in which a document begins, or None
    anchors,  # (N or H, SIZE / 2) or None
    restarts,  # (C, B) int8, which chunks begin a document, or None
    closed,  # (C, B) int8, after which chunks the shell is, or None
    stride_b,
    stride_t,
    stride_h,
    memories,
    heads,
    chunks,
    chunk_begin,
    chunk_end,
    keep_every,
    fresh_rows,
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
    CLOSED: tl.constexpr,  # without `closed`: whether the shell is after every chunk
    ON_CHIP: tl.constexpr,
    OPERAND: tl.constexpr,
):
    MATRIX: tl.constexpr = D * HIDDEN
    SIZE: tl.constexpr = 2 * DEPTH * MATRIX
    memory = tl.program_id(0).to(tl.int64)
    batch, head = memory // heads, memory % heads
    rows = tl.arange(0, BLOCK)
    square_at = rows[:, None] * BLOCK + rows[None, :]
    state = after + memory * SIZE
    origin = start + memory * SIZE
    gamma = vector(scale if scale is None else scale + head * D, 1.0, D)
    beta = vector(shift if shift is None else shift + head * D, 0.0, D)
    if ON_CHIP:
        w1, s1, w2, s2 = load_state(origin, D, HIDDEN, TILE, DEPTH)
    else:
        nothing = tl.full((1, 1), 0.0, tl.float32)
        w1, s1, w2, s2 = nothing, nothing, nothing, nothing
        move(origin, state, SIZE)
    for chunk in range(chunk_begin, chunk_end):
        if restarts is not None:  # noqa: SIM102 (whether it is there is settled in compiling)
            if tl.load(restarts + chunk * (memories // heads) + batch) != 0:
                begin = fresh + (memory % fresh_rows) * SIZE
                if ON_CHIP:
                    w1, s1, w2, s2 = load_state(begin, D, HIDDEN, TILE, DEPTH)
                else:
                    tl.debug_barrier()
                    move(begin, state, SIZE)
        tl.debug_barrier()

        # The keys' answers and errors at the weights the chunk begins with, and the step bound.
        k = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        v = tl.load(tokens(values, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        raw, overlap = answer_keys(k, w1, w2, state, tiles, BLOCK, D, HIDDEN, TILE, DEPTH, ON_CHIP, OPERAND)
        error, delta, reach, _, _ = errors_of(raw, k, v, gamma, beta, NORM, EPS)
        reached = reach_first(k, reach, w1, w2, state, tiles, BLOCK, D, HIDDEN, TILE, DEPTH, ON_CHIP, OPERAND)
        row1 = chunk * memories + memory  # of the first matrix' gates; the last one's is row2
        row2 = row1 + (DEPTH - 1) * chunks * memories
        mass1 = tl.load(mass + row1 * BLOCK + rows)
        mass2 = tl.load(mass + row2 * BLOCK + rows)
        own, before, _, _, _, _ = chunk_load(
            k, overlap, error, reach, reached, mass1, mass2, GROWTH, BLOCK, DEPTH, OPERAND
        )
        factor = step_scale(own, before)
        now2 = tl.load(write + row2 * BLOCK * 2 + rows * 2) * factor
        later2 = tl.load(write + row2 * BLOCK * 2 + rows * 2 + 1) * factor
        keep2 = tl.load(end + row2 * 4)
        carry2 = tl.load(end + row2 * 4 + 1)
        decay2 = tl.load(end + row2 * 4 + 3)
        if DEPTH == 2:
            now1 = tl.load(write + row1 * BLOCK * 2 + rows * 2) * factor
            later1 = tl.load(write + row1 * BLOCK * 2 + rows * 2 + 1) * factor
            keep1 = tl.load(end + row1 * 4)
            carry1 = tl.load(end + row1 * 4 + 1)
            decay1 = tl.load(end + row1 * 4 + 3)

        # What the queries meet of the chunk's own steps.
        if reads is not None:
            q = tl.load(tokens(queries, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
            answer = tl.full((BLOCK, D), 0.0, tl.float32)
            similar = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
            read_keep2 = tl.load(read + row2 * BLOCK * 2 + rows * 2)
            read_carried2 = tl.load(read + row2 * BLOCK * 2 + rows * 2 + 1)
            if DEPTH == 2:
                read_keep1 = tl.load(read + row1 * BLOCK * 2 + rows * 2)
                read_carried1 = tl.load(read + row1 * BLOCK * 2 + rows * 2 + 1)
                attended1 = product(q, tl.trans(k), OPERAND)
                attended1 *= tl.load(writes + row1 * BLOCK * BLOCK + square_at) * factor[None, :]

        # Tile by tile: read from the state as it was, then write the chunk's steps into it. The first matrix is done
        # with before the last one's momentum is loaded, and in the backward kernels likewise: a load does not move
        # ahead of a store, so fewer tiles are in registers at a time.
        if kept is not None:
            keeps = (chunk - chunk_begin) % keep_every == 0
            keep = kept + ((chunk - chunk_begin) // keep_every * memories + memory) * SIZE
        square_w1, square_s1, square_w2, square_s2 = 0.0, 0.0, 0.0, 0.0
        for tile in range(tiles):
            at2 = last(state, tile, D, HIDDEN, TILE, DEPTH)
            old_w2 = matrix(w2, at2, ON_CHIP)
            if DEPTH == 2:
                at1 = first(state, tile, D, HIDDEN, TILE)
                old_w1 = matrix(w1, at1, ON_CHIP)
                old_s1 = matrix(s1, at1 + MATRIX, ON_CHIP)
                z = product(k, old_w1, OPERAND)
                h = gelu(z)
                delta1 = product(delta, tl.trans(old_w2), OPERAND) * gelu_slope(z)
                if reads is not None:
                    met = meet(q, old_w1, old_s1, read_keep1, read_carried1, OPERAND)
                    x = gelu(met - product(attended1, delta1, OPERAND))
                if kept is not None:  # noqa: SIM102 (whether it is there is settled in compiling)
                    if keeps:
                        save(first(keep, tile, D, HIDDEN, TILE), old_w1, old_s1, MATRIX)
                new_w1 = keep1 * old_w1 + carry1 * old_s1 - product(tl.trans(k * now1[:, None]), delta1, OPERAND)
                new_s1 = decay1 * old_s1 - product(tl.trans(k * later1[:, None]), delta1, OPERAND)
                square_w1 += tl.sum(new_w1 * new_w1)
                square_s1 += tl.sum(new_s1 * new_s1)
                if ON_CHIP:
                    w1, s1 = new_w1, new_s1
                else:
                    replace(at1, new_w1, new_s1, MATRIX)
            else:
                h = k
                if reads is not None:
                    x = q
            old_s2 = matrix(s2, at2 + MATRIX, ON_CHIP)
            if reads is not None:
                answer += meet(x, old_w2, old_s2, read_keep2, read_carried2, OPERAND)
                similar += product(x, tl.trans(h), OPERAND)
            if kept is not None:  # noqa: SIM102 (whether it is there is settled in compiling)
                if keeps:
                    save(last(keep, tile, D, HIDDEN, TILE, DEPTH), old_w2, old_s2, MATRIX)
            new_w2 = keep2 * old_w2 + carry2 * old_s2 - product(tl.trans(h * now2[:, None]), delta, OPERAND)
            new_s2 = decay2 * old_s2 - product(tl.trans(h * later2[:, None]), delta, OPERAND)
            square_w2 += tl.sum(new_w2 * new_w2)
            square_s2 += tl.sum(new_s2 * new_s2)
            if ON_CHIP:
                w2, s2 = new_w2, new_s2
            else:
                replace(at2, new_w2, new_s2, MATRIX)
        if reads is not None:
            answer -= product(
                similar * tl.load(writes + row2 * BLOCK * BLOCK + square_at) * factor[None, :], delta, OPERAND
            )
            if NORM:
                answer, _, _ = answer_of(answer, q, gamma, beta, EPS)
            out = contiguous_tokens(reads, batch, head, chunk, chunks, heads, BLOCK, D)
            tl.store(out, answer.to(reads.dtype.element_ty))

        # The state shell.
        square_w1, square_s1 = square_w1 / MATRIX, square_s1 / MATRIX
        square_w2, square_s2 = square_w2 / MATRIX, square_s2 / MATRIX
        if squares is not None:
            found = squares + ((chunk - chunk_begin) * memories + memory) * 4
            tl.store(found, square_w1)
            tl.store(found + 1, square_s1)
            tl.store(found + 2, square_w2)
            tl.store(found + 3, square_s2)
        if CLOSED:
            acts = shell_acts(square_w1, square_s1, square_w2, square_s2, first_floor, last_floor, DEPTH)
            if closed is not None:
                acts &= tl.load(closed + chunk * (memories // heads) + batch) != 0
            if acts:
                if ON_CHIP:
                    save_state(state, w1, s1, w2, s2, D, HIDDEN, TILE, DEPTH)
                state_into_shell(
                    state, anchors, memory, anchor_rows, square_w1, square_s1, square_w2, square_s2,
                    first_floor, last_floor, MATRIX, DEPTH,
                )  # fmt: skip
                if ON_CHIP:
                    w1, s1, w2, s2 = load_state(state, D, HIDDEN, TILE, DEPTH)
    if ON_CHIP:
        save_state(state, w1, s1, w2, s2, D, HIDDEN, TILE, DEPTH)
