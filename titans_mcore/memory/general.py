"""The chunk form for every setting, differentiated by autograd: exact last matrices, forget rates by channel, and
chunks that are still open.

With a rate for every channel of a matrix' input (1 - alpha) is a diagonal matrix at the left of W, and what the dual
form knows as numbers, G[t, j] and a_t, are vectors over the channels. So coefficients have an axis for channels here,
of length 1 for rates by head. The chunk loop is written for reading; a group of chunks is computed again in the
backward pass, so that like in checkpoint.py the states of only some chunks are kept.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .chunk import Coefficients, coefficients
from .inputs import Matrices, OpenChunk, Tokens
from .layout import Chunks, group_size
from .network import (
    LOSS_SLOPE,
    Network,
    Trace,
    WrittenOutNormed,
    answer,
    answer_error,
    back_propagate,
    forward,
    normalise,
    up_to_last,
)
from .rule import Rule, last_step_share, lower_step_share, step_mass


def general_scan(
    network: Network,
    rule: Rule,
    tokens: Tokens,
    start: Matrices,
    initial: list[Tensor],
    chunks: Chunks,
    fresh: Matrices | None,
) -> tuple[Tensor, Matrices]:
    """The same as checkpoint.chunk_scan; alpha may come by channel."""
    batch, length, heads = tokens.keys.shape[:3]
    memories = Memories.of(network, rule, initial, batch)
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


@dataclass(frozen=True)
class Memories:
    """N = B H memories: what does not change along a sequence.

    Attributes:
        network: With scale and shift for N memories, its shard differentiable.
        rule: The rule.
        anchors: M_0, L of (N, d_in, d_out).
    """

    network: Network
    rule: Rule
    anchors: list[Tensor]

    @classmethod
    def of(cls, network: Network, rule: Rule, initial: list[Tensor], batch: int) -> "Memories":
        """For B rows, from the network and M_0 of H heads."""
        rows = replace(network.for_memories(batch), shard=network.shard.differentiable())
        return cls(rows, rule, [x.expand(batch, *x.shape).flatten(0, 1) for x in initial])

    def met(self, layer: int, x: Tensor, gates: "Coefficients", state: Matrices) -> Tensor:
        """x (N, n, d_in) times what is there of one matrix without the chunk's own writes."""
        z = (x * gates.keep.mT) @ state.weights[layer] + (x * gates.carried.mT) @ state.momentum[layer]
        return z + (x * (1.0 - gates.keep).mT) @ self.anchors[layer] if self.rule.anchored else z


