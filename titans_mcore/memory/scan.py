"""memory_scan: the one entrance to the memory, for training, streaming and the exported model."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .checkpoint import fixed_precision, in_fixed_precision
from .chunk import chunk_scan, go_on
from .decoding import decode, has_room, with_room
from .fused import fused_scan, why_not_fused
from .inputs import Backend, Matrices, MemoryState, OpenChunk, Tokens
from .layout import Chunks, PackedRows
from .naive import naive_scan
from .native import native_go_on, native_scan, why_not_native
from .probe import Probe, probing
from .rule import RULES, WHOLE, Memory, Network, Rule, WholeMatrices, forward

NETWORKS = ("residual_norm", "plain")


def memory_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    network: str = "residual_norm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    rule: str = "stable",
    forgets: bool = True,
    chunk_size: int = 16,
    state: MemoryState | None = None,
    start: MemoryState | None = None,
    rows: PackedRows | None = None,
    close: bool = False,
    backend: str = "auto",
    shard: WholeMatrices = WHOLE,
    probe: Probe | None = None,
) -> tuple[Tensor, MemoryState]:
    """Run the neural memory over a piece of a sequence: every token writes, then reads (paper, section 3.1).

    S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2, M_t = M_0 + (1 - alpha_t) (M_{t-1} - M_0) + S_t,
    y_t = M_t(q_t), gradients taken at the weights of the chunk's start. Forgetting leads to M_0 in the "stable" rule,
    to zero in the "literal" one; rule.py says what else the stable one does. A sequence gives the same reads
    whether it comes in one piece or in many, wherever they are cut; a document the same reads and gradients whatever
    stands beside it in its row. Tokens that are not real neither write nor decay, and read zeros.

    Args:
        queries: (B, T, H, D), any floating dtype; keys and values alike.
        theta: Inner learning rates (B, T, H, L), the step itself, 0 or more.
        eta: Momentum decays (B, T, H, L) in [0, 1].
        alpha: Forget rates (B, T, H, L) in [0, 1]; 1 - alpha of the weights is kept. Or rates for each channel of the
            matrices' inputs, L tensors (B, T, H, d_in).
        weights: Initial memory M_0, L = 1 to 4 matrices (H, d_in, d_out) from width D to width D.
        network: "residual_norm" for x + LayerNorm(MLP(x)), "plain" for the MLP alone.
        norm_weight: LayerNorm's scale (H, D); None is 1. residual_norm only, like norm_bias.
        norm_bias: LayerNorm's shift (H, D); None is 0.
        rule: "stable" or "literal", the paper's chunk rule and nothing else.
        forgets: Whether any alpha may be other than 0; without, products are saved.
        chunk_size: Tokens b that share the point at which their gradients are taken.
        state: What an earlier piece of the same sequences returned; None begins as `start` says.
        start: State in which a document begins, for B rows or 1, without an open chunk; None is M_0 without momentum.
        rows: Which tokens begin documents and which are padding; None if the rows hold one sequence each.
        close: End the chunk that the last token stands in, so that the next token begins another. Not with rows.
        backend: "chunked" is the dual form, "native" the same as one operation in C++ for the CPU, "fused" the same in
            Triton kernels, "oracle" the literal loop, "auto" the fastest that fits: on a CPU native and on a GPU fused,
            where native.why_not_native and fused.why_not_fused have no reason against it, else chunked.
        shard: The process's part of memories that several hold together: weights and states are its parts, and so are
            their gradients; the rest, and every other gradient, is whole and equal on all. Chunked only; every process
            makes the same calls.
        probe: Chunks to be looked at on the way. To be differentiated, scan without.

    Returns:
        The reads (B, T, H, D) in the queries' dtype, and the state after the last token. The computation and the state
        are float32, or float64 when the queries are, whatever autocast is on around; fused multiplies half-precision
        tokens as such.

    Raises:
        ValueError: An argument does not fit; the message names it, what came and what is allowed.
    """
    weights = list(weights)
    _check_settings(network, norm_weight, norm_bias, rule, chunk_size, backend, queries)
    _check_shapes(queries, keys, values, weights, shard)
    _check_gates(theta, eta, alpha, queries, weights, shard)
    _check_rows(rows, start, queries, close)
    residual_norm = network == "residual_norm"
    setting = Rule.of(rule, chunk_size, residual_norm=residual_norm, forgets=forgets)

    def scan(
        tokens: Tokens,
        weights: list[Tensor],
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        state: MemoryState | None,
        start: MemoryState | None,
    ) -> list[Any]:
        dtype = torch.promote_types(tokens.queries.dtype, torch.float32)
        net = Network(residual_norm, _cast(norm_weight, dtype), _cast(norm_bias, dtype), shard.differentiable())
        memory = Memory(net, setting, [w.to(dtype) for w in weights])
        return list(_scan(memory, tokens, state, start, rows, close, backend, probe))

    alphas = alpha if isinstance(alpha, Tensor) else list(alpha)
    tokens = Tokens(queries, keys, values, theta, eta, alphas)
    reads, end = in_fixed_precision(queries, scan, tokens, weights, norm_weight, norm_bias, state, start)
    return reads, end


def _scan(
    memory: Memory,
    tokens: Tokens,
    state: MemoryState | None,
    start: MemoryState | None,
    rows: PackedRows | None,
    close: bool,
    backend: str,
    probe: Probe | None,
) -> tuple[Tensor, MemoryState]:
    """memory_scan of checked arguments, in the precision of the memory's matrices."""
    queries, alpha, weights = tokens.queries, tokens.alpha, memory.initial
    dtype = weights[0].dtype
    backend = _chosen(backend, memory, queries, channelwise=not isinstance(alpha, Tensor))
    run = _BACKENDS[backend]
    if probe is not None:
        run = probing(probe, run)
    wide = queries.dtype if backend == "fused" else dtype
    tokens = Tokens(
        queries.to(wide),
        tokens.keys.to(wide),
        tokens.values.to(wide),
        tokens.theta.to(dtype),
        tokens.eta.to(dtype),
        alpha.to(dtype) if isinstance(alpha, Tensor) else [x.to(dtype) for x in alpha],
    )
    if rows is None and not close and queries.shape[1] == 1 and backend != "oracle" and has_room(memory, state):
        assert state is not None
        reads, end = decode(memory, tokens, state)
        return reads.to(queries.dtype), end
    packed = rows is not None or (
        state is not None and state.open_chunk is not None and state.open_chunk.real is not None
    )
    if packed or state is None:
        first = _first_state(weights if start is None else start, queries.shape[0], dtype)
        state = MemoryState(first.weights, first.momentum) if state is None else state
    if not packed:
        reads, end = scan_whole(memory, run, tokens, state, close=close)
    elif backend == "oracle":
        reads, end = scan_rows_apart(memory, run, tokens, state, first, rows)
    else:
        reads, end = scan_packed(memory, run, tokens, state, first, rows)
    return reads.to(queries.dtype), end


