"""The dual form's gradient by hand: back through the reads of a group at once, then chunk by chunk through its states.

With D the gradient at a state after a chunk (weights' above momentum's), what the update gives to its factors is two
products with D; they are added to what the reads have given. From there network_gradient.py goes on to the weights the
chunk began with. Letters as in chunked.py; `of_x` is the gradient at x.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import Borders, Gates, Reads, Tokens, Walked, bounded_writes, floor_by_matrix, may_hold
from .network import Network, Normed, gelu_gradient
from .network_gradient import InnerGradient, ReachGradient, by_chunk
from .sharing import once, once_at_input, out_of_input, sum_at_input, whole_mean
from .shell import EMPTY, floor_lack
from .stability import STATE_RMS_LIMIT, growth_units
from .stability_gradient import LoadChain


class GroupGradient(NamedTuple):
    """Gradients at what a group was made of. With a share those at tokens, gates and norm are partial.

    Attributes:
        tokens: At queries, keys and values.
        gates: At the fields of Gates, None where no gradient arrives.
        norm: At scale and shift of the LayerNorm, (N, 1, D), or nothing.
        start: At the L states before the first chunk.
        fresh: At the L states in which documents begin, None where none began.
        anchors: At the L anchors of the state shell, None where it led nothing back.
    """

    tokens: Tokens
    gates: tuple[Tensor | None, ...]
    norm: tuple[Tensor, ...]
    start: list[Tensor]
    fresh: list[Tensor | None]
    anchors: list[Tensor | None]


def group_gradient(
    network: Network,
    tokens: Tokens,
    gates: Gates,
    walked: Walked,
    borders: Borders,
    reads: Reads,
    normed: Normed,
    of_answers: Tensor,
    of_end: list[Tensor],
) -> GroupGradient:
    """Back through a group of chunks.

    Args:
        network: As for chunked.walk, like tokens and gates.
        walked: What chunked.walk has found.
        borders: As for chunked.walk.
        reads: What chunked.read has found.
        normed: What chunked.norm_of_reads makes of it.
        of_answers: Gradient at the answers to the queries, (g, N, b, D).
        of_end: L gradients at the states after the last chunk, contiguous; they are changed.
    """
    of_reads = _back_through_reads(network, gates, walked, reads, normed, of_answers)
    chain = _Chain(network, gates, walked, borders, reads, of_reads)
    of_state = of_end
    for chunk in reversed(range(len(tokens.keys))):
        of_state = chain.step(chunk, of_state)
    of_key_answers, of_answers = chain.inner.of_answers(), once(network.share, of_answers)
    at_first = [out_of_input(network.share, len(of_end), x) for x in (of_reads.queries, of_reads.inputs[0])]
    of_queries, of_keys = (x.view_as(tokens.queries) for x in at_first)
    norm: tuple[Tensor, ...] = ()
    if network.residual_norm:
        of_queries, of_keys = of_queries + of_answers, of_keys + of_key_answers
        of_scale = (of_answers * normed.value.view_as(of_answers)).sum((0, 2)).unsqueeze(1)
        of_shift = of_answers.sum((0, 2)).unsqueeze(1)
        norm = tuple(a + b for a, b in zip(chain.inner.of_norm(of_key_answers), (of_scale, of_shift), strict=True))
    of_tokens = Tokens(of_queries, of_keys, -of_key_answers)
    return GroupGradient(of_tokens, chain.of_gates(), norm, of_state, chain.of_fresh, chain.of_anchors)


class _ReadGradient(NamedTuple):
    """Gradients from the reads alone, (g N, ...), lists by matrix.

    Attributes:
        queries: Without what goes past the MLP.
        inputs: At the keys' inputs of the matrices.
        deltas: At the keys' deltas.
        outputs: At the queries' outputs of the matrices.
        writes: At G with the bound's scale.
        read: At gates.read.
    """

    queries: Tensor
    inputs: list[Tensor]
    deltas: list[Tensor]
    outputs: list[Tensor]
    writes: list[Tensor]
    read: list[Tensor]


def _back_through_reads(
    network: Network, gates: Gates, walked: Walked, reads: Reads, normed: Normed, of_answers: Tensor
) -> _ReadGradient:
    of_z = (of_answers if network.norm_weight is None else of_answers * network.norm_weight).flatten(0, 1)
    if network.residual_norm:
        of_z = normed.gradient(of_z)
    found = []
    for layer in reversed(range(len(walked.paths))):
        x, h, delta = reads.inputs[layer], walked.trace.inputs[layer], walked.errors.deltas[layer]
        of_delta = torch.bmm(reads.attended[layer].transpose(1, 2), of_z).neg_()
        of_attended = torch.bmm(of_z, delta.transpose(1, 2)).neg_()
        of_similarity = of_attended * bounded_writes(gates, walked, layer)
        of_shared = torch.bmm(of_z, walked.paths[layer].before.flatten(0, 1).transpose(1, 2)).unflatten(2, (2, -1))
        of_x = (of_shared * gates.read[layer].flatten(0, 1).unsqueeze(-1)).sum(2)
        of_x.baddbmm_(of_similarity, h)
        of_h = torch.bmm(of_similarity.transpose(1, 2), x)
        of_read = (of_shared * x.unsqueeze(2)).sum(-1)
        found.append((of_h, of_delta, of_z, of_attended.mul_(reads.similarities[layer]), of_read))
        if layer:
            of_x = sum_at_input(network.share, layer, len(walked.paths), of_x)
            of_z = gelu_gradient(of_x, reads.hidden[layer - 1])
    return _ReadGradient(of_x, *(list(column) for column in zip(*reversed(found), strict=True)))


class _Chain:
    """The way back from state to state. The gradients in of_reads are added to in place, chunk by chunk."""

    def __init__(
        self, network: Network, gates: Gates, walked: Walked, borders: Borders, reads: Reads, of_reads: _ReadGradient
    ) -> None:
        chunks = gates.mass.shape[1]
        self.gates, self.walked, self.borders, self.of_reads, self.chunks = gates, walked, borders, of_reads, chunks
        self.share = network.share
        self.of_fresh: list[Tensor | None] = [None] * len(walked.paths)
        self.of_anchors: list[Tensor | None] = [None] * len(walked.paths)
        trace, deltas = walked.trace, walked.errors.deltas
        self.inner = InnerGradient(network, trace, walked.error, walked.errors, chunks)
        shares = _bounded_shares(gates, walked)
        written = [(h.unsqueeze(2) * share).flatten(2) for h, share in zip(trace.inputs, shares, strict=True)]
        self.of_written = [torch.empty_like(x) for x in written]
        self.of_end: list[list[Tensor]] = []
        self.inputs, self.deltas = by_chunk(trace.inputs, chunks), by_chunk(deltas, chunks)
        self.of_inputs, self.of_deltas = by_chunk(of_reads.inputs, chunks), by_chunk(of_reads.deltas, chunks)
        self.written, self.of_written_by_chunk = by_chunk(written, chunks), by_chunk(self.of_written, chunks)
        self.parts = [by_chunk([share[:, :, i] for share in shares], chunks) for i in (0, 1)]
        of_parts = [[x.unflatten(2, (2, -1))[:, :, i] for x in self.of_written] for i in (0, 1)]
        self.of_parts = [by_chunk(part, chunks) for part in of_parts]
        self.query_shared, self.of_outputs = by_chunk(reads.shared, chunks), by_chunk(of_reads.outputs, chunks)
        self.end = [list(matrix.unbind(0)) for matrix in gates.end.unbind(0)]
        self._prepare_bounds()

    def step(self, chunk: int, of_after: list[Tensor]) -> list[Tensor]:
        """From the gradients at the states after a chunk to those at the states before it, both (N, 2 d_in, d_out)."""
        of_after = self._through_shell(chunk, of_after)
        of_inputs, of_deltas = ([x[chunk] for x in xs] for xs in (self.of_inputs, self.of_deltas))
        for layer, of_state in enumerate(of_after):
            of_deltas[layer].baddbmm_(self.written[layer][chunk], of_state, alpha=-1)
            delta, of_written = self.deltas[layer][chunk], self.of_written_by_chunk[layer][chunk]
            torch.bmm(delta, of_state.transpose(1, 2), out=of_written)
            for part, of_part in zip(self.parts, self.of_parts, strict=True):
                of_inputs[layer].addcmul_(of_part[layer][chunk], part[layer][chunk], value=-1)
        weights = [path.weights[chunk] for path in self.walked.paths]
        acted = bool(self.walked.acted) and self.walked.acted[chunk]
        bound = self._through_bound(chunk, weights, of_inputs) if acted else None
        found = self.inner.step(chunk, weights, of_inputs, of_deltas, bound)
        of_end, of_before = [], []
        for layer, (path, of_state) in enumerate(zip(self.walked.paths, of_after, strict=True)):
            pair = of_state.view_as(path.pairs[chunk])
            of_end.append(torch.bmm(pair, path.pairs[chunk].transpose(1, 2)))
            before = torch.bmm(self.end[layer][chunk].transpose(1, 2), pair).view_as(of_state)
            before.baddbmm_(self.query_shared[layer][chunk].transpose(1, 2), self.of_outputs[layer][chunk])
            factors = [self.inputs[layer][chunk]], [found.outputs[layer]]
            if layer:
                factors[0].append(found.arriving[layer - 1])
                factors[1].append(self.deltas[layer][chunk])
            if layer and bound is not None:
                factors[0].append(bound.arriving[layer - 1])
                factors[1].append(bound.deltas[layer])
            left, right = (part[0] if len(part) == 1 else torch.cat(part, 1) for part in factors)
            # baddbmm_ into half a tensor would go one memory at a time.
            before[:, : before.shape[1] // 2] += torch.bmm(left.transpose(1, 2), right)
            of_before.append(before)
        self.of_end.append(of_end)
        if (memories := self.borders.restarts(chunk)) is not None:
            self._through_restart(memories, of_before)
        return of_before

    def of_gates(self) -> tuple[Tensor | None, ...]:
        """Gradients at the fields of gates, once every chunk was stepped through; None where none arrives."""
        gates = self.gates
        of_end = torch.stack([torch.stack(chunks) for chunks in zip(*reversed(self.of_end), strict=True)])
        of_read = torch.stack(self.of_reads.read)
        of_writes = torch.stack(self.of_reads.writes)
        parts = zip(self.of_written, self.walked.trace.inputs, strict=True)
        of_write = torch.stack([-(of.unflatten(2, (2, -1)) * h.unsqueeze(2)).sum(-1) for of, h in parts])
        if self.walked.scale is not None:
            of_writes = of_writes * self.walked.scale.unsqueeze(-2)
            of_write = of_write * self.walked.scale.unsqueeze(-1)
        of_writes, of_write = of_writes.view_as(gates.writes), of_write.view_as(gates.write)
        of_mass = None if self.loads is None else once(self.share, self.loads.of_mass().transpose(0, 1))
        return of_read.view_as(gates.read), of_end, of_writes, of_write, of_mass

    def _prepare_bounds(self) -> None:
        self.loads: LoadChain | None = None
        if self.walked.load is not None:
            assert self.walked.reach is not None
            units = growth_units(self.walked.trace.inputs, self.walked.errors.deltas, self.share)
            self.loads = LoadChain(self.walked.load, self.gates.mass.transpose(0, 1), units)
            self.inner.prepare_reach(self.walked.reach)
            of_writes = torch.stack(self.of_reads.writes)
            of_scale = (of_writes * self.gates.writes.flatten(1, 2)).sum((0, -2))
            weighted = [
                (h.unsqueeze(2) * write.flatten(0, 1).unsqueeze(-1)).flatten(2)
                for h, write in zip(self.walked.trace.inputs, self.gates.write, strict=True)
            ]
            self.of_scale, self.error = by_chunk([of_scale, self.walked.error], self.chunks)
            self.weighted = by_chunk(weighted, self.chunks)
        if self.walked.mean_squares is not None:
            self.floors = floor_by_matrix(self.inner.network, self.walked.paths)[:, 0].tolist()

    def _through_bound(self, chunk: int, weights: list[Tensor], of_inputs: list[Tensor]) -> ReachGradient:
        """Adds the step bound's part of the gradients at inputs, and finds what comes by way of the reach."""
        assert self.loads is not None
        of_scale = self.of_scale[chunk]
        for of_written, weighted in zip(self.of_written_by_chunk, self.weighted, strict=True):
            of_scale = of_scale - (of_written[chunk] * weighted[chunk]).sum(-1)
        found = self.loads.step(chunk, of_scale if self.share is None else self.share.add(of_scale))
        for layer, of_overlaps in enumerate(found.overlaps.unbind(0)):
            of_overlaps = once_at_input(self.share, layer, len(weights), of_overlaps)
            of_inputs[layer].baddbmm_(of_overlaps, self.inputs[layer][chunk])
        return self.inner.through_reach(chunk, weights, found.deltas, found.error, self.error[chunk])

    def _through_restart(self, memories: Tensor, of_before: list[Tensor]) -> None:
        """What arrives at states in which a document began belongs to its first state, not to the chunk before."""
        for layer, of_state in enumerate(of_before):
            total = self.of_fresh[layer]
            if total is None:
                total = self.of_fresh[layer] = torch.zeros_like(of_state)
            total[memories] += of_state[memories]
            of_state[memories] = 0.0

    def _through_shell(self, chunk: int, of_after: list[Tensor]) -> list[Tensor]:
        """Back through W = s U with s = limit / rms(U), or W = U + lack(U) anchor, where the shell acted."""
        if self.walked.mean_squares is None:
            return of_after
        squares = self.walked.mean_squares[chunk]
        ended = torch.ones_like(squares[0], dtype=torch.bool)
        if self.borders.full is not None:
            ended &= self.borders.full[chunk].unsqueeze(-1)
        above = (squares > STATE_RMS_LIMIT**2) & ended
        below = torch.stack([x < floor**2 for x, floor in zip(squares[..., 0], self.floors, strict=True)]) & ended[:, 0]
        if not may_hold(above | below.unsqueeze(-1), self.share):
            return of_after
        states = [path.pairs[chunk + 1] for path in self.walked.paths]
        pairs = [of_state.view_as(state) for of_state, state in zip(of_after, states, strict=True)]
        along_states, along_anchors = self._along(states, pairs)
        for layer, (floor, state) in enumerate(zip(self.floors, states, strict=True)):
            square = squares[layer]
            if may_hold(above[layer], self.share):
                pairs[layer] = _through_limit(pairs[layer], state, square, above[layer], along_states[layer])
            if may_hold(below[layer], self.share):
                along = along_anchors[layer]
                self._through_floor(layer, pairs[layer], state, square[:, 0], floor, below[layer], along)
        return [pair.view_as(of_state) for pair, of_state in zip(pairs, of_after, strict=True)]

    def _along(self, states: list[Tensor], pairs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Means over the matrices of gradients (N, 2, size) times states, (L, N, 2), and times anchors, (L, N)."""
        with_states = [(pair * state).mean(-1) for pair, state in zip(pairs, states, strict=True)]
        anchors = [anchor.flatten(1) for anchor in self.borders.anchors]
        with_anchors = [
            torch.linalg.vecdot(pair[:, 0], anchor) / anchor.shape[-1]
            for pair, anchor in zip(pairs, anchors, strict=True)
        ]
        both = torch.cat([torch.stack(with_states), torch.stack(with_anchors).unsqueeze(-1)], -1)
        both = whole_mean(self.share, both)
        return both[..., :2], both[..., 2]

    def _through_floor(
        self, layer: int, of_pair: Tensor, state: Tensor, square: Tensor, floor: float, below: Tensor, along: Tensor
    ) -> None:
        """Through U + lack(U) anchor, in place, for the weights of those memories; keeps the gradient at the anchor."""
        anchor = self.borders.anchors[layer].flatten(1)
        lack = (floor_lack(square, floor) * below).unsqueeze(-1)
        of_weights = of_pair[:, 0]
        along = along.unsqueeze(-1) * below.unsqueeze(-1) / (square.unsqueeze(-1) + EMPTY).sqrt()
        total = self.of_anchors[layer]
        if total is None:
            total = self.of_anchors[layer] = torch.zeros_like(self.borders.anchors[layer])
        total.flatten(1).addcmul_(lack, of_weights)
        # U = W - lack anchor
        of_weights.addcmul_(along, state[:, 0], value=-1.0).addcmul_(along * lack, anchor)


def _through_limit(of_pair: Tensor, state: Tensor, square: Tensor, above: Tensor, along: Tensor) -> Tensor:
    """Through s U for pairs (N, 2, size): s (D - (D . W) W / (size limit^2)), where above; along is D . W / size."""
    scale = STATE_RMS_LIMIT * square.masked_fill(~above, 1.0).rsqrt().unsqueeze(-1)
    along = along.unsqueeze(-1) / STATE_RMS_LIMIT**2
    return torch.where(above.unsqueeze(-1), scale * (of_pair - along * state), of_pair)


def _bounded_shares(gates: Gates, walked: Walked) -> Tensor:
    """gates.write with the step bound's scale, (L, g N, b, 2, 1)."""
    share = gates.write.flatten(1, 2)
    if walked.scale is not None:
        share = share * walked.scale.unsqueeze(-1)
    return share.unsqueeze(-1)
