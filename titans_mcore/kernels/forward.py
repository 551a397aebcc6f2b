"""The forward kernel: one program takes one memory through its chunks, in order.

Reading order: `scan_kernel` is the loop; a chunk is the keys' forward pass (network.py) and their errors (errors.py),
then tile by tile the queries' reads and the new state, last the state shell (shell.py).

Where things are:
- The state is in registers over the whole loop when ON_CHIP: one tile holds each matrix (L = 1, and L = 2 up to
  64 x 64). Else it is float32 in the global buffer `after`, in place. One memory's state is read and written by one
  program only, and there are at most some hundred of 16 * D * HIDDEN bytes: it stays in the L2 cache. Each chunk
  streams it by tiles, weights twice (answer; read and write), momentum once, and writes it once. Weights a third time
  where steps are held: by how much is known only when all tiles have been seen.
- M_0, to which forgetting leads, is one for all rows, and each chunk streams it once.
- Errors that are EXACT take a second time the last matrix' momentum and M_0, and of what is b tokens wide the products
  of inputs and the aims from global scratch, a few kilobytes that stay in the L1 cache.
- Everything else of a chunk is b tokens wide and in registers. Hidden activations are made anew in each pass: the
  tiles of weights that takes are there anyhow.
- Barriers stand where threads read what other threads of the program have stored.
"""

import triton
import triton.language as tl

from .errors import aims_of, centre, deltas_of, lower_share, own_outputs
from .network import (
    COUNTS,
    answer_of,
    before,
    contiguous_tokens,
    first,
    first_delta_square,
    gelu,
    gelu_slope,
    last,
    load_state,
    matrix,
    meet,
    meet_keys,
    product,
    replace,
    save,
    save_state,
    tokens,
    vector,
)
from .shell import move, shell_acts, shell_factor, state_into_shell


