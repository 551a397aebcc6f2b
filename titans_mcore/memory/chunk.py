"""The dual form: a chunk's updates and reads as matrix products, no gradient of a single token is ever built.

Token j's gradient at one matrix is the outer product of the matrix's input h_j and the error delta_j at its output,
both at the chunk's first weights. With G = A E diag(theta) the answer of one matrix to token t's query x_t is
a_t x_t W + f_t x_t S + (1 - a_t) x_t M_0 - sum_{j <= t} G[t, j] (x_t . h_j) delta_j, and the weights after the chunk
are two products more. The term of M_0 is there where forgetting leads back to it.

Only the states follow one upon the other. So chunks are worked off in groups: `pass_keys` goes through a group's states
one by one, and all else is done for the chunks of the group at once.

Letters: L matrices, N = B H memories, g chunks of a group, b tokens of a chunk. The state of a matrix is
(N, 2 d_in, d_out), its weights above its momentum. None of this is made for autograd but the coefficients;
chunk_backward.py goes back through it by hand.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .network import LOSS_SLOPE, Errors, Network, Normed, Trace, back_propagate, forward, normalise
from .rule import Rule


@dataclass
class Coefficients:
    """For one weight matrix; leading axes (..., b) are the chunk's tokens, t the reader and j the writer.

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


