"""The dual form: a chunk's updates and reads as matrix products, no gradient of a single token is ever built.

Token j's gradient at one matrix is the outer product of the matrix's input h_j and the error delta_j at its output.
With G = A E, steps theta as the rule takes them, and the chunk's first weights W and momentum S, one matrix answers
token t's query x_t with a_t x_t W + f_t x_t S + (1 - a_t) x_t M_0 - sum_{j <= t} G[t, j] theta_j (x_t . h_j) delta_j,
and the weights after the chunk are two products more. M_0 is there where forgetting leads back to it.

Inputs h are those at the chunk's first weights, and errors go down through these. The error at the last matrix' output
is worked out there as well (`literal`), or with the last matrix as the token before has left it (`stable`): its output

    z_t = h_t W_{t-1},   W_{t-1} = a W + f S + (1 - a) M_0 - sum_{j < t} G[t-1, j] theta_j h_j delta_j^T  (a, f: t - 1)

takes the errors of the tokens before. Without LayerNorm delta_t = 2 (z_t - v_t), a triangular system; with it a loop
over tokens that works on vectors only, since the products h_t . h_j are known.

With a forget rate for every channel of a matrix' input (1 - alpha) is a diagonal matrix at the left of W, and what are
numbers above, G[t, j] and a_t, are vectors over the channels. So coefficients have an axis for channels here, of length
1 for rates by head.

Only the states follow one upon the other: a group of chunks is read at once. autograd differentiates all this; it goes
through a group again on its way back, so that the states of only some chunks are kept, about as many as a group has.

Letters: L matrices, N = B H memories, b tokens of a chunk.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .checkpoint import Recomputed
from .inputs import Matrices, MemoryState, OpenChunk, Tokens, Writes
from .layout import Chunks, group_size
from .rule import (
    LOSS_SLOPE,
    Memory,
    Network,
    Normed,
    answer,
    answer_error,
    last_step_share,
    layer_norm,
    lower_step_share,
    normalise,
    per_memory,
    propagate_down,
    removable_loss,
    step_mass,
    up_to_last,
)


@dataclass
class Coefficients:
    """For one weight matrix; the last axis (..., b) are the chunk's tokens, or (..., b, b) its readers t and writers j.

    Attributes:
        keep: a_t, what is left of the chunk's first weights, (..., b).
        carried: f_t, how much of the chunk's first momentum has reached the weights, (..., b).
        momentum: m_t, what is left of the chunk's first momentum, (..., b).
        writes: A E, how much of token j's step has reached the weights at t, (..., b, b), lower triangular.
        decay: E, how much of token j's step is in the momentum at t, (..., b, b), lower triangular.
    """

    keep: Tensor
    carried: Tensor
    momentum: Tensor
    writes: Tensor
    decay: Tensor

    def of_chunk(self, chunk: int, chunks: int) -> "Coefficients":
        """Of one of several chunks that lie one after the other in the first axis."""
        every = (self.keep, self.carried, self.momentum, self.writes, self.decay)
        return Coefficients(*(x.unflatten(0, (chunks, -1))[chunk] for x in every))

    def last(self, count: int) -> "Coefficients":
        """Of the last tokens as readers."""
        keep, carried, momentum = (x[..., -count:] for x in (self.keep, self.carried, self.momentum))
        return Coefficients(keep, carried, momentum, self.writes[..., -count:, :], self.decay[..., -count:, :])

    def before(self, count: int) -> "Coefficients":
        """Of the last tokens as readers of the memory as the token before them has left it."""
        keep, carried, momentum = (
            F.pad(x, (1, -1), value=value) for x, value in ((self.keep, 1.0), (self.carried, 0.0), (self.momentum, 1.0))
        )
        writes, decay = (F.pad(x, (0, 0, 1, -1)) for x in (self.writes, self.decay))
        return Coefficients(keep, carried, momentum, writes, decay).last(count)


def coefficients(eta: Tensor, alpha: Tensor, real: Tensor | None = None) -> Coefficients:
    """Coefficients of chunks whose gates are eta and alpha, both (..., b) in [0, 1].

    Products of decays between two tokens are sums of logs taken over a masked matrix, never a ratio of cumulative
    products (they underflow) and never a difference of cumulative logs (it cancels after a token that clears the
    memory). Where real (..., b) is False there is no token: weights and momentum stay as they are.
    """
    if real is not None:
        eta, alpha = eta.masked_fill(~real, 1.0), alpha.masked_fill(~real, 0.0)
    log_eta, log_keep = _log(eta), _log(1.0 - alpha)
    decay, keep_between = _products_between(log_eta), _products_between(log_keep)
    momentum = log_eta.cumsum(-1).exp()
    # Where there is no token the momentum does not step into the weights once more.
    delivered = keep_between if real is None else keep_between * real.unsqueeze(-2)
    return Coefficients(
        keep=log_keep.cumsum(-1).exp(),
        carried=(delivered @ momentum.unsqueeze(-1)).squeeze(-1),
        momentum=momentum,
        writes=delivered @ decay,
        decay=decay,
    )


def _log(factor: Tensor) -> Tensor:
    return factor.clamp_min(torch.finfo(factor.dtype).tiny).log()


def _products_between(log_factor: Tensor) -> Tensor:
    """exp(sum of the logs of tokens j+1..t) at [..., t, j] for j <= t, else 0."""
    length = log_factor.shape[-1]
    t = torch.arange(length, device=log_factor.device)
    terms = log_factor.unsqueeze(-1).expand(*log_factor.shape, length).masked_fill(t.unsqueeze(-1) <= t, 0.0)
    return terms.cumsum(-2).exp().masked_fill(t.unsqueeze(-1) < t, 0.0)


def chunk_scan(
    memory: Memory, tokens: Tokens, start: Matrices, chunks: Chunks, fresh: Matrices | None = None
) -> tuple[Tensor, Matrices]:
    """Run chunks. The result can be differentiated once.

    Args:
        memory: The memory. With shards, start, M_0 and fresh are the process's parts, and so are the gradients at them;
            all else is equal on all processes.
        tokens: In the slots of the chunks, (B, C b, ...); zeros where a slot is empty.
        start: Weights and momentum before the first token.
        chunks: Where the slots are empty and where documents begin.
        fresh: Weights and momentum in which a document begins; None if none begins.

    Returns:
        What each token reads, (B, C b, H, D), and the weights and momentum after the last one.
    """
    batch, length, heads = tokens.keys.shape[:3]
    state, first = flat(start), None if fresh is None else flat(fresh)
    step, reads = group_size(length // chunks.size), []
    for begin in range(0, length // chunks.size, step):
        part = tokens.span(begin * chunks.size, (begin + step) * chunks.size)
        read, state = _again(memory, part, state, chunks.group(slice(begin, begin + step)), first)
        reads.append(read)
    return torch.cat(reads, 1), state.map(lambda x: x.unflatten(0, (batch, heads)))


def _again(
    memory: Memory, tokens: Tokens, state: Matrices, chunks: Chunks, fresh: Matrices | None
) -> tuple[Tensor, Matrices]:
    """What _group gives; gradients come from going through the group again, and only its arguments are kept."""
    rule, network, depth = memory.rule, memory.network, len(memory.initial)
    residual_norm, shard, by_head = network.residual_norm, network.shard, isinstance(tokens.alpha, Tensor)
    norm = [network.norm_weight, network.norm_bias]
    begun, begins = ([], False) if fresh is None else (fresh.tensors(), True)

    def run(*tensors: Any) -> tuple[Tensor, ...]:
        left = iter(tensors)
        weight, bias, queries, keys, values, theta, eta = islice(left, 7)
        alpha = next(left) if by_head else list(islice(left, depth))
        part = Tokens(queries, keys, values, theta, eta, alpha)
        *matrices, initial = (list(islice(left, depth)) for _ in range(5 if begins else 3))
        starts = [Matrices(*matrices[i : i + 2]) for i in range(0, len(matrices), 2)]
        here = Memory(Network(residual_norm, weight, bias, shard), rule, initial)
        reads, end = _group(here, part, starts[0], chunks, starts[1] if begins else None)
        return reads, *end.tensors()

    tensors = [*norm, *tokens.tensors(), *state.tensors(), *begun, *memory.initial]
    reads, *end = Recomputed.apply(run, *tensors) if torch.is_grad_enabled() else run(*tensors)
    return reads, Matrices(end[:depth], end[depth:])


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
    start, opened = state.matrices, state.open_chunk
    here, first = tokens.map(lambda x: split(x.to(start.weights[0].dtype))), flat(start)
    before = None
    if opened is not None:
        assert opened.writes is not None
        before = OpenChunk(opened.tokens.map(split), opened.writes.map(lambda x: x.flatten(0, 1)))
    work = work_out(memory, here, first, earlier=before)
    reads = join(work.read(here.queries, first), batch).to(tokens.queries.dtype)
    together = tokens if opened is None else tokens.behind(opened.tokens)
    full = together.keys.shape[1] == memory.rule.chunk_size
    if not full and not ends:
        writes = work.writes.map(lambda x: x.unflatten(0, (batch, heads)))
        return reads, MemoryState(start.weights, start.momentum, OpenChunk(together, writes))
    after = work.end(first)
    if full:
        after = after.map(lambda x: memory.rule.into_shell(x, memory.network.shard))
    after = after.map(lambda x: x.unflatten(0, (batch, heads)))
    return reads, MemoryState(after.weights, after.momentum)


def _group(
    memory: Memory, tokens: Tokens, state: Matrices, chunks: Chunks, fresh: Matrices | None
) -> tuple[Tensor, Matrices]:
    """Reads and the state after some chunks; states of (N, d_in, d_out)."""
    batch, _, heads = tokens.keys.shape[:3]
    device, rule, shard = tokens.keys.device, memory.rule, memory.network.shard
    by_chunk = tokens.map(chunks.split)
    real, full, restarted = chunks.real(heads, device), chunks.full(heads, device), chunks.restarted(heads, device)
    every = by_chunk.map(lambda x: x.flatten(0, 1))
    gates = gates_of_chunk(memory, every, None if real is None else real.flatten(0, 1))
    count, states, works = len(by_chunk.keys), [], []
    for c in range(count):
        if restarted and (begun := restarted[c]) is not None:
            assert fresh is not None
            state = state.joined(fresh, lambda x, first, at=begun: x.index_copy(0, at, first[at]))  # type: ignore[misc]
        here = by_chunk.map(lambda x, c=c: x[c])  # type: ignore[misc]
        work = work_out(memory, here, state, [gate.of_chunk(c, count) for gate in gates])
        states.append(state)
        works.append(work.writes)
        after = work.end(state)
        if chunks.closed:
            inside = after.map(lambda x: rule.into_shell(x, shard))
            if full is not None:
                where = full[c, :, None, None]
                inside = inside.joined(after, lambda a, b, where=where: torch.where(where, a, b))  # type: ignore[misc]
            after = inside
        state = after
    together = Work(memory, Writes.one_after_another(works), gates)
    reads = together.read(every.queries, Matrices.one_after_another(states))
    return chunks.join(reads.unflatten(0, (count, -1)), batch), state


@dataclass(frozen=True)
class Work:
    """What is known of a chunk's tokens, enough to read between them and to end the chunk; N memories, t tokens.

    Attributes:
        memory: The memory.
        writes: What they write.
        gates: For each matrix its coefficients, over (N, 1) or by channel (N, d_in).
    """

    memory: Memory
    writes: Writes
    gates: list[Coefficients]

    def read(self, queries: Tensor, state: Matrices) -> Tensor:
        """What the queries (N, n, D) of the last n tokens read, each from the memory as its token has left it.

        Args:
            queries: The queries.
            state: What the chunk began with.
        """
        network = self.memory.network
        shard, depth, count = network.shard, len(self.gates), queries.shape[1]
        x = queries
        for layer in range(depth):
            x = shard.into_input(layer, depth, F.gelu(x) if layer else x)
            now = self.gates[layer].last(count)
            own = _attend(x, self.writes.inputs[layer], now.writes) * self._of(layer)
            z = _met(self.memory, layer, x, now, state) - own @ self._delta(layer)
            x = shard.sum_at_output(layer, depth, z)
        return answer(network, queries, normalise(network, x))

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
            if self.memory.rule.anchored:
                anchor = self.memory.initial[layer]
                after = after + (1.0 - gates.keep[..., -1:]) * anchor.repeat(len(w) // len(anchor), 1, 1)
            weights.append(after - (h * gates.writes[..., -1, :] * steps) @ delta)
            momentum.append(gates.momentum[..., -1:] * s - (h * gates.decay[..., -1, :] * steps) @ delta)
        return Matrices(weights, momentum)

    def _of(self, layer: int) -> Tensor:
        """The steps of one matrix, (N, 1, t), on their way into the process's part."""
        return self.memory.network.shard.spread(self.writes.steps[:, None, :, layer])

    def _delta(self, layer: int) -> Tensor:
        return self.memory.network.shard.into_output(layer, len(self.gates), self.writes.deltas[layer])


