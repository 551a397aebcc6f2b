"""The dual form: a chunk's updates and reads as matrix products, no gradient of a single token is ever built.

Token j's gradient at one matrix is the outer product of the matrix's input h_j and the error delta_j at its output,
both at the chunk's first weights. With G = A E diag(theta) the answer of one matrix to token t's query x_t is
a_t x_t W + f_t x_t S - sum_{j <= t} G[t, j] (x_t . h_j) delta_j, and the weights after the chunk are two products more.

Only the states follow one upon the other. So chunks are worked off in groups: `walk` goes through a group's states one
by one, and all else is done for the chunks of the group at once.

Letters: L matrices, N = B H memories, g chunks of a group, b tokens of a chunk. The state of a matrix is
(N, 2 d_in, d_out), its weights above its momentum. None of this is made for autograd; chunked_gradient.py goes back
through it by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .coefficients import coefficients
from .network import (
    Errors,
    Network,
    Normed,
    Trace,
    answer,
    back_propagate,
    back_propagate_and_reach,
    forward,
    normalise,
    reach,
    smallest_rms,
)
from .sharing import Share, into_input, sum_at_output, whole_mean, whole_shape
from .shell import floor_lack, leaves_shell
from .stability import STATE_RMS_LIMIT, Load, chunk_load, load_mass, step_scale


class Tokens(NamedTuple):
    """Queries, keys and values of a group's chunks, each (g, N, b, D)."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class Gates(NamedTuple):
    """What a group's gates come to, for steps that the bound does not scale.

    Attributes:
        read: What a read takes from weights and momentum at the chunk's start, (L, g, N, b, 2).
        end: What weights and momentum after the chunk keep of weights and momentum before it, (L, g, N, 2, 2).
        writes: G, how much of token j's step has reached the weights at t, (L, g, N, b, b).
        write: How much of a token's step is in weights and momentum after the chunk, (L, g, N, b, 2).
        mass: What a token's step weighs in the loads, (L, g, N, b).
    """

    read: Tensor
    end: Tensor
    writes: Tensor
    write: Tensor
    mass: Tensor


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
        load_mass(theta, eta),
    )