class TokenGroup(NamedTuple):
    """Queries, keys and values of a group's chunks, each (g, N, b, D)."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class Gates(NamedTuple):
    """What a group's gates come to.

    Attributes:
        read: What a read takes from weights and momentum at the chunk's start, (L, g, N, b, 2).
        end: What weights and momentum after the chunk keep of weights and momentum before it, (L, g, N, 2, 2).
        writes: G, how much of token j's step has reached the weights at t, (L, g, N, b, b).
        write: How much of a token's step is in weights and momentum after the chunk, (L, g, N, b, 2).
    """

    read: Tensor
    end: Tensor
    writes: Tensor
    write: Tensor


def gates_of(theta: Tensor, eta: Tensor, alpha: Tensor, real: Tensor | None = None) -> Gates:
    """From gates (L, g, N, b); the one part of the dual form that autograd differentiates.

    Where real (g, N, b) is False there is no token, and theta must be 0.
    """
    part = coefficients(eta, alpha, real)
    writes = part.writes * theta.unsqueeze(-2)
    nothing = torch.zeros_like(part.keep[..., -1])
    end = torch.stack([part.keep[..., -1], part.carried[..., -1], nothing, part.momentum[..., -1]], -1)
    return Gates(
        torch.stack([part.keep, part.carried], -1),
        end.unflatten(-1, (2, 2)),
        writes,
        torch.stack([writes[..., -1, :], part.decay[..., -1, :] * theta], -1),
    )


class Borders(NamedTuple):
    """What happens between a group's chunks.

    Attributes:
        closed: Whether a chunk that is full has ended; after one that is still open there is no state shell.
        full: Which chunks are, (g, N); None if all are.
        restarted: For each chunk the memories (indices) that begin a document in it, None for none; empty if no chunk
            has any.
        fresh: L states in which a document begins, (N, 2 d_in, d_out); empty if none does.
        anchors: M_0, L of (H, d_in, d_out); empty where forgetting does not lead to it.
    """

    closed: bool
    full: Tensor | None
    restarted: list[Tensor | None]
    fresh: list[Tensor]
    anchors: list[Tensor]

    def restarts(self, chunk: int) -> Tensor | None:
        """The memories that begin a document in a chunk; None for none."""
        return self.restarted[chunk] if self.restarted else None


class Path:
    """The states of one matrix along a group, in the shapes that the loop needs; views of two tensors.

    Attributes:
        before: The states that the chunks began with, (g, N, 2 d_in, d_out).
        states: Those and the state after the last chunk, g + 1 of (N, 2 d_in, d_out).
        weights: Their weights, (N, d_in, d_out).
        pairs: Weights and momentum flat, (N, 2, d_in * d_out).
    """

    def __init__(self, start: Tensor, chunks: int, restarts: bool) -> None:
        if chunks == 1 and not restarts:
            self.before = start.unsqueeze(0)
        else:
            self.before = start.new_empty(chunks, *start.shape)
            self.before[0] = start
        self.states = [*self.before.unbind(0), torch.empty_like(start)]
        self.weights = [state[:, : start.shape[1] // 2] for state in self.states]
        self.pairs = [state.view(start.shape[0], 2, -1) for state in self.states]


@dataclass
class KeysPassed:
    """A group after its states are known; what every chunk has alike is (g N, ...), chunk after chunk.

    Attributes:
        paths: The states, by matrix.
        trace: Forward pass of the keys.
        error: Error of its answer, (g N, b, D).
        errors: Its back-propagation.
        mean_squares: Of weights and momentum after each chunk, before they came into the shell, (g, L, N, 2); None
            where the shell was left out.
    """

    paths: list[Path]
    trace: Trace
    error: Tensor
    errors: Errors
    mean_squares: Tensor | None


def leaves_shell(network: Network, rule: Rule, passed: KeysPassed) -> bool:
    """Whether a state that a pass without the shell has made is outside of it.

    To look at all chunks at once is much cheaper than at each in turn, and most groups meet none. Nothing is missed: up
    to the first chunk at which the shell acts, the pass without it is the true one.
    """
    squares = torch.stack(
        [
            torch.cat([_mean_square(_matrices(x)) for x in (path.before[1:], path.states[-1].unsqueeze(0))])
            for path in passed.paths
        ]
    )
    # Past that chunk anything may have come, also NaN, which a maximum would let through.
    squares = network.shard.mean(squares)
    return bool((rule.beyond(squares) | squares.isnan()).any())


def _matrices(states: Tensor) -> Tensor:
    """Weights and momentum flat, (..., 2, d_in * d_out), in states (..., 2 d_in, d_out)."""
    return states.unflatten(-2, (2, -1)).flatten(-2)


def pass_keys(
    network: Network, rule: Rule, tokens: TokenGroup, gates: Gates, start: list[Tensor], borders: Borders, shell: bool
) -> KeysPassed:
    """Go through a group's chunks, each from the state that the one before has left.

    Args:
        network: With scale and shift for N memories.
        rule: The rule.
        tokens: The group's.
        gates: The group's.
        start: L states before the first chunk.
        borders: What happens between the chunks.
        shell: Whether the state shell is worked out.
    """
    chunks = len(tokens.keys)
    paths = [Path(state, chunks, bool(borders.restarted)) for state in start]
    write, end = (_by_matrix_and_chunk(x) for x in (gates.write.unsqueeze(-1), gates.end))
    leads = _by_matrix_and_chunk(1.0 - gates.end[..., :1, :1]) if borders.anchors else []
    steps: list[tuple[Trace, Tensor, Errors]] = []
    mean_squares = []
    aims, scale = _aims(network, tokens)
    for c, (keys, aim) in enumerate(zip(tokens.keys.unbind(0), aims.unbind(0), strict=True)):
        if (memories := borders.restarts(c)) is not None:
            for path, fresh in zip(paths, borders.fresh, strict=True):
                path.states[c][memories] = fresh[memories]
        weights = [path.weights[c] for path in paths]
        trace = forward(network, weights, keys)
        error = torch.addcmul(aim, trace.normed.value, scale)
        errors = back_propagate(network, weights, trace, error)
        steps.append((trace, error, errors))
        for layer, (path, h, delta) in enumerate(zip(paths, trace.inputs, errors.deltas, strict=True)):
            after = path.states[c + 1]
            torch.bmm(end[layer][c], path.pairs[c], out=path.pairs[c + 1])
            if leads:
                anchor = borders.anchors[layer]
                by_head = (-1, len(anchor))
                path.weights[c + 1].unflatten(0, by_head).addcmul_(leads[layer][c].unflatten(0, by_head), anchor)
            after.baddbmm_((h.unsqueeze(2) * write[layer][c]).flatten(2).transpose(1, 2), delta, alpha=-1)
        if shell and borders.closed:
            squares = network.shard.mean(torch.stack([_mean_square(path.pairs[c + 1]) for path in paths]))
            mean_squares.append(squares)
            beyond = rule.beyond(squares)
            if borders.full is not None:
                beyond &= borders.full[c].unsqueeze(-1)
            if may_hold(beyond):
                factors = torch.where(beyond, rule.rms_limit * squares.rsqrt(), 1.0).unsqueeze(-1)
                for path, factor in zip(paths, factors.unbind(0), strict=True):
                    path.pairs[c + 1].mul_(factor)
    return KeysPassed(paths, *_in_one(steps), torch.stack(mean_squares) if mean_squares else None)


def _aims(network: Network, tokens: TokenGroup) -> tuple[Tensor, Tensor]:
    """Error of the answers as aim + normed * scale: aim (g, N, b, D), and scale that broadcasts against (N, b, D)."""
    aims = -tokens.values
    if network.residual_norm:
        aims = aims + tokens.keys if network.norm_bias is None else aims + tokens.keys + network.norm_bias
    one = aims.new_ones(())
    scale = network.norm_weight if network.residual_norm and network.norm_weight is not None else one
    return LOSS_SLOPE * aims, LOSS_SLOPE * scale


def _mean_square(pairs: Tensor) -> Tensor:
    """Mean squares of weights and momentum (..., 2, size)."""
    return torch.linalg.vector_norm(pairs, dim=-1).square_().div_(pairs.shape[-1])


class Reads(NamedTuple):
    """The queries' way through a group's memories; (g N, ...) like KeysPassed.

    Attributes:
        inputs: For each matrix its input x, (g N, b, d_in).
        similarities: For each matrix the products x_t . h_j, (g N, b, b).
        attended: Those times G.
        shared: For each matrix x as it meets weights and momentum, (g N, b, 2 d_in).
        led: For each matrix x as it meets M_0, (g N, b, d_in); empty without M_0.
        hidden: For each matrix but the last its output, (g N, b, d_out).
        output: The last output, (g N, b, D); partial with a shard, so that a sequence needs one sum.
    """

    inputs: list[Tensor]
    similarities: list[Tensor]
    attended: list[Tensor]
    shared: list[Tensor]
    led: list[Tensor]
    hidden: list[Tensor]
    output: Tensor


def read(network: Network, tokens: TokenGroup, gates: Gates, passed: KeysPassed, borders: Borders) -> Reads:
    """The queries' way through a group, each through the state that its own token has left."""
    depth, shard = len(passed.paths), network.shard
    x = z = tokens.queries.flatten(0, 1)
    inputs, similarities, attended, shared, led, hidden = [], [], [], [], [], []
    for layer, path in enumerate(passed.paths):
        if layer:
            hidden.append(shard.sum_at_output(layer - 1, depth, z))
            x = F.gelu(hidden[-1])
        x = shard.into_input(layer, depth, x)
        inputs.append(x)
        similarities.append(torch.bmm(x, passed.trace.inputs[layer].transpose(1, 2)))
        attended.append(similarities[-1] * gates.writes[layer].flatten(0, 1))
        share = gates.read[layer].flatten(0, 1).unsqueeze(-1)
        shared.append((x.unsqueeze(2) * share).flatten(2))
        z = torch.bmm(shared[-1], path.before.flatten(0, 1))
        z.baddbmm_(attended[-1], passed.errors.deltas[layer], alpha=-1)
        if borders.anchors:
            led.append(x * (1.0 - share[:, :, 0]))
            z += through_anchor(led[-1], borders.anchors[layer])
    return Reads(inputs, similarities, attended, shared, led, hidden, z)