def _met(memory: Memory, layer: int, x: Tensor, gates: Coefficients, state: Matrices) -> Tensor:
    """x (N, n, d_in) times what is there of one matrix without the chunk's own writes."""
    z = (x * gates.keep.mT) @ state.weights[layer] + (x * gates.carried.mT) @ state.momentum[layer]
    if not memory.rule.anchored:
        return z
    anchor = memory.initial[layer]  # one for all rows: it is not copied for each of them
    led = (x * (1.0 - gates.keep).mT).unflatten(0, (-1, len(anchor)))
    return z + torch.einsum("khni,hio->khno", led, anchor).flatten(0, 1)


def _attend(x: Tensor, h: Tensor, coefficient: Tensor) -> Tensor:
    """Sums over channels of x (N, n, d) times h (N, t, d) times a coefficient (N, 1 or d, n, t)."""
    if coefficient.shape[1] == 1:
        return (x @ h.mT) * coefficient.squeeze(1)
    return torch.einsum("ntc,njc,nctj->ntj", x, h, coefficient)


def work_out(
    memory: Memory,
    tokens: Tokens,
    state: Matrices,
    gates: list[Coefficients] | None = None,
    earlier: OpenChunk | None = None,
) -> Work:
    """Errors of a chunk's tokens, and the steps that the rule takes.

    Args:
        memory: The memory.
        tokens: The tokens, (N, n, ...).
        state: What the chunk began with, (N, d_in, d_out).
        gates: The coefficients of all matrices where they are known.
        earlier: What stands in front of them in the chunk, (N, t, ...).
    """
    network, rule = memory.network, memory.rule
    gates = gates or gates_of_chunk(memory, tokens if earlier is None else tokens.behind(earlier.tokens))
    before = None if earlier is None else earlier.writes
    inputs, hidden = up_to_last(network, state.weights, tokens.keys)
    steps = tokens.theta
    if rule.holds_last:
        steps = torch.cat([steps[..., :-1], _held_last(memory, tokens, inputs[-1]).unsqueeze(-1)], -1)
    met, kernel = _met_by_keys(memory, inputs[-1], steps[..., -1], gates[-1], state, before)
    delta, normed, aim = _errors(network, tokens, met, kernel)
    deltas = propagate_down(network, state.weights, hidden, delta)
    if rule.exact and len(inputs) > 1:
        share = _lower_share(memory, tokens, inputs, deltas, _removable(network, delta, normed, aim)).unsqueeze(-1)
        steps = torch.cat([steps[..., :-1] * share, steps[..., -1:]], -1)
    writes = Writes(inputs, deltas, steps)
    return Work(memory, writes if before is None else writes.behind(before), gates)


