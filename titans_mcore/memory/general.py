"""The chunk form for every setting, differentiated by autograd: exact last matrices, forget rates by channel, and
chunks that are still open.

With a rate for every channel of a matrix' input (1 - alpha) is a diagonal matrix at the left of W, and what the dual
form knows as numbers, G[t, j] and a_t, are vectors over the channels. So coefficients have an axis for channels here,
of length 1 for rates by head. The chunk loop is written for reading; a group of chunks is computed again in the
backward pass, so that like in checkpoint.py the states of only some chunks are kept.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .chunk import Coefficients, coefficients
from .inputs import Matrices, MemoryState, OpenChunk, Tokens, Writes
from .layout import Chunks, group_size
from .network import (
    LOSS_SLOPE,
    WrittenOutNormed,
    answer,
    answer_error,
    back_propagate,
    forward,
    normalise,
    propagate_down,
    up_to_last,
)
from .rule import Memory, last_step_share, lower_step_share, step_mass


def general_scan(
    memory: Memory, tokens: Tokens, start: Matrices, chunks: Chunks, fresh: Matrices | None = None
) -> tuple[Tensor, Matrices]:
    """The same as checkpoint.chunk_scan, for every rule; alpha may come by channel."""
    batch, length, heads = tokens.keys.shape[:3]
    memories = memory.flat(batch)
    state, first = flat(start), None if fresh is None else flat(fresh)
    step, reads = group_size(length // chunks.size), []
    for begin in range(0, length // chunks.size, step):
        part = tokens.span(begin * chunks.size, (begin + step) * chunks.size)
        run = partial(_group, memories, part, state, chunks.group(slice(begin, begin + step)), first)
        read, state = checkpoint(run, use_reentrant=False) if torch.is_grad_enabled() else run()
        reads.append(read)
    return torch.cat(reads, 1), state.map(lambda x: x.unflatten(0, (batch, heads)))


def flat(matrices: Matrices) -> Matrices:
    """Rows and heads in one axis."""
    return matrices.map(lambda x: x.flatten(0, 1))


def split(x: Tensor) -> Tensor:
    """Tokens (B, T, H, F) by memory, (N, T, F)."""
    return x.transpose(1, 2).flatten(0, 1)


def join(x: Tensor, batch: int) -> Tensor:
    """Back from `split`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def go_on(memory: Memory, tokens: Tokens, state: MemoryState, *, ends: bool) -> tuple[Tensor, MemoryState]:
    """Tokens (B, n, ...) that do not reach beyond the open chunk, or begin one; `ends` ends it where it stands.

    What the tokens in front of them write is in the state, so a token costs the same wherever it stands.
    """
    batch, heads = tokens.keys.shape[0], tokens.keys.shape[2]
    start, opened, memories = state.matrices, state.open_chunk, memory.flat(batch)
    here, first = tokens.map(lambda x: split(x.to(start.weights[0].dtype))), flat(start)
    before = None
    if opened is not None:
        assert opened.writes is not None
        before = OpenChunk(opened.tokens.map(split), opened.writes.map(lambda x: x.flatten(0, 1)))
    work = work_out(memories, here, first, earlier=before)
    reads = join(work.read(here.queries, first), batch).to(tokens.queries.dtype)
    together = tokens if opened is None else tokens.behind(opened.tokens)
    full = together.keys.shape[1] == memory.rule.chunk_size
    if not full and not ends:
        writes = work.writes.map(lambda x: x.unflatten(0, (batch, heads)))
        return reads, MemoryState(start.weights, start.momentum, OpenChunk(together, writes))
    after = work.end(first)
    if full:
        after = after.map(lambda x: memory.rule.into_shell(x, memories.network.shard))
    after = after.map(lambda x: x.unflatten(0, (batch, heads)))
    return reads, MemoryState(after.weights, after.momentum)


def _group(
    memories: Memory, tokens: Tokens, state: Matrices, chunks: Chunks, fresh: Matrices | None
) -> tuple[Tensor, Matrices]:
    """Reads and the state after some chunks; states of (N, d_in, d_out)."""
    batch, _, heads = tokens.keys.shape[:3]
    device, rule, shard = tokens.keys.device, memories.rule, memories.network.shard
    by_chunk = tokens.map(chunks.split)
    real, full, restarted = chunks.real(heads, device), chunks.full(heads, device), chunks.restarted(heads, device)
    reads = []
    for c in range(len(by_chunk.keys)):
        if restarted and (begun := restarted[c]) is not None:
            assert fresh is not None
            state = state.joined(fresh, lambda x, first, at=begun: x.index_copy(0, at, first[at]))  # type: ignore[misc]
        work = work_out(memories, by_chunk.map(lambda x, c=c: x[c]), state, None if real is None else real[c])  # type: ignore[misc]
        reads.append(work.read(by_chunk.queries[c], state))
        after = work.end(state)
        if chunks.closed:
            inside = after.map(lambda x: rule.into_shell(x, shard))
            if full is not None:
                where = full[c, :, None, None]
                inside = inside.joined(after, lambda a, b, where=where: torch.where(where, a, b))  # type: ignore[misc]
            after = inside
        state = after
    return chunks.join(torch.stack(reads), batch), state