@triton.jit(do_not_specialize=COUNTS)
def scan_kernel(
    queries,  # (B, T, H, D), T = chunks b, with the strides below; keys and values alike
    keys,
    values,
    reads,  # (B, T, H, D) contiguous; None for a walk that only finds the states
    read,  # (L, C, N, b, 2): the gates' coefficients, see memory/fused.py
    end,  # (L, C, N, 2, 2)
    writes,  # (L, C, N, b, b)
    write,  # (L, C, N, b, 2)
    mass,  # (C, N, b) of a chunk's steps, see lower_share in errors.py; None where none are held
    scale,  # (H, D) or None
    shift,  # (H, D) or None
    start,  # (N, SIZE) state before chunk_begin
    after,  # (N, SIZE) state after the last chunk, and the state at work when it is not in registers
    kept,  # (., N, SIZE) states with which every keep_every-th chunk begins, or None
    factors,  # (., N, 4) by what the shell has scaled each chunk's matrices, or None
    aims,  # (N, b, D) room for what of a chunk's errors does not depend on the memory, EXACT only
    alike,  # (., N, b, b) likewise products of the keys' inputs of the last matrix; of each chunk in a walk
    narrow,  # see backward_reads.py: a walk leaves the keys' delta and n there, and the rest of deltas_of in `known`
    known,  # (., N, 4, b); None, like narrow, if this is no walk
    held,  # (., N, 2, b) factor on the first matrix' steps, and |delta|^2 there; None if no walk or no mass
    fresh,  # (N or H, SIZE) state in which a document begins, or None
    anchors,  # (H, SIZE / 2), M_0, or None where forgetting leads to zero
    restarts,  # (C, B) int8, which chunks begin a document, or None
    closed,  # (C, B) int8, after which chunks the shell is; None without one
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
    ON_CHIP: tl.constexpr,
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
    state = after + memory * SIZE
    origin = start + memory * SIZE
    anchor = anchors if anchors is None else anchors + head * (SIZE // 2)
    gamma = vector(scale if scale is None else scale + head * D, 1.0, D)
    beta = vector(shift if shift is None else shift + head * D, 0.0, D)
    if ON_CHIP:
        w1, s1, w2, s2 = load_state(origin, D, HIDDEN, TILE, DEPTH)
    else:
        nothing = tl.full((1, 1), 0.0, tl.float32)
        w1, s1, w2, s2 = nothing, nothing, nothing, nothing
        move(origin, state, SIZE)
    for chunk in range(chunk_begin, chunk_end):
        if not ON_CHIP:
            tl.debug_barrier()
        if restarts is not None:  # noqa: SIM102 (whether it is there is settled in compiling)
            if tl.load(restarts + chunk * (memories // heads) + batch) != 0:
                begin = fresh + (memory % fresh_rows) * SIZE
                if ON_CHIP:
                    w1, s1, w2, s2 = load_state(begin, D, HIDDEN, TILE, DEPTH)
                else:
                    move(begin, state, SIZE)
                    tl.debug_barrier()

        # The keys' answers and errors.
        k = tl.load(tokens(keys, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        v = tl.load(tokens(values, batch, head, chunk, stride_b, stride_t, stride_h, BLOCK, D)).to(tl.float32)
        row1 = chunk * memories + memory  # of the first matrix' gates; the last one's is row2
        row2 = row1 + (DEPTH - 1) * chunks * memories
        walked = (chunk - chunk_begin) * memories + memory
        before_keep2 = before(read + row2 * BLOCK * 2, rows, 1.0)
        before_carried2 = before(read + row2 * BLOCK * 2 + 1, rows, 0.0)
        raw, similar_keys = meet_keys(
            k, w1, w2, s2, state, anchor, before_keep2, before_carried2,
            tiles, BLOCK, D, HIDDEN, TILE, DEPTH, EXACT, ON_CHIP, OPERAND,
        )  # fmt: skip
        raw = centre(raw, NORM)
        aim = aims_of(k, v, gamma, beta, NORM)
        if EXACT:
            alike_here = alike + (memory if narrow is None else walked) * BLOCK * BLOCK
            aims_here = aims + memory * BLOCK * D
            tl.debug_barrier()
            tl.store(alike_here + square_at, similar_keys)
            tl.store(aims_here + narrow_at, aim)
            tl.debug_barrier()
            writes_here = writes + row2 * BLOCK * BLOCK
            raw = own_outputs(raw, alike_here, aims_here, writes_here, gamma, NORM, BLOCK, D, EPS)
        delta, normed, inverse_std, along, tilt, along_slope = deltas_of(raw, aim, gamma, NORM, EPS)
        if narrow is not None:
            tl.store(narrow + (walked * 5 + 3) * BLOCK * D + narrow_at, delta)
            if NORM:
                tl.store(narrow + (walked * 5 + 4) * BLOCK * D + narrow_at, normed)
                known_at = known + walked * 4 * BLOCK + rows
                tl.store(known_at, inverse_std)
                tl.store(known_at + BLOCK, along)
                tl.store(known_at + 2 * BLOCK, tilt)
                tl.store(known_at + 3 * BLOCK, along_slope)
        if mass is not None:
            delta_square = first_delta_square(k, delta, w1, w2, state, tiles, BLOCK, D, HIDDEN, TILE, ON_CHIP, OPERAND)
            mass_here = tl.load(mass + row1 * BLOCK + rows)
            share = lower_share(normed, aim, mass_here, tl.sum(k * k, 1), delta_square)
            if held is not None:
                tl.store(held + walked * 2 * BLOCK + rows, share)
                tl.store(held + (walked * 2 + 1) * BLOCK + rows, delta_square)
        now2 = tl.load(write + row2 * BLOCK * 2 + rows * 2)
        later2 = tl.load(write + row2 * BLOCK * 2 + rows * 2 + 1)
        keep2 = tl.load(end + row2 * 4)
        carry2 = tl.load(end + row2 * 4 + 1)
        decay2 = tl.load(end + row2 * 4 + 3)
        if DEPTH == 2:
            now1 = tl.load(write + row1 * BLOCK * 2 + rows * 2)
            later1 = tl.load(write + row1 * BLOCK * 2 + rows * 2 + 1)
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
                attended1 *= tl.load(writes + row1 * BLOCK * BLOCK + square_at)

        # Tile by tile: read from the state as it was, then write the chunk's steps into it. The first matrix is done
        # with before the last one's momentum is loaded, and in the backward kernels likewise: a load does not move
        # ahead of a store, so fewer tiles are in registers at a time.
        if kept is not None:
            keeps = (chunk - chunk_begin) % keep_every == 0
            keep = kept + ((chunk - chunk_begin) // keep_every * memories + memory) * SIZE
        square_w1, square_s1, square_w2, square_s2 = 0.0, 0.0, 0.0, 0.0
        for tile in range(tiles):
            at2 = last(state + LAST, tile, D, TILE)
            old_w2 = matrix(w2, at2, ON_CHIP)
            if DEPTH == 2:
                at1 = first(state, tile, D, HIDDEN, TILE)
                old_w1 = matrix(w1, at1, ON_CHIP)
                old_s1 = matrix(s1, at1 + MATRIX, ON_CHIP)
                z = product(k, old_w1, OPERAND)
                h = gelu(z)
                delta1 = product(delta, tl.trans(old_w2), OPERAND) * gelu_slope(z)
                if mass is not None:
                    delta1 *= share[:, None]
                m1 = None if anchors is None else tl.load(first(anchor, tile, D, HIDDEN, TILE))
                if reads is not None:
                    met = meet(q, old_w1, old_s1, m1, read_keep1, read_carried1, OPERAND)
                    x = gelu(met - product(attended1, delta1, OPERAND))
                if kept is not None:  # noqa: SIM102 (whether it is there is settled in compiling)
                    if keeps:
                        save(first(keep, tile, D, HIDDEN, TILE), old_w1, old_s1, MATRIX)
                new_w1 = keep1 * old_w1 + carry1 * old_s1 - product(tl.trans(k * now1[:, None]), delta1, OPERAND)
                if anchors is not None:
                    new_w1 += (1.0 - keep1) * m1
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
            m2 = None if anchors is None else tl.load(last(anchor + LAST // 2, tile, D, TILE))
            if reads is not None:
                answer += meet(x, old_w2, old_s2, m2, read_keep2, read_carried2, OPERAND)
                similar += product(x, tl.trans(h), OPERAND)
            if kept is not None:  # noqa: SIM102 (whether it is there is settled in compiling)
                if keeps:
                    save(last(keep + LAST, tile, D, TILE), old_w2, old_s2, MATRIX)
            new_w2 = keep2 * old_w2 + carry2 * old_s2 - product(tl.trans(h * now2[:, None]), delta, OPERAND)
            if anchors is not None:
                new_w2 += (1.0 - keep2) * m2
            new_s2 = decay2 * old_s2 - product(tl.trans(h * later2[:, None]), delta, OPERAND)
            square_w2 += tl.sum(new_w2 * new_w2)
            square_s2 += tl.sum(new_s2 * new_s2)
            if ON_CHIP:
                w2, s2 = new_w2, new_s2
            else:
                replace(at2, new_w2, new_s2, MATRIX)
        if reads is not None:
            answer -= product(similar * tl.load(writes + row2 * BLOCK * BLOCK + square_at), delta, OPERAND)
            if NORM:
                answer, _, _ = answer_of(answer, q, gamma, beta, EPS)
            out = contiguous_tokens(reads, batch, head, chunk, chunks, heads, BLOCK, D)
            tl.store(out, answer.to(reads.dtype.element_ty))

        # The state shell.
        if LIMIT is not None:
            shrink_w1, shrink_s1 = shell_factor(square_w1 / MATRIX, LIMIT), shell_factor(square_s1 / MATRIX, LIMIT)
            shrink_w2, shrink_s2 = shell_factor(square_w2 / MATRIX, LIMIT), shell_factor(square_s2 / MATRIX, LIMIT)
            there = tl.load(closed + chunk * (memories // heads) + batch) != 0
            shrink_w1, shrink_s1 = tl.where(there, shrink_w1, 1.0), tl.where(there, shrink_s1, 1.0)
            shrink_w2, shrink_s2 = tl.where(there, shrink_w2, 1.0), tl.where(there, shrink_s2, 1.0)
            if factors is not None:
                found = factors + walked * 4
                tl.store(found, shrink_w1)
                tl.store(found + 1, shrink_s1)
                tl.store(found + 2, shrink_w2)
                tl.store(found + 3, shrink_s2)
            if ON_CHIP:
                w1, s1, w2, s2 = w1 * shrink_w1, s1 * shrink_s1, w2 * shrink_w2, s2 * shrink_s2
            elif shell_acts(shrink_w1, shrink_s1, shrink_w2, shrink_s2):
                state_into_shell(state, shrink_w1, shrink_s1, shrink_w2, shrink_s2, MATRIX, DEPTH)
    if ON_CHIP:
        save_state(state, w1, s1, w2, s2, D, HIDDEN, TILE, DEPTH)