def through_anchor(x: Tensor, anchor: Tensor) -> Tensor:
    """x (g N, b, d_in) times M_0 (H, d_in, d_out), in one product a head."""
    return torch.einsum("khbi,hio->khbo", x.unflatten(0, (-1, len(anchor))), anchor).flatten(0, 1)


def norm_of_reads(network: Network, depth: int, output: Tensor) -> Normed:
    """LayerNorm of Reads.output, of one group or of several in one tensor; with a shard their one sum."""
    return normalise(network, network.shard.sum_at_output(depth - 1, depth, output))


def may_hold(where: Tensor) -> bool:
    """Whether it may hold somewhere; a GPU would stall for the answer, so there it always may."""
    return where.is_cuda or bool(where.any())


def _by_matrix_and_chunk(x: Tensor) -> list[list[Tensor]]:
    """(L, g, ...) as lists: taking a slice in every step of the loop costs as much as a product."""
    return [list(matrix.unbind(0)) for matrix in x.unbind(0)]


def _in_one(steps: list[tuple[Trace, Tensor, Errors]]) -> tuple[Trace, Tensor, Errors]:
    """What the chunks of a group have found, chunk after chunk in the first axis."""
    if len(steps) == 1:
        return steps[0]
    traces, errors, propagated = zip(*steps, strict=True)
    normed = Normed(*_columns([list(trace.normed) for trace in traces]))
    trace = Trace(_columns([t.inputs for t in traces]), _columns([t.hidden for t in traces]), normed)
    return trace, torch.cat(errors), _errors_in_one(propagated)


def _errors_in_one(errors: tuple[Errors, ...]) -> Errors:
    return Errors(_columns([e.arriving for e in errors]), _columns([e.deltas for e in errors]))


def _columns(rows: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*rows, strict=True)]