def gates_of_chunk(memory: Memory, tokens: Tokens, real: Tensor | None = None) -> list[Coefficients]:
    """Coefficients of every matrix, over (N, 1) or by channel; real (N, b) says which tokens are there, None all."""
    shard, depth = memory.network.shard, len(memory.initial)
    there = None if real is None else real.unsqueeze(1)
    if isinstance(tokens.alpha, Tensor):
        alphas = [alpha.unsqueeze(1) for alpha in shard.spread(tokens.alpha).unbind(-1)]
    else:
        alphas = [shard.of_rows(layer, depth, alpha).mT for layer, alpha in enumerate(tokens.alpha)]
    etas = [eta.unsqueeze(1) for eta in shard.spread(tokens.eta).unbind(-1)]
    return [coefficients(eta, alpha, there) for eta, alpha in zip(etas, alphas, strict=True)]


def _met_by_keys(
    memory: Memory, h: Tensor, steps: Tensor, gates: Coefficients, state: Matrices, earlier: Writes | None
) -> tuple[Tensor, Tensor | None]:
    """What the keys' inputs h (N, n, d_in) of the last matrix meet in it, (N, n, D), without their own writes.

    Also how far those reach: K (N, n, n), below its diagonal, so that z_t is what was met less the sum over j of
    K[t, j] delta_j; None where all errors are those at the chunk's start.
    """
    shard, depth, count = memory.network.shard, len(memory.initial), h.shape[1]
    if not memory.rule.exact:
        return shard.sum_at_output(depth - 1, depth, h @ state.weights[-1]), None
    before = gates.before(count)
    past, of_all = h, steps
    if earlier is not None:
        past, of_all = torch.cat([earlier.inputs[-1], h], 1), torch.cat([earlier.steps[..., -1], steps], 1)
    terms = torch.cat([_met(memory, depth - 1, h, before, state), _attend(h, past, before.writes)], -1)
    met, kernel = shard.sum_at_output(depth - 1, depth, terms).split([state.weights[-1].shape[-1], past.shape[1]], -1)
    kernel = kernel * of_all.unsqueeze(1)
    if earlier is not None:
        old = earlier.deltas[-1].shape[1]
        met, kernel = met - kernel[..., :old] @ earlier.deltas[-1], kernel[..., old:]
    return met, kernel