class Borders(NamedTuple):
    """What happens between a group's chunks.

    Attributes:
        closed: Whether a chunk that is full has ended; after one that is still open there is no state shell.
        full: Which chunks are, (g, N); None if all are.
        restarted: For each chunk the memories (indices) that begin a document in it, None for none; empty if no chunk
            has any.
        fresh: L states in which a document begins, (N, 2 d_in, d_out); empty if none does.
        anchors: L initial weights by stability.anchor_of, (N, d_in, d_out).
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
class Walked:
    """A group after its states are known; what every chunk has alike is (g N, ...), chunk after chunk.

    Attributes:
        paths: The states, by matrix.
        trace: Forward pass of the keys.
        error: Error of its answer, (g N, b, D).
        errors: Its back-propagation.
        load: The load, chunk by chunk in the first axis; None where it was left out.
        reach: What it comes from; None likewise.
        acted: Whether the step bound acted, by chunk.
        scale: The step bound's factor on theta, (g N, b); None where it is 1.
        mean_squares: Of weights and momentum after each chunk, before they came into the shell, (g, L, N, 2); None
            where that was left out.
    """

    paths: list[Path]
    trace: Trace
    error: Tensor
    errors: Errors
    load: Load | None = None
    reach: Errors | None = None
    acted: list[bool] = field(default_factory=list)
    scale: Tensor | None = None
    mean_squares: Tensor | None = None


class Bounds(NamedTuple):
    """Which bounds are worked out while walking. One that would change nothing may be left out."""

    step: bool = False
    shell: bool = False


def bounds_met(network: Network, walked: Walked, gates: Gates, borders: Borders, bounds: Bounds) -> Bounds:
    """The bounds that a group has met, beside those it was walked with.

    To look at all chunks at once is much cheaper than at each in turn, and most groups meet none. Nothing is missed:
    up to the first chunk at which a bound acts, the walk without bounds is the true one.
    """
    # Past that chunk anything may have come, also NaN, which a maximum would let through.
    step, shell = bounds
    if not step:
        before = [path.before.flatten(0, 1) for path in walked.paths]
        weights = [state[:, : state.shape[1] // 2] for state in before]
        all_chunks = network.for_chunks(len(walked.paths[0].before))
        reaching = reach(all_chunks, weights, walked.trace, walked.error, walked.errors)
        mass = gates.mass.flatten(1, 2)
        load = chunk_load(walked.trace.inputs, reaching.deltas, walked.error, mass, share=network.share)
        step = _holds_anywhere(network.share, load.exceeds())
    if borders.closed and not shell:
        floors = floor_by_matrix(network, walked.paths)
        made = [(path.before[1:], path.states[-1]) for path in walked.paths]  # what comes first was not made here
        if network.share is None:
            shell = any(_leaves_shell(x, floor) for xs, floor in zip(made, floors, strict=True) for x in xs)
        else:
            shell = _part_leaves_shell(network.share, made, floors)
    return Bounds(step, shell)


def _holds_anywhere(share: Share | None, where: Tensor) -> bool:
    """Whether it holds somewhere. Processes that decided apart could part for a rounding error and wait forever."""
    anywhere = where.any()
    return bool(anywhere) if share is None else bool(share.add(anywhere.float().view(1)) > 0)


def floor_by_matrix(network: Network, paths: list[Path]) -> Tensor:
    """Smallest root mean square of weights and momentum, (L, 2); momentum may vanish."""
    depth = len(paths)
    widths = [whole_shape(network.share, i, depth, path.weights[0].shape)[0] for i, path in enumerate(paths)]
    smallest = [smallest_rms(network.residual_norm, depth, width) for width in widths]
    return torch.tensor([[rms, 0.0] for rms in smallest], dtype=paths[0].before.dtype, device=paths[0].before.device)


def _leaves_shell(states: Tensor, floor: Tensor) -> bool:
    """Whether weights or momentum in states (..., 2 d_in, d_out) are too large or too small."""
    mean_square = _mean_square(_matrices(states))
    return bool((leaves_shell(mean_square, floor) | mean_square.isnan()).any())


def _part_leaves_shell(share: Share, states: list[tuple[Tensor, Tensor]], floors: Tensor) -> bool:
    """The same for L pairs of states before, (g - 1, N, 2 d_in, d_out), and the last one, in one sum over the parts."""
    squares = [[_mean_square(_matrices(x)) for x in (before, last.unsqueeze(0))] for before, last in states]
    mean_square = whole_mean(share, torch.stack([torch.cat(parts) for parts in squares]))
    return bool((leaves_shell(mean_square, floors[:, None, None]) | mean_square.isnan()).any())


def _matrices(states: Tensor) -> Tensor:
    """Weights and momentum flat, (..., 2, d_in * d_out), in states (..., 2 d_in, d_out)."""
    return states.unflatten(-2, (2, -1)).flatten(-2)


def walk(
    network: Network, tokens: Tokens, gates: Gates, start: list[Tensor], borders: Borders, bounds: Bounds
) -> Walked:
    """Go through a group's chunks, each from the state that the one before has left.

    Args:
        network: With scale and shift for N memories. With a share, states, inputs, errors and anchors are parts of it.
        tokens: The group's.
        gates: The group's.
        start: L states before the first chunk.
        borders: What happens between the chunks.
        bounds: Those that are worked out.
    """
    chunks = len(tokens.keys)
    paths = [Path(state, chunks, bool(borders.restarted)) for state in start]
    write, end = (_by_matrix_and_chunk(x) for x in (gates.write.unsqueeze(-1), gates.end))
    masses = gates.mass.unbind(1)
    keyed = into_input(network.share, 0, len(paths), tokens.keys)
    key_overlaps = torch.matmul(keyed, keyed.transpose(-1, -2)).unbind(0) if bounds.step else ()
    steps: list[tuple[Trace, Tensor, Errors]] = []
    loads, reached, acted, mean_squares = [], [], [], []
    floors = floor_by_matrix(network, paths).unsqueeze(1)  # (L, 1, 2)
    for c, (keys, values) in enumerate(zip(tokens.keys.unbind(0), tokens.values.unbind(0), strict=True)):
        if (memories := borders.restarts(c)) is not None:
            for path, fresh in zip(paths, borders.fresh, strict=True):
                path.states[c][memories] = fresh[memories]
        weights = [path.weights[c] for path in paths]
        trace = forward(network, weights, keys)
        error = (answer(network, keys, trace.normed.value) - values).mul_(2.0)
        if bounds.step:
            errors, reaching = back_propagate_and_reach(network, weights, trace, error)
        else:
            errors = back_propagate(network, weights, trace, error)
        steps.append((trace, error, errors))
        shares = [share[c] for share in write]
        if bounds.step:
            load = chunk_load(trace.inputs, reaching.deltas, error, masses[c], key_overlaps[c], network.share)
            loads.append(load)
            reached.append(reaching)
            acted.append(may_hold(load.exceeds(), network.share))
            if acted[-1]:
                scale = step_scale(load.own, load.before)[..., None, None]
                shares = [share * scale for share in shares]
        for path, mix, share, h, delta in zip(paths, end, shares, trace.inputs, errors.deltas, strict=True):
            after = path.states[c + 1]
            torch.bmm(mix[c], path.pairs[c], out=path.pairs[c + 1])
            after.baddbmm_((h.unsqueeze(2) * share).flatten(2).transpose(1, 2), delta, alpha=-1)
        if bounds.shell and borders.closed:
            parts = torch.stack([_mean_square(path.pairs[c + 1]) for path in paths])
            mean_squares.append(whole_mean(network.share, parts))
            if may_hold(leaves_shell(mean_squares[-1], floors), network.share):
                full = None if borders.full is None else borders.full[c]
                for path, square, floor, anchor in zip(paths, mean_squares[-1], floors, borders.anchors, strict=True):
                    _into_shell(path, c + 1, square, floor[0, 0], anchor, full, network.share)
    walked = Walked(paths, *_in_one(steps), acted=acted)
    if any(acted):
        walked.load = Load(*map(torch.stack, zip(*loads, strict=True)))
        walked.reach = walked.errors if not network.residual_norm else _errors_in_one(reached)
        walked.scale = step_scale(walked.load.own, walked.load.before).flatten(0, 1)
    walked.mean_squares = torch.stack(mean_squares) if mean_squares else None
    return walked


def _mean_square(pairs: Tensor) -> Tensor:
    """Mean squares of weights and momentum (N, 2, size)."""
    return torch.linalg.vector_norm(pairs, dim=-1).square_().div_(pairs.shape[-1])


def _into_shell(
    path: Path, chunk: int, square: Tensor, floor: Tensor, anchor: Tensor, full: Tensor | None, share: Share | None
) -> None:
    """The state shell, in place, for the memories whose chunk is full; their mean squares are (N, 2)."""
    above, lack = square > STATE_RMS_LIMIT**2, floor_lack(square[:, 0], floor)
    if full is not None:
        above, lack = above & full.unsqueeze(-1), lack * full
    if may_hold(above, share):
        path.pairs[chunk].mul_(torch.where(above, STATE_RMS_LIMIT * square.rsqrt(), 1.0).unsqueeze(-1))
    if may_hold(lack > 0, share):
        path.weights[chunk].addcmul_(lack[:, None, None], anchor)


class Reads(NamedTuple):
    """The queries' way through a group's memories; (g N, ...) like Walked.

    Attributes:
        inputs: For each matrix its input x, (g N, b, d_in).
        similarities: For each matrix the products x_t . h_j, (g N, b, b).
        attended: Those times G with the bound's scale.
        shared: For each matrix x as it meets weights and momentum, (g N, b, 2 d_in).
        hidden: For each matrix but the last its output, (g N, b, d_out).
        output: The last output, (g N, b, D); partial with a share, so that a sequence needs one sum.
    """

    inputs: list[Tensor]
    similarities: list[Tensor]
    attended: list[Tensor]
    shared: list[Tensor]
    hidden: list[Tensor]
    output: Tensor


def read(network: Network, tokens: Tokens, gates: Gates, walked: Walked) -> Reads:
    """The queries' way through a walked group, each through the state that its own token has left."""
    depth = len(walked.paths)
    x = z = tokens.queries.flatten(0, 1)
    inputs, similarities, attended, shared, hidden = [], [], [], [], []
    for layer, path in enumerate(walked.paths):
        if layer:
            hidden.append(sum_at_output(network.share, layer - 1, depth, z))
            x = F.gelu(hidden[-1])
        x = into_input(network.share, layer, depth, x)
        inputs.append(x)
        similarities.append(torch.bmm(x, walked.trace.inputs[layer].transpose(1, 2)))
        attended.append(similarities[-1] * bounded_writes(gates, walked, layer))
        shared.append((x.unsqueeze(2) * gates.read[layer].flatten(0, 1).unsqueeze(-1)).flatten(2))
        z = torch.bmm(shared[-1], path.before.flatten(0, 1))
        z.baddbmm_(attended[-1], walked.errors.deltas[layer], alpha=-1)
    return Reads(inputs, similarities, attended, shared, hidden, z)


def norm_of_reads(network: Network, depth: int, output: Tensor) -> Normed:
    """LayerNorm of Reads.output, of one group or of several in one tensor; with a share their one sum."""
    return normalise(network, sum_at_output(network.share, depth - 1, depth, output))


def bounded_writes(gates: Gates, walked: Walked, layer: int) -> Tensor:
    """G of one matrix with the step bound's scale, (g N, b, b)."""
    writes = gates.writes[layer].flatten(0, 1)
    return writes if walked.scale is None else writes * walked.scale.unsqueeze(-2)


def may_hold(where: Tensor, share: Share | None = None) -> bool:
    """Whether it may hold somewhere.

    A GPU would stall for the answer, and with a share the processes might not agree; so there it always may.
    """
    return where.is_cuda or share is not None or bool(where.any())


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


def _errors_in_one(errors: Sequence[Errors]) -> Errors:
    return Errors(_columns([e.arriving for e in errors]), _columns([e.deltas for e in errors]))


def _columns(rows: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*rows, strict=True)]