def _group(
    memories: Memories, tokens: Tokens, state: Matrices, chunks: Chunks, fresh: Matrices | None
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
        inputs: For each matrix the inputs of the keys' pass, (N, t, d_in).
        deltas: For each matrix the errors at its output, (N, t, d_out).
        steps: theta as the rule takes it, (N, t, L).
        held: Where the rule has made a step smaller, (N, n) for the tokens that were new.
        gates: For each matrix its coefficients, over (N, 1) or by channel (N, d_in).
    """

    memories: Memories
    inputs: list[Tensor]
    deltas: list[Tensor]
    steps: Tensor
    held: Tensor
    gates: list[Coefficients]

    def read(self, queries: Tensor, state: Matrices) -> Tensor:
        """What the queries (N, n, D) of the last n tokens read, each from the memory as its token has left it.

        Args:
            queries: The queries.
            state: What the chunk began with.
        """
        network = self.memories.network
        shard, depth, count = network.shard, len(self.inputs), queries.shape[1]
        x = queries
        for layer in range(depth):
            x = shard.into_input(layer, depth, F.gelu(x) if layer else x)
            now = self.gates[layer].last(count)
            own = _attend(x, self.inputs[layer], now.writes) * self._of(layer)
            z = self.memories.met(layer, x, now, state) - own @ self._delta(layer)
            x = shard.sum_at_output(layer, depth, z)
        return answer(network, queries, normalise(network, x).value)

    def end(self, state: Matrices) -> Matrices:
        """Weights and momentum after the last token, of what the chunk began with."""
        weights, momentum = [], []
        for layer, (w, s) in enumerate(zip(state.weights, state.momentum, strict=True)):
            gates, h, delta, steps = self.gates[layer], self.inputs[layer].mT, self._delta(layer), self._of(layer)
            after = gates.keep[..., -1:] * w + gates.carried[..., -1:] * s
            if self.memories.rule.anchored:
                after = after + (1.0 - gates.keep[..., -1:]) * self.memories.anchors[layer]
            weights.append(after - (h * gates.writes[..., -1, :] * steps) @ delta)
            momentum.append(gates.momentum[..., -1:] * s - (h * gates.decay[..., -1, :] * steps) @ delta)
        return Matrices(weights, momentum)

    def _of(self, layer: int) -> Tensor:
        """The steps of one matrix, (N, 1, t), on their way into the process's part."""
        return self.memories.network.shard.spread(self.steps[:, None, :, layer])

    def _delta(self, layer: int) -> Tensor:
        return self.memories.network.shard.into_output(layer, len(self.inputs), self.deltas[layer])


def _attend(x: Tensor, h: Tensor, coefficient: Tensor) -> Tensor:
    """Sums over channels of x (N, n, d) times h (N, t, d) times a coefficient (N, 1 or d, n, t)."""
    if coefficient.shape[1] == 1:
        return (x @ h.mT) * coefficient.squeeze(1)
    return torch.einsum("ntc,njc,nctj->ntj", x, h, coefficient)


def work_out(
    memories: Memories, tokens: Tokens, state: Matrices, real: Tensor | None = None, earlier: OpenChunk | None = None
) -> Work:
    """Errors of a chunk's tokens, and the steps that the rule takes.

    Args:
        memories: The memories.
        tokens: The tokens, (N, n, ...).
        state: What the chunk began with, (N, d_in, d_out).
        real: Which of the tokens are there, (N, n); None for all.
        earlier: What stands in front of them in the chunk, (N, t, ...).
    """
    network, rule, depth = memories.network, memories.rule, len(memories.anchors)
    gates = _gates(memories, tokens if earlier is None else tokens.behind(earlier.tokens), real)
    held = torch.zeros_like(tokens.theta[..., 0], dtype=torch.bool)
    if not rule.exact:
        trace = forward(network, state.weights, tokens.keys)
        if network.residual_norm:
            trace.normed = WrittenOutNormed.of(trace.normed.raw)
        steps, error = tokens.theta, answer_error(network, tokens.keys, tokens.values, trace.normed.value)
        errors = back_propagate(network, state.weights, trace, error)
    else:
        inputs, hidden = up_to_last(network, state.weights, tokens.keys)
        last, error = _exact(memories, tokens, state, gates[-1], inputs[-1], earlier)
        trace = Trace(inputs, hidden, normalise(network, tokens.values + error / LOSS_SLOPE))
        errors = back_propagate(network, state.weights, trace, error)
        lower = tokens.theta[..., :-1]
        if depth > 1:
            lower = lower * _lower_share(memories, tokens, trace.inputs, errors.deltas, error).unsqueeze(-1)
        steps = torch.cat([lower, last.unsqueeze(-1)], -1)
        held = (steps < tokens.theta).any(-1)
    inputs, deltas = trace.inputs, errors.deltas
    if earlier is not None:
        assert earlier.inputs is not None
        assert earlier.deltas is not None
        assert earlier.steps is not None
        inputs = [torch.cat(both, 1) for both in zip(earlier.inputs, inputs, strict=True)]
        deltas = [torch.cat(both, 1) for both in zip(earlier.deltas, deltas, strict=True)]
        steps = torch.cat([earlier.steps, steps], 1)
    return Work(memories, inputs, deltas, steps, held, gates)


def _gates(memories: Memories, tokens: Tokens, real: Tensor | None) -> list[Coefficients]:
    """Coefficients of every matrix, over (N, 1) or by channel."""
    shard, depth = memories.network.shard, len(memories.anchors)
    there = None if real is None else real.unsqueeze(1)
    if isinstance(tokens.alpha, Tensor):
        alphas = [alpha.unsqueeze(1) for alpha in shard.spread(tokens.alpha).unbind(-1)]
    else:
        alphas = [shard.of_rows(layer, depth, alpha).mT for layer, alpha in enumerate(tokens.alpha)]
    etas = [eta.unsqueeze(1) for eta in shard.spread(tokens.eta).unbind(-1)]
    return [coefficients(eta, alpha, there) for eta, alpha in zip(etas, alphas, strict=True)]


def _exact(
    memories: Memories, tokens: Tokens, state: Matrices, gates: Coefficients, h: Tensor, earlier: OpenChunk | None
) -> tuple[Tensor, Tensor]:
    """Steps of the last matrix (N, n), and errors of the answers at each token's own last matrix (N, n, D).

    e_t = 2 (h_t W_{t-1} - v_t) with W_{t-1} = (what is there) - sum_{j < t} G[t-1, j] h_j e_j^T is a triangular system
    for the errors; the inputs h are those at the chunk's start.
    """
    network, depth = memories.network, len(memories.anchors)
    shard, count = network.shard, h.shape[1]
    square = shard.sum_of_inputs(depth - 1, depth, h.square().sum(-1))
    steps = tokens.theta[..., -1] * last_step_share(step_mass(tokens.theta, tokens.eta)[..., -1], square)
    before = gates.before(count)
    met = shard.sum_at_output(depth - 1, depth, memories.met(depth - 1, h, before, state))
    error = LOSS_SLOPE * (met - tokens.values)
    past, of_all = h, steps
    if earlier is not None:
        assert earlier.inputs is not None
        assert earlier.deltas is not None
        assert earlier.steps is not None
        past, of_all = torch.cat([earlier.inputs[-1], h], 1), torch.cat([earlier.steps[..., -1], steps], 1)
    kernel = shard.sum_of_inputs(depth - 1, depth, _attend(h, past, before.writes))
    kernel = LOSS_SLOPE * kernel * of_all.unsqueeze(1)
    if earlier is not None and earlier.deltas is not None:
        old = earlier.deltas[-1].shape[1]
        error = error - kernel[..., :old] @ earlier.deltas[-1]
        kernel = kernel[..., old:]
    return steps, torch.linalg.solve_triangular(kernel, error, upper=False, unitriangular=True)


def _lower_share(
    memories: Memories, tokens: Tokens, inputs: list[Tensor], deltas: list[Tensor], error: Tensor
) -> Tensor:
    """Factor (N, n) on the steps of the matrices below the last."""
    shard, depth = memories.network.shard, len(inputs)
    mass = step_mass(tokens.theta, tokens.eta)
    pull = torch.zeros_like(mass[..., 0])
    for layer in range(depth - 1):
        input_square = shard.sum_of_inputs(layer, depth, inputs[layer].square().sum(-1))
        delta_square = shard.sum_of_outputs(layer, depth, deltas[layer].square().sum(-1))
        pull = pull + mass[..., layer] * input_square * delta_square
    return lower_step_share(error.square().sum(-1) / LOSS_SLOPE**2, pull, memories.rule.chunk_size)