def memory_with_room(
    state: MemoryState,
    queries: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    network: str = "residual_norm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    rule: str = "stable",
    forgets: bool = True,
    chunk_size: int = 16,
    shard: WholeMatrices = WHOLE,
) -> MemoryState:
    """The same state in a form whose shapes stay while memory_scan is given one token of every row at a time.

    Args:
        state: What memory_scan returned.
        queries: None of them, (B, 0, H, D), in the tokens' dtype; theta, eta and alpha likewise.
        weights: As for memory_scan, like what follows.
    """
    dtype = state.weights[0].dtype
    net = Network(network == "residual_norm", _cast(norm_weight, dtype), _cast(norm_bias, dtype), shard)
    setting = Rule.of(rule, chunk_size, residual_norm=net.residual_norm, forgets=forgets)
    nothing = Tokens(queries, queries, queries, theta, eta, alpha if isinstance(alpha, Tensor) else list(alpha))
    with fixed_precision(queries):
        return with_room(Memory(net, setting, [w.to(dtype) for w in weights]), state, nothing)


def memory_read(
    queries: Tensor,
    weights: Sequence[Tensor],
    *,
    network: str = "residual_norm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    shard: WholeMatrices = WHOLE,
) -> Tensor:
    """Retrieve without updating, M(q) (paper, equation 15).

    Args:
        queries: (B, T, H, D), any floating dtype.
        weights: State of a memory, L matrices of (B, H, d_in, d_out), or (H, d_in, d_out) for all rows.
        network: As for memory_scan, like norm_weight, norm_bias and shard.

    Returns:
        (B, T, H, D) in the queries' dtype, computed in float32 at least.
    """

    def read(queries: Tensor, weights: list[Tensor], norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
        dtype = torch.promote_types(queries.dtype, torch.float32)
        net = Network(
            network == "residual_norm", _cast(norm_weight, dtype), _cast(norm_bias, dtype), shard.differentiable()
        )
        batch, _, heads, _ = queries.shape
        flat = [w.to(dtype).expand(batch, *w.shape[-3:]).flatten(0, 1) for w in weights]
        x = queries.to(dtype).transpose(1, 2).flatten(0, 1)
        return forward(net, flat, x).unflatten(0, (batch, heads)).transpose(1, 2).to(queries.dtype)

    read_out: Tensor = in_fixed_precision(queries, read, queries, list(weights), norm_weight, norm_bias)
    return read_out


def _naive_chunks(memory: Memory, tokens: Tokens, start: Matrices, *_: object) -> tuple[Tensor, Matrices]:
    """The oracle where another scan may stand; documents come to it apart."""
    return naive_scan(memory, tokens, start)


def _naive_go_on(memory: Memory, tokens: Tokens, state: MemoryState, *, ends: bool) -> tuple[Tensor, MemoryState]:
    """The oracle goes over an open chunk again with every piece."""
    together = tokens if state.open_chunk is None else tokens.behind(state.open_chunk.tokens)
    reads, after = naive_scan(memory, together, state.matrices)
    if ends or together.keys.shape[1] == memory.rule.chunk_size:
        state = MemoryState(after.weights, after.momentum)
    else:
        state = MemoryState(state.weights, state.momentum, OpenChunk(together))
    return reads[:, -tokens.keys.shape[1] :], state


def _chosen(backend: str, memory: Memory, queries: Tensor, *, channelwise: bool) -> str:
    """The backend that "auto" means here."""
    sharded = memory.network.shard.parts > 1
    if backend == "oracle" and sharded:
        raise ValueError("the oracle computes whole memories, not parts of them; use backend 'chunked' with a shard")
    if backend in ("chunked", "oracle"):
        return backend
    if backend == "native" or (backend == "auto" and not queries.is_cuda):
        reason = why_not_native(queries.device, channelwise=channelwise, sharded=sharded)
        if reason and backend == "native":
            raise ValueError(f"backend is 'native'; {reason}")
        return "chunked" if reason else "native"
    reason = why_not_fused(memory, queries, channelwise=channelwise, sharded=sharded)
    if reason and backend == "fused":
        raise ValueError(f"backend is 'fused'; {reason}")
    if reason:
        _say_once(f"memory: on a GPU, but not fused, and slower for it: {reason}")
    return "chunked" if reason else "fused"


@cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _first_state(first: list[Tensor] | MemoryState, batch: int, dtype: torch.dtype) -> Matrices:
    """The state in which a document begins, for every row."""
    if isinstance(first, MemoryState):
        return first.matrices.map(lambda x: x.to(dtype).expand(batch, *x.shape[1:]))
    weights = [w.expand(batch, *w.shape) for w in first]
    return Matrices(weights, [torch.zeros_like(w) for w in weights])


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def scan_whole(
    memory: Memory, backend: Backend, tokens: Tokens, state: MemoryState, *, close: bool
) -> tuple[Tensor, MemoryState]:
    """A piece in which every row goes on with one sequence; with `close` it is the last one before a border."""
    reads, matrices, opened = [], state.matrices, state.open_chunk
    length, begun = tokens.keys.shape[1], 0 if opened is None else opened.tokens.keys.shape[1]
    done = 0
    if begun:
        done = min(length, memory.rule.chunk_size - begun)
        read, state = backend.go_on(memory, tokens.span(0, done), state, ends=close and done == length)
        reads.append(read)
        matrices = state.matrices
    whole = (length - done) // memory.rule.chunk_size * memory.rule.chunk_size
    if whole:
        read, matrices = backend.scan(memory, tokens.span(done, done + whole), matrices, Chunks(memory.rule.chunk_size))
        reads.append(read)
        done += whole
        state = MemoryState(matrices.weights, matrices.momentum)
    if done < length:
        rest, state = tokens.span(done, length), MemoryState(matrices.weights, matrices.momentum)
        if close:
            read, matrices = backend.scan(memory, rest, matrices, Chunks(length - done, closed=False))
            state = MemoryState(matrices.weights, matrices.momentum)
        else:
            read, state = backend.go_on(memory, rest, state, ends=False)
        reads.append(read)
    return torch.cat(reads, 1), state


def scan_packed(
    memory: Memory, backend: Backend, tokens: Tokens, state: MemoryState, first: Matrices, rows: PackedRows | None
) -> tuple[Tensor, MemoryState]:
    """A piece of packed or padded rows; a document begins in `first`."""
    rows, opened = rows or PackedRows(real=_all(tokens)), 0
    start = state.matrices
    if (chunk := state.open_chunk) is not None:
        there = _all(chunk.tokens) if chunk.real is None else chunk.real
        rows, opened, tokens = rows.after(there), there.shape[1], tokens.behind(chunk.tokens)
    packing = rows.packing(memory.rule.chunk_size, tokens.keys.device)
    reads = []
    if packing.closed is not None:
        read, start = backend.scan(memory, tokens.map(packing.closed.lay), start, packing.closed.chunks, first)
        reads.append(read)
    if packing.begins_open:
        begins = packing.restarts[:, None, None, None]
        start = first.joined(start, lambda a, b: torch.where(begins, a, b))
    end = MemoryState(start.weights, start.momentum)
    if packing.open is not None:
        laid = tokens.map(packing.open.lay)
        if packing.open.chunks.counts is None:  # every row holds as many: they go on like whole rows
            read, end = backend.go_on(memory, laid, end, ends=False)
        else:
            read, _ = backend.scan(memory, laid, start, packing.open.chunks)
            end.open_chunk = OpenChunk(laid, real=packing.open.filled)
        reads.append(read)
    if not reads:  # nothing but padding
        return torch.zeros_like(tokens.queries)[:, opened:], state
    return packing.collect(torch.cat(reads, 1))[:, opened:], end


def scan_rows_apart(
    memory: Memory, backend: Backend, tokens: Tokens, state: MemoryState, first: Matrices, rows: PackedRows | None
) -> tuple[Tensor, MemoryState]:
    """What scan_packed has to equal: every document of every row by itself, without what is not real."""
    batch, length = tokens.keys.shape[:2]
    starts = torch.zeros(batch, length, dtype=torch.bool) if rows is None or rows.starts is None else rows.starts
    real = _all(tokens) if rows is None or rows.real is None else rows.real
    reads, ends = torch.zeros_like(tokens.queries), []
    for row in range(batch):
        now = _row(state, row)
        for document in range(int(starts[row].sum()) + 1):
            places = (real[row] & (starts[row].cumsum(0) == document)).nonzero()[:, 0]
            if not len(places):
                continue
            if document:
                begun = first.map(lambda x, row=row: x[row : row + 1])  # type: ignore[misc]
                now = MemoryState(begun.weights, begun.momentum)
            here = tokens.map(lambda x, row=row, places=places: x[row : row + 1, places])  # type: ignore[misc]
            read, now = scan_whole(memory, backend, here, now, close=False)
            reads = reads.index_put((torch.tensor(row), places), read[0])
        ends.append(now)
    return reads, _rows_in_one(ends)


def _all(tokens: Tokens) -> Tensor:
    """A mask for all tokens."""
    return torch.ones(tokens.keys.shape[:2], dtype=torch.bool, device=tokens.keys.device)


def _row(state: MemoryState, row: int) -> MemoryState:
    """One row of a state, its open chunk without empty places."""
    one = state.map(lambda x: x[row : row + 1])
    if one.open_chunk is None:
        return one
    chunk, there = one.open_chunk, one.open_chunk.real
    tokens = chunk.tokens if there is None else chunk.tokens.map(lambda x: x[:, there[0]])
    if not tokens.keys.shape[1]:
        return MemoryState(one.weights, one.momentum)
    return MemoryState(one.weights, one.momentum, OpenChunk(tokens))


def _rows_in_one(rows: list[MemoryState]) -> MemoryState:
    """States of one row each as one state."""

    def stack(matrices: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(column) for column in zip(*matrices, strict=True)]

    weights, momentum = stack([x.weights for x in rows]), stack([x.momentum for x in rows])
    begun = [x.open_chunk.tokens for x in rows if x.open_chunk is not None]
    if not begun:
        return MemoryState(weights, momentum)
    held = [begun[0].span(0, 0) if x.open_chunk is None else x.open_chunk.tokens for x in rows]
    counts = torch.tensor([tokens.keys.shape[1] for tokens in held])
    longest = int(counts.max())

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, longest - x.shape[1], *x.shape[2:])], 1)

    columns = [torch.cat(column) for column in zip(*(x.map(padded).tensors() for x in held), strict=True)]
    left = iter(columns)
    tokens = begun[0].map(lambda _: next(left))
    real = None if bool((counts == longest).all()) else torch.arange(longest) < counts.unsqueeze(1)
    return MemoryState(weights, momentum, OpenChunk(tokens, real=real))


