"""The dual form's gradient by hand: back through the reads of a group at once, then chunk by chunk through its states.

With D the gradient at a state after a chunk (weights' above momentum's), what the update gives to its factors is two
products with D; they are added to what the reads have given. What the update writes are the inputs h and errors delta
that network.forward and network.back_propagate have found. Both are functions of the weights the chunk began with, so
the outer gradient comes back through both: upward through the back-propagation, where the second derivatives of GELU
and LayerNorm appear, then downward through the forward pass.

Letters as in chunk.py; `of_x` is the gradient at x. Where processes hold shards of the weights, what arrives at the
last matrix' output stays partial up to there and is summed once, before it goes down through the parts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import Borders, Gates, KeysPassed, Reads, TokenGroup, may_hold
from .network import LOSS_SLOPE, Errors, Network, Normed, Trace, gelu_gradient, gelu_second_derivative, scaled
from .rule import Rule


class GroupGradient(NamedTuple):
    """Gradients at what a group was made of. With a shard those at tokens, gates and norm are partial.

    Attributes:
        tokens: At queries, keys and values.
        gates: At the fields of Gates.
        norm: At scale and shift of the LayerNorm, (N, 1, D), or nothing.
        start: At the L states before the first chunk.
        fresh: At the L states in which documents begin, None where none began.
        anchors: At M_0 as that to which forgetting leads, (H, d_in, d_out), or nothing.
    """

    tokens: TokenGroup
    gates: Gates
    norm: tuple[Tensor, ...]
    start: list[Tensor]
    fresh: list[Tensor | None]
    anchors: list[Tensor]


def group_gradient(
    network: Network,
    rule: Rule,
    tokens: TokenGroup,
    gates: Gates,
    passed: KeysPassed,
    borders: Borders,
    reads: Reads,
    normed: Normed,
    of_answers: Tensor,
    of_end: list[Tensor],
) -> GroupGradient:
    """Back through a group of chunks.

    Args:
        network: As for chunk.pass_keys, like rule, tokens, gates and borders.
        rule: The rule.
        tokens: The group's.
        gates: The group's.
        passed: What chunk.pass_keys has found.
        borders: What happens between the chunks.
        reads: What chunk.read has found.
        normed: What chunk.norm_of_reads makes of it.
        of_answers: Gradient at the answers to the queries, (g, N, b, D).
        of_end: L gradients at the states after the last chunk, contiguous; they are changed.
    """
    shard = network.shard
    of_reads = _back_through_reads(network, gates, passed, borders, reads, normed, of_answers)
    chain = _Chain(network, rule, gates, passed, borders, reads, of_reads)
    of_state = of_end
    for chunk in reversed(range(len(tokens.keys))):
        of_state = chain.step(chunk, of_state)
    of_key_answers, of_answers = chain.inner.of_answers(), shard.once(of_answers)
    at_first = [shard.out_of_input(len(of_end), x) for x in (of_reads.queries, of_reads.inputs[0])]
    of_queries, of_keys = (x.view_as(tokens.queries) for x in at_first)
    norm: tuple[Tensor, ...] = ()
    if network.residual_norm:
        of_queries, of_keys = of_queries + of_answers, of_keys + of_key_answers
        of_scale = (of_answers * normed.value.view_as(of_answers)).sum((0, 2)).unsqueeze(1)
        of_shift = of_answers.sum((0, 2)).unsqueeze(1)
        norm = tuple(a + b for a, b in zip(chain.inner.of_norm(of_key_answers), (of_scale, of_shift), strict=True))
    of_tokens = TokenGroup(of_queries, of_keys, -of_key_answers)
    return GroupGradient(of_tokens, chain.of_gates(), norm, of_state, chain.of_fresh, chain.of_anchors())


class _ReadGradient(NamedTuple):
    """Gradients from the reads alone, (g N, ...), lists by matrix.

    Attributes:
        queries: Without what goes past the MLP.
        inputs: At the keys' inputs of the matrices.
        deltas: At the keys' deltas.
        outputs: At the queries' outputs of the matrices.
        writes: At G.
        read: At gates.read.
        anchors: At M_0, (H, d_in, d_out); empty without.
    """

    queries: Tensor
    inputs: list[Tensor]
    deltas: list[Tensor]
    outputs: list[Tensor]
    writes: list[Tensor]
    read: list[Tensor]
    anchors: list[Tensor]


def _back_through_reads(
    network: Network,
    gates: Gates,
    passed: KeysPassed,
    borders: Borders,
    reads: Reads,
    normed: Normed,
    of_answers: Tensor,
) -> _ReadGradient:
    of_z = (of_answers if network.norm_weight is None else of_answers * network.norm_weight).flatten(0, 1)
    if network.residual_norm:
        of_z = normed.gradient(of_z)
    found, of_anchors = [], []
    for layer in reversed(range(len(passed.paths))):
        x, h, delta = reads.inputs[layer], passed.trace.inputs[layer], passed.errors.deltas[layer]
        of_delta = torch.bmm(reads.attended[layer].transpose(1, 2), of_z).neg_()
        of_attended = torch.bmm(of_z, delta.transpose(1, 2)).neg_()
        of_similarity = of_attended * gates.writes[layer].flatten(0, 1)
        of_shared = torch.bmm(of_z, passed.paths[layer].before.flatten(0, 1).transpose(1, 2)).unflatten(2, (2, -1))
        share = gates.read[layer].flatten(0, 1).unsqueeze(-1)
        of_read = (of_shared * x.unsqueeze(2)).sum(-1)
        of_x = (of_shared * share).sum(2)
        if borders.anchors:
            by_head = (-1, len(borders.anchors[layer]))
            at_heads = of_z.unflatten(0, by_head)
            of_led = torch.einsum("khbo,hio->khbi", at_heads, borders.anchors[layer]).flatten(0, 1)
            of_anchors.append(torch.einsum("khbi,khbo->hio", reads.led[layer].unflatten(0, by_head), at_heads))
            of_x.addcmul_(of_led, 1.0 - share[:, :, 0])
            of_read[..., 0] -= (of_led * x).sum(-1)
        of_x.baddbmm_(of_similarity, h)
        of_h = torch.bmm(of_similarity.transpose(1, 2), x)
        found.append((of_h, of_delta, of_z, of_attended.mul_(reads.similarities[layer]), of_read))
        if layer:
            of_x = network.shard.sum_at_input(layer, len(passed.paths), of_x)
            of_z = gelu_gradient(of_x, reads.hidden[layer - 1])
    columns = [list(column) for column in zip(*reversed(found), strict=True)]
    inputs, deltas, outputs, writes, coefficients = columns
    return _ReadGradient(of_x, inputs, deltas, outputs, writes, coefficients, of_anchors[::-1])


class _Chain:
    """The way back from state to state. The gradients in of_reads are added to in place, chunk by chunk."""

    def __init__(
        self,
        network: Network,
        rule: Rule,
        gates: Gates,
        passed: KeysPassed,
        borders: Borders,
        reads: Reads,
        of_reads: _ReadGradient,
    ) -> None:
        chunks = gates.read.shape[1]
        self.network, self.rule, self.gates, self.passed = network, rule, gates, passed
        self.borders, self.of_reads, self.chunks = borders, of_reads, chunks
        self.of_fresh: list[Tensor | None] = [None] * len(passed.paths)
        trace, deltas = passed.trace, passed.errors.deltas
        self.inner = InnerGradient(network, trace, passed.error, passed.errors, chunks)
        shares = gates.write.flatten(1, 2).unsqueeze(-1)
        written = [(h.unsqueeze(2) * share).flatten(2) for h, share in zip(trace.inputs, shares, strict=True)]
        self.of_written = [torch.empty_like(x) for x in written]
        self.of_end: list[list[Tensor]] = []
        self.of_led = [torch.zeros_like(path.weights[0]) for path in passed.paths] if borders.anchors else []
        self.inputs, self.deltas = by_chunk(trace.inputs, chunks), by_chunk(deltas, chunks)
        self.of_inputs, self.of_deltas = by_chunk(of_reads.inputs, chunks), by_chunk(of_reads.deltas, chunks)
        self.written, self.of_written_by_chunk = by_chunk(written, chunks), by_chunk(self.of_written, chunks)
        self.parts = [by_chunk([share[:, :, i] for share in shares], chunks) for i in (0, 1)]
        of_parts = [[x.unflatten(2, (2, -1))[:, :, i] for x in self.of_written] for i in (0, 1)]
        self.of_parts = [by_chunk(part, chunks) for part in of_parts]
        self.query_shared, self.of_outputs = by_chunk(reads.shared, chunks), by_chunk(of_reads.outputs, chunks)
        self.end = [list(matrix.unbind(0)) for matrix in gates.end.unbind(0)]
        self.leads = [list(matrix.unbind(0)) for matrix in (1.0 - gates.end[..., :1, :1]).unbind(0)]

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
        weights = [path.weights[chunk] for path in self.passed.paths]
        of_outputs, of_arriving = self.inner.step(chunk, weights, of_inputs, of_deltas)
        of_end, of_before = [], []
        for layer, (path, of_state) in enumerate(zip(self.passed.paths, of_after, strict=True)):
            pair = of_state.view_as(path.pairs[chunk])
            of_end.append(torch.bmm(pair, path.pairs[chunk].transpose(1, 2)))
            if self.of_led:
                self._into_anchor(chunk, layer, of_state, of_end[-1])
            before = torch.bmm(self.end[layer][chunk].transpose(1, 2), pair).view_as(of_state)
            before.baddbmm_(self.query_shared[layer][chunk].transpose(1, 2), self.of_outputs[layer][chunk])
            left, right = self.inputs[layer][chunk], of_outputs[layer]
            if layer:
                left = torch.cat([left, of_arriving[layer - 1]], 1)
                right = torch.cat([right, self.deltas[layer][chunk]], 1)
            # baddbmm_ into half a tensor would go one memory at a time.
            before[:, : before.shape[1] // 2] += torch.bmm(left.transpose(1, 2), right)
            of_before.append(before)
        self.of_end.append(of_end)
        if (memories := self.borders.restarts(chunk)) is not None:
            self._through_restart(memories, of_before)
        return of_before

    def of_gates(self) -> Gates:
        """Gradients at the fields of gates, once every chunk was stepped through."""
        of_end = torch.stack([torch.stack(chunks) for chunks in zip(*reversed(self.of_end), strict=True)])
        parts = zip(self.of_written, self.passed.trace.inputs, strict=True)
        of_write = torch.stack([-(of.unflatten(2, (2, -1)) * h.unsqueeze(2)).sum(-1) for of, h in parts])
        of_read, of_writes = torch.stack(self.of_reads.read), torch.stack(self.of_reads.writes)
        found = Gates(of_read, of_end, of_writes, of_write)
        return Gates(*(of.view_as(gate) for of, gate in zip(found, self.gates, strict=True)))

    def of_anchors(self) -> list[Tensor]:
        """Gradients at M_0, (H, d_in, d_out), from reads and chunk ends."""
        both = zip(self.of_reads.anchors, self.of_led, strict=True)
        return [read + led.unflatten(0, (-1, len(read))).sum(0) for read, led in both]

    def _into_anchor(self, chunk: int, layer: int, of_state: Tensor, of_end: Tensor) -> None:
        """Through (1 - a) M_0 at the end of a chunk: to M_0 and, in place, to a = end[0, 0]."""
        of_weights, anchor = of_state[:, : of_state.shape[1] // 2], self.borders.anchors[layer]
        self.of_led[layer].addcmul_(self.leads[layer][chunk], of_weights)
        by_head = of_weights.flatten(1).unflatten(0, (-1, len(anchor))).transpose(0, 1)  # (H, B, size)
        along = torch.bmm(by_head, anchor.flatten(1).unsqueeze(-1))
        of_end[:, 0, 0] -= along.squeeze(-1).transpose(0, 1).flatten()

    def _through_restart(self, memories: Tensor, of_before: list[Tensor]) -> None:
        """What arrives at states in which a document began belongs to its first state, not to the chunk before."""
        for layer, of_state in enumerate(of_before):
            total = self.of_fresh[layer]
            if total is None:
                total = self.of_fresh[layer] = torch.zeros_like(of_state)
            total[memories] += of_state[memories]
            of_state[memories] = 0.0

    def _through_shell(self, chunk: int, of_after: list[Tensor]) -> list[Tensor]:
        """Back through W = s U, s = limit / rms(U), where the shell acted: s (D - (D . W) W / (size limit^2))."""
        if self.passed.mean_squares is None:
            return of_after
        squares, limit = self.passed.mean_squares[chunk], self.rule.rms_limit
        beyond = self.rule.beyond(squares)
        if self.borders.full is not None:
            beyond &= self.borders.full[chunk].unsqueeze(-1)
        if not may_hold(beyond):
            return of_after
        states = [path.pairs[chunk + 1] for path in self.passed.paths]
        pairs = [of_state.view_as(state) for of_state, state in zip(of_after, states, strict=True)]
        means = [(pair * state).mean(-1) for pair, state in zip(pairs, states, strict=True)]
        along = self.network.shard.mean(torch.stack(means)).unsqueeze(-1) / limit**2
        scale = (limit * squares.masked_fill(~beyond, 1.0).rsqrt()).unsqueeze(-1)
        found = []
        for layer, (pair, state) in enumerate(zip(pairs, states, strict=True)):
            inside = scale[layer] * (pair - along[layer] * state)
            found.append(torch.where(beyond[layer].unsqueeze(-1), inside, pair).view_as(of_after[layer]))
        return found


class InnerGradient:
    """Goes back through the inner gradients of a group of chunks, one chunk at a time.

    What does not depend on the gradient that arrives is computed for all chunks at once.

    Args:
        network: With scale and shift for N memories.
        trace: Forward pass of all the group's keys, (g N, ...).
        error: Error of the answers.
        errors: Its back-propagation.
        chunks: g.
    """

    def __init__(self, network: Network, trace: Trace, error: Tensor, errors: Errors, chunks: int) -> None:
        self.network, self.trace, self.error, self.chunks = network, trace, error, chunks
        one = error.new_ones(())
        self.slopes = by_chunk([gelu_gradient(one.expand_as(z), z) for z in trace.hidden], chunks)
        bends = [p * gelu_second_derivative(z) for p, z in zip(errors.arriving, trace.hidden, strict=True)]
        self.bends = by_chunk(bends, chunks)
        self.of_error: list[Tensor] = []  # from the last chunk to the first, like the next
        self.of_scaled_error: list[Tensor] = []
        if network.residual_norm:
            self._prepare_norm(trace.normed, errors.deltas[-1])

    def _prepare_norm(self, normed: Normed, delta: Tensor) -> None:
        scaled_error = scaled(self.network, self.error.unflatten(0, (self.chunks, -1))).flatten(0, 1)
        along = (scaled_error * normed.value).mean(-1, keepdim=True) * normed.inverse_std
        share = normed.inverse_std / delta.shape[-1]
        parts = [along, normed.value, delta, normed.value * share, delta * share]
        self.along, self.value, self.delta, *weighted = by_chunk(parts, self.chunks)
        self.value_share, self.delta_share = weighted
        self.normed = [Normed(*parts) for parts in zip(*by_chunk(list(normed), self.chunks), strict=True)]

    def step(
        self, chunk: int, weights: list[Tensor], of_inputs: list[Tensor], of_deltas: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Go back through one chunk; they come from the last to the first.

        Args:
            chunk: Which.
            weights: That its gradients were taken at, (N, d_in, d_out).
            of_inputs: Gradients at the inputs; the rest of each is added in place, the keys' at [0].
            of_deltas: Gradients at the deltas; added to likewise.

        Returns:
            Gradients at the output of each matrix and at errors.arriving. With inputs and deltas as the other factors
            they are the gradients at the weights: inputs^T outputs + arriving^T deltas of the next matrix.
        """
        shard, depth = self.network.shard, len(weights)
        slopes, bends = [s[chunk] for s in self.slopes], [s[chunk] for s in self.bends]
        of_arriving, of_outputs = [], []
        for layer, (slope, bend) in enumerate(zip(slopes, bends, strict=True)):
            of_delta = shard.sum_at_output(layer, depth, of_deltas[layer])
            of_arriving.append(of_delta * slope)
            of_outputs.append(of_delta * bend)
            of_deltas[layer + 1].baddbmm_(of_arriving[-1], weights[layer + 1])
        of_outputs.append(shard.sum_at_output(depth - 1, depth, self._through_error(chunk, of_deltas[-1])))
        for layer in reversed(range(depth)):
            of_inputs[layer].baddbmm_(of_outputs[layer], weights[layer].transpose(1, 2))
            if layer:
                of_hidden = shard.sum_at_input(layer, depth, of_inputs[layer])
                of_outputs[layer - 1].addcmul_(of_hidden, slopes[layer - 1])
        return of_outputs, of_arriving

    def _through_error(self, chunk: int, of_delta: Tensor) -> Tensor:
        """From the last delta to the last matrix' output, by way of the error of the answer."""
        if not self.network.residual_norm:
            self.of_error.append(of_delta)
            return LOSS_SLOPE * of_delta
        normed = self.normed[chunk]
        of_scaled_error = normed.gradient(of_delta)
        self.of_scaled_error.append(of_scaled_error)
        self.of_error.append(scaled(self.network, of_scaled_error))
        of_raw = normed.gradient(scaled(self.network, LOSS_SLOPE * self.of_error[-1]))
        # delta = LN'(g) = r (g - mean g - n mean(g n)) depends on raw through n and r as well. With s the gradient at
        # delta, these parts come to -r (mean(g n) LN'(s) + mean(s n) delta + mean(s delta) n).
        of_raw.addcmul_(self.along[chunk], of_scaled_error, value=-1)
        along_value = (of_delta * self.value_share[chunk]).sum(-1, keepdim=True)
        along_delta = (of_delta * self.delta_share[chunk]).sum(-1, keepdim=True)
        return of_raw.addcmul_(along_value, self.delta[chunk], value=-1).addcmul_(
            along_delta, self.value[chunk], value=-1
        )

    def of_answers(self) -> Tensor:
        """Gradient at the answers M(k), minus that at the values, (g, N, b, D) for all chunks; partial with a shard."""
        return LOSS_SLOPE * torch.stack(self.of_error[::-1])

    def of_norm(self, of_answers: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients at scale and shift of the LayerNorm, (N, 1, D), partial if of_answers is."""
        of_weight = torch.stack(self.of_scaled_error[::-1]) * self.error.view_as(of_answers)
        of_weight.addcmul_(of_answers, self.trace.normed.value.view_as(of_answers))
        return of_weight.sum((0, 2)).unsqueeze(1), of_answers.sum((0, 2)).unsqueeze(1)


def by_chunk(tensors: list[Tensor], chunks: int) -> list[list[Tensor]]:
    """Views (N, ...) of each chunk of tensors (g N, ...); slicing in every step would cost as much as a product."""
    return [list(x.unflatten(0, (chunks, -1)).unbind(0)) for x in tensors]