@dataclass(frozen=True)
class Work:
    """What is known of a chunk's tokens, enough to read between them and to end the chunk; N memories, t tokens.

    Attributes:
        memories: The memories.
        writes: What they write.
        held: Where the rule has made a step smaller, (N, n) for the tokens that were new.
        gates: For each matrix its coefficients, over (N, 1) or by channel (N, d_in).
    """

    memories: Memory
    writes: Writes
    held: Tensor
    gates: list[Coefficients]

    def read(self, queries: Tensor, state: Matrices) -> Tensor:
        """What the queries (N, n, D) of the last n tokens read, each from the memory as its token has left it.

        Args:
            queries: The queries.
            state: What the chunk began with.
        """
        network = self.memories.network
        shard, depth, count = network.shard, len(self.gates), queries.shape[1]
        x = queries
        for layer in range(depth):
            x = shard.into_input(layer, depth, F.gelu(x) if layer else x)
            now = self.gates[layer].last(count)
            own = _attend(x, self.writes.inputs[layer], now.writes) * self._of(layer)
            z = _met(self.memories, layer, x, now, state) - own @ self._delta(layer)
            x = shard.sum_at_output(layer, depth, z)
        return answer(network, queries, normalise(network, x).value)

    def end(self, state: Matrices) -> Matrices:
        """Weights and momentum after the last token, of what the chunk began with."""
        weights, momentum = [], []
        for layer, (w, s) in enumerate(zip(state.weights, state.momentum, strict=True)):
            gates, h, delta, steps = (
                self.gates[layer],
                self.writes.inputs[layer].mT,
                self._delta(layer),
                self._of(layer),
            )
            after = gates.keep[..., -1:] * w + gates.carried[..., -1:] * s
            if self.memories.rule.anchored:
                after = after + (1.0 - gates.keep[..., -1:]) * self.memories.initial[layer]
            weights.append(after - (h * gates.writes[..., -1, :] * steps) @ delta)
            momentum.append(gates.momentum[..., -1:] * s - (h * gates.decay[..., -1, :] * steps) @ delta)
        return Matrices(weights, momentum)

    def _of(self, layer: int) -> Tensor:
        """The steps of one matrix, (N, 1, t), on their way into the process's part."""
        return self.memories.network.shard.spread(self.writes.steps[:, None, :, layer])

    def _delta(self, layer: int) -> Tensor:
        return self.memories.network.shard.into_output(layer, len(self.gates), self.writes.deltas[layer])


def _met(memories: Memory, layer: int, x: Tensor, gates: Coefficients, state: Matrices) -> Tensor:
    """x (N, n, d_in) times what is there of one matrix without the chunk's own writes."""
    z = (x * gates.keep.mT) @ state.weights[layer] + (x * gates.carried.mT) @ state.momentum[layer]
    return z + (x * (1.0 - gates.keep).mT) @ memories.initial[layer] if memories.rule.anchored else z


def _attend(x: Tensor, h: Tensor, coefficient: Tensor) -> Tensor:
    """Sums over channels of x (N, n, d) times h (N, t, d) times a coefficient (N, 1 or d, n, t)."""
    if coefficient.shape[1] == 1:
        return (x @ h.mT) * coefficient.squeeze(1)
    return torch.einsum("ntc,njc,nctj->ntj", x, h, coefficient)