def _errors(network: Network, tokens: Tokens, met: Tensor, kernel: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Errors at the last matrix' output, (N, n, D), for what _met_by_keys gives.

    Also, with LayerNorm, this output normalised, and aim: what of the gradient at it does not depend on the memory.
    """
    if not network.residual_norm:
        error = LOSS_SLOPE * (met - tokens.values)
        if kernel is not None:
            error = torch.linalg.solve_triangular(LOSS_SLOPE * kernel, error, upper=False, unitriangular=True)
        return error, error, error
    scale = met.new_ones(1) if network.norm_weight is None else per_memory(network.norm_weight, met)
    aim = scale * answer_error(network, tokens.keys, tokens.values, torch.zeros_like(met))
    slope = (LOSS_SLOPE * scale.square()).expand(len(met), 1, met.shape[-1])
    return *_NormErrors.apply(met, kernel, aim, slope), aim


def _removable(network: Network, delta: Tensor, normed: Tensor, aim: Tensor) -> Tensor:
    """What can be removed (N, n) of tokens' losses: see removable_loss. Without LayerNorm it is all of them."""
    if not network.residual_norm:
        return (delta / LOSS_SLOPE).square().sum(-1)
    return removable_loss(normed, aim - aim.mean(-1, keepdim=True))


class _NormErrors(torch.autograd.Function):
    """delta_t = LN'(s_t), s_t = aim_t + slope * n_t, n_t the LayerNorm of z_t = met_t - sum_{j < t} K[t, j] delta_j.

    Gives delta and n. LN' is LayerNorm's derivative at z_t, r (s - mean s - n mean(s n)), which is its own transpose.
    It depends on z_t through n and the inverse deviation r as well: with g the gradient at delta_t, these parts come to
    -r (mean(s n) LN'(g) + mean(g n) delta + mean(g delta) n).
    """

    @staticmethod
    def forward(ctx: Any, met: Tensor, kernel: Tensor | None, aim: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        if kernel is None:
            normed = layer_norm(met)
            delta = normed.gradient(torch.addcmul(aim, slope, normed.value))
            ctx.save_for_backward(aim, slope, delta, *normed)
            return delta, normed.value
        delta, found = torch.empty_like(met), list[Normed]()
        for t in range(met.shape[1]):
            z = met[:, t : t + 1]
            if t:
                z = torch.baddbmm(z, kernel[:, t : t + 1, :t], delta[:, :t], alpha=-1)
            normed = layer_norm(z)
            delta[:, t : t + 1] = normed.gradient(torch.addcmul(aim[:, t : t + 1], slope, normed.value))
            found.append(normed)
        ctx.save_for_backward(aim, slope, delta, *(x for normed in found for x in normed), kernel)
        return delta, torch.cat([normed.value for normed in found], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_delta: Tensor, of_normed: Tensor) -> tuple[Tensor | None, ...]:
        aim, slope, delta, *rest = ctx.saved_tensors
        if len(rest) == len(Normed._fields):
            normed = Normed(*rest)
            of_z, of_s = _through_errors(normed, of_delta, of_normed, aim, slope, delta)
            return of_z, None, of_s, (of_s * normed.value).sum(1, keepdim=True)
        *found, kernel = rest
        of_delta, of_slope = of_delta.clone(), torch.zeros_like(slope)
        of_z, of_s = torch.empty_like(aim), torch.empty_like(aim)
        for t in reversed(range(aim.shape[1])):
            at, normed = slice(t, t + 1), Normed(*found[4 * t : 4 * t + 4])
            of_z[:, at], of_s[:, at] = _through_errors(
                normed, of_delta[:, at], of_normed[:, at], aim[:, at], slope, delta[:, at]
            )
            of_slope = of_slope + of_s[:, at] * normed.value
            if t:
                of_delta[:, :t].baddbmm_(kernel[:, at, :t].mT, of_z[:, at], alpha=-1)
        return of_z, torch.bmm(of_z, delta.mT).tril_(-1).neg_(), of_s, of_slope


def _through_errors(
    normed: Normed, of_delta: Tensor, of_normed: Tensor, aim: Tensor, slope: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients at z and at s of _NormErrors, of some tokens."""
    of_s = normed.gradient(of_delta)
    of_z = normed.gradient(torch.addcmul(of_normed, slope, of_s))
    share = -normed.inverse_std / delta.shape[-1]
    for left, right, along in (
        (torch.addcmul(aim, slope, normed.value), normed.value, of_s),
        (of_delta, normed.value, delta),
        (of_delta, delta, normed.value),
    ):
        of_z.addcmul_(share * (left * right).sum(-1, keepdim=True), along)
    return of_z, of_s


def _held_last(memory: Memory, tokens: Tokens, h: Tensor) -> Tensor:
    """Steps of the last matrix (N, n) as the rule takes them."""
    shard, depth = memory.network.shard, len(memory.initial)
    square = shard.sum_of_inputs(depth - 1, depth, h.square().sum(-1))
    return tokens.theta[..., -1] * last_step_share(step_mass(tokens.theta, tokens.eta)[..., -1], square)


def _lower_share(memory: Memory, tokens: Tokens, inputs: list[Tensor], deltas: list[Tensor], loss: Tensor) -> Tensor:
    """Factor (N, n) on the steps of the matrices below the last, for losses |M(k) - v|^2 (N, n)."""
    shard, depth = memory.network.shard, len(inputs)
    mass = step_mass(tokens.theta, tokens.eta)
    pull = torch.zeros_like(mass[..., 0])
    for layer in range(depth - 1):
        input_square = shard.sum_of_inputs(layer, depth, inputs[layer].square().sum(-1))
        delta_square = shard.sum_of_outputs(layer, depth, deltas[layer].square().sum(-1))
        pull = pull + mass[..., layer] * input_square * delta_square
    return lower_step_share(loss, pull, memory.rule.lower_steps(depth))