_BACKENDS = {
    "chunked": Backend(chunk_scan, go_on),
    "native": Backend(native_scan, native_go_on),
    "fused": Backend(fused_scan, go_on),
    "oracle": Backend(_naive_chunks, _naive_go_on),
}
BACKENDS = ("auto", *_BACKENDS)


def _check_settings(
    network: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    rule: str,
    chunk_size: int,
    backend: str,
    queries: Tensor,
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    if network not in NETWORKS:
        raise ValueError(f"network is {network!r}; it must be one of {', '.join(NETWORKS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is None:
            continue
        if network == "plain":
            raise ValueError(f"{name} was given, but network 'plain' has no LayerNorm; leave it out")
        if tensor.shape != queries.shape[2:]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (H, D) = {tuple(queries.shape[2:])}")


def _check_shapes(queries: Tensor, keys: Tensor, values: Tensor, weights: list[Tensor], shard: WholeMatrices) -> None:
    if queries.dim() != 4 or not queries.is_floating_point() or not queries.shape[1]:
        raise ValueError(
            f"queries are {queries.dtype} of shape {tuple(queries.shape)}; floating point (B, T >= 1, H, D) is needed"
        )
    if not 1 <= len(weights) <= 4:
        raise ValueError(f"weights holds {len(weights)} matrices; the memory takes 1 to 4")
    heads, width = queries.shape[2:]
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.shape != queries.shape:
            raise ValueError(
                f"{name} have shape {tuple(tensor.shape)}, the queries {tuple(queries.shape)}; make them equal"
            )
    if width % shard.parts:
        raise ValueError(f"the memories are {width} wide; {shard.parts} parts need a multiple of {shard.parts}")
    d_in, depth = width, len(weights)
    for layer, weight in enumerate(weights):
        last = layer == depth - 1
        whole = shard.whole_shape(layer, depth, weight.shape) if weight.dim() == 3 else (0, 0)
        if weight.dim() != 3 or (weight.shape[0], whole[0]) != (heads, d_in) or (last and whole[1] != width):
            end = width if last else "any width"
            raise ValueError(
                f"weights[{layer}] has shape {tuple(weight.shape)}; "
                f"it must be (H, d_in, d_out) = ({heads}, {d_in}, {end})"
                + (", or the process's part of that" if shard.parts > 1 else "")
            )
        d_in = whole[1]


def _check_gates(
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor | Sequence[Tensor],
    queries: Tensor,
    weights: list[Tensor],
    shard: WholeMatrices,
) -> None:
    depth = len(weights)
    wanted = (*queries.shape[:3], depth)
    by_head = {"theta": theta, "eta": eta} | ({"alpha": alpha} if isinstance(alpha, Tensor) else {})
    for name, gate in by_head.items():
        if gate.shape != wanted:
            raise ValueError(f"{name} has shape {tuple(gate.shape)}; it must be (B, T, H, L) = {wanted}")
    if isinstance(alpha, Tensor):
        return
    widths = [shard.whole_shape(layer, depth, weight.shape)[0] for layer, weight in enumerate(weights)]
    shapes = [(*queries.shape[:3], width) for width in widths]
    if [tuple(gate.shape) for gate in alpha] != shapes:
        raise ValueError(
            f"alpha by channel has shapes {[tuple(gate.shape) for gate in alpha]}; "
            f"they must be (B, T, H, d_in) for each matrix, {shapes}"
        )


def _check_rows(rows: PackedRows | None, start: MemoryState | None, queries: Tensor, close: bool) -> None:
    if rows is not None and rows.shape != queries.shape[:2]:
        raise ValueError(f"rows are for {tuple(rows.shape)} tokens; the queries have {tuple(queries.shape[:2])}")
    if start is not None and start.open_chunk is not None:
        raise ValueError("start has an open chunk; a document begins with a chunk of its own, so end it (close=True)")
    if close and rows is not None:
        raise ValueError("close ends the chunk of whole rows; packed rows end theirs with their documents")