def work_out(
    memories: Memory, tokens: Tokens, state: Matrices, real: Tensor | None = None, earlier: OpenChunk | None = None
) -> Work:
    """Errors of a chunk's tokens, and the steps that the rule takes.

    Args:
        memories: The memories.
        tokens: The tokens, (N, n, ...).
        state: What the chunk began with, (N, d_in, d_out).
        real: Which of the tokens are there, (N, n); None for all.
        earlier: What stands in front of them in the chunk, (N, t, ...).
    """
    network, rule, depth = memories.network, memories.rule, len(memories.initial)
    gates = _gates(memories, tokens if earlier is None else tokens.behind(earlier.tokens), real)
    held = torch.zeros_like(tokens.theta[..., 0], dtype=torch.bool)
    before = None if earlier is None else earlier.writes
    if not rule.exact:
        trace = forward(network, state.weights, tokens.keys)
        if network.residual_norm:
            trace.normed = WrittenOutNormed.of(trace.normed.raw)
        inputs, steps = trace.inputs, tokens.theta
        error = answer_error(network, tokens.keys, tokens.values, trace.normed.value)
        deltas = back_propagate(network, state.weights, trace, error).deltas
    else:
        inputs, hidden = up_to_last(network, state.weights, tokens.keys)
        last, error = _exact(memories, tokens, state, gates[-1], inputs[-1], before)
        deltas = propagate_down(network, state.weights, hidden, error).deltas
        lower = tokens.theta[..., :-1]
        if depth > 1:
            lower = lower * _lower_share(memories, tokens, inputs, deltas, error).unsqueeze(-1)
        steps = torch.cat([lower, last.unsqueeze(-1)], -1)
        held = (steps < tokens.theta).any(-1)
    writes = Writes(inputs, deltas, steps)
    return Work(memories, writes if before is None else writes.behind(before), held, gates)


def _gates(memories: Memory, tokens: Tokens, real: Tensor | None) -> list[Coefficients]:
    """Coefficients of every matrix, over (N, 1) or by channel."""
    shard, depth = memories.network.shard, len(memories.initial)
    there = None if real is None else real.unsqueeze(1)
    if isinstance(tokens.alpha, Tensor):
        alphas = [alpha.unsqueeze(1) for alpha in shard.spread(tokens.alpha).unbind(-1)]
    else:
        alphas = [shard.of_rows(layer, depth, alpha).mT for layer, alpha in enumerate(tokens.alpha)]
    etas = [eta.unsqueeze(1) for eta in shard.spread(tokens.eta).unbind(-1)]
    return [coefficients(eta, alpha, there) for eta, alpha in zip(etas, alphas, strict=True)]


def _exact(
    memories: Memory, tokens: Tokens, state: Matrices, gates: Coefficients, h: Tensor, earlier: Writes | None
) -> tuple[Tensor, Tensor]:
    """Steps of the last matrix (N, n), and errors of the answers at each token's own last matrix (N, n, D).

    e_t = 2 (h_t W_{t-1} - v_t) with W_{t-1} = (what is there) - sum_{j < t} G[t-1, j] h_j e_j^T is a triangular system
    for the errors; the inputs h are those at the chunk's start.
    """
    shard, depth, count = memories.network.shard, len(memories.initial), h.shape[1]
    square = shard.sum_of_inputs(depth - 1, depth, h.square().sum(-1))
    steps = tokens.theta[..., -1] * last_step_share(step_mass(tokens.theta, tokens.eta)[..., -1], square)
    before = gates.before(count)
    met = shard.sum_at_output(depth - 1, depth, _met(memories, depth - 1, h, before, state))
    error = LOSS_SLOPE * (met - tokens.values)
    past, of_all = h, steps
    if earlier is not None:
        past, of_all = torch.cat([earlier.inputs[-1], h], 1), torch.cat([earlier.steps[..., -1], steps], 1)
    kernel = shard.sum_of_inputs(depth - 1, depth, _attend(h, past, before.writes))
    kernel = LOSS_SLOPE * kernel * of_all.unsqueeze(1)
    if earlier is not None:
        old = earlier.deltas[-1].shape[1]
        error = error - kernel[..., :old] @ earlier.deltas[-1]
        kernel = kernel[..., old:]
    return steps, torch.linalg.solve_triangular(kernel, error, upper=False, unitriangular=True)


def _lower_share(memories: Memory, tokens: Tokens, inputs: list[Tensor], deltas: list[Tensor], error: Tensor) -> Tensor:
    """Factor (N, n) on the steps of the matrices below the last."""
    shard, depth = memories.network.shard, len(inputs)
    mass = step_mass(tokens.theta, tokens.eta)
    pull = torch.zeros_like(mass[..., 0])
    for layer in range(depth - 1):
        input_square = shard.sum_of_inputs(layer, depth, inputs[layer].square().sum(-1))
        delta_square = shard.sum_of_outputs(layer, depth, deltas[layer].square().sum(-1))
        pull = pull + mass[..., layer] * input_square * delta_square
    return lower_step_share(error.square().sum(-1) / LOSS_SLOPE**2, pull, memories.rule.chunk_size)
