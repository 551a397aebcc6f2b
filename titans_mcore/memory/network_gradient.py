"""Gradient through a memory's inner gradient: the keys' forward pass and the back-propagation of its error.

What an update writes are the inputs h and errors delta that network.forward and network.back_propagate have found. Both
are functions of the weights, so the outer gradient comes back through both: upward through the back-propagation, where
the second derivatives of GELU and LayerNorm appear, then downward through the forward pass.

Where processes hold parts of the weights, what arrives at the last matrix' output stays partial up to there and is
summed once, before it goes down through the parts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .network import Errors, Network, Normed, Trace, gelu_gradient, gelu_second_derivative, scaled
from .sharing import once, once_at_output, sum_at_input, sum_at_output


class WeightGradient(NamedTuple):
    """A chunk's gradients at the weights, as factors: inputs^T outputs + arriving^T deltas, by matrix.

    Attributes:
        outputs: Gradient at the output of each matrix, (N, b, d_out).
        arriving: Gradient at errors.arriving, for each matrix but the last; it belongs to the next matrix.
    """

    outputs: list[Tensor]
    arriving: list[Tensor]


class ReachGradient(NamedTuple):
    """Gradients of the step bound by way of network.reach, for one chunk.

    Attributes:
        error: At the answers' error, (N, b, D); partial with a share.
        outputs: At the output of each matrix, (N, b, d_out); partial for the last.
        arriving: At reach.arriving, for each matrix but the last; with reach.deltas it is a gradient at the weights.
        deltas: Those deltas.
    """

    error: Tensor
    outputs: list[Tensor]
    arriving: list[Tensor]
    deltas: list[Tensor]


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
        self.of_reached_error: dict[int, Tensor] = {}  # by chunk, where the step bound acted
        if network.residual_norm:
            self._prepare_norm(trace.normed, errors.deltas[-1])

    def _prepare_norm(self, normed: Normed, delta: Tensor) -> None:
        scaled_error = scaled(self.network, self.error.unflatten(0, (self.chunks, -1))).flatten(0, 1)
        along = (scaled_error * normed.value).mean(-1, keepdim=True) * normed.inverse_std
        both = torch.stack([normed.value, delta], 2)
        weighted = both * (normed.inverse_std / delta.shape[-1]).unsqueeze(-1)
        self.along, self.both, self.weighted = by_chunk([along, both.flip(2), weighted], self.chunks)
        self.normed = [Normed(*parts) for parts in zip(*by_chunk(list(normed), self.chunks), strict=True)]

    def step(
        self,
        chunk: int,
        weights: list[Tensor],
        of_inputs: list[Tensor],
        of_deltas: list[Tensor],
        bound: ReachGradient | None,
    ) -> WeightGradient:
        """Go back through one chunk; they come from the last to the first.

        Args:
            chunk: Which.
            weights: That its gradients were taken at, (N, d_in, d_out).
            of_inputs: Gradients at the inputs; the rest of each is added in place, the keys' at [0].
            of_deltas: Gradients at the deltas; added to likewise.
            bound: What the step bound adds; None where it did not act.
        """
        share, depth = self.network.share, len(weights)
        slopes, bends = [s[chunk] for s in self.slopes], [s[chunk] for s in self.bends]
        of_arriving, of_outputs = [], []
        for layer, (slope, bend) in enumerate(zip(slopes, bends, strict=True)):
            of_delta = sum_at_output(share, layer, depth, of_deltas[layer])
            of_arriving.append(of_delta * slope)
            of_outputs.append(of_delta * bend)
            of_deltas[layer + 1].baddbmm_(of_arriving[-1], weights[layer + 1])
        of_outputs.append(self._through_error(chunk, of_deltas[-1], None if bound is None else bound.error))
        for of_output, part in zip(of_outputs, [] if bound is None else bound.outputs, strict=bound is not None):
            of_output += part
        of_outputs[-1] = sum_at_output(share, depth - 1, depth, of_outputs[-1])
        for layer in reversed(range(depth)):
            of_inputs[layer].baddbmm_(of_outputs[layer], weights[layer].transpose(1, 2))
            if layer:
                of_hidden = sum_at_input(share, layer, depth, of_inputs[layer])
                of_outputs[layer - 1].addcmul_(of_hidden, slopes[layer - 1])
        return WeightGradient(of_outputs, of_arriving)

    def _through_error(self, chunk: int, of_delta: Tensor, of_error: Tensor | None) -> Tensor:
        """From the last delta to the last matrix' output, by way of the error of the answer."""
        if not self.network.residual_norm:
            self.of_error.append(of_delta if of_error is None else of_delta + of_error)
            return 2.0 * self.of_error[-1]
        normed = self.normed[chunk]
        of_scaled_error = normed.gradient(of_delta)
        self.of_scaled_error.append(of_scaled_error)
        through_error = scaled(self.network, of_scaled_error)
        self.of_error.append(through_error if of_error is None else through_error + of_error)
        of_raw = normed.gradient(scaled(self.network, 2.0 * self.of_error[-1]))
        # delta = LN'(g) = r (g - mean g - n mean(g n)) depends on raw through n and r as well. With s the gradient at
        # delta, these parts come to -r (mean(g n) LN'(s) + mean(s n) delta + mean(s delta) n).
        of_raw.addcmul_(self.along[chunk], of_scaled_error, value=-1)
        moments = (of_delta.unsqueeze(2) * self.weighted[chunk]).sum(-1, keepdim=True)
        return of_raw.sub_((moments * self.both[chunk]).sum(2))

    def prepare_reach(self, reach: Errors) -> None:
        """Gets ready for through_reach, with the reach of all chunks."""
        bends = [p * gelu_second_derivative(z) for p, z in zip(reach.arriving, self.trace.hidden, strict=True)]
        self.reach_bends, self.reach_deltas = by_chunk(bends, self.chunks), by_chunk(reach.deltas, self.chunks)

    def through_reach(
        self, chunk: int, weights: list[Tensor], of_deltas: Tensor, of_error: Tensor, error: Tensor
    ) -> ReachGradient:
        """From the gradients of the loads to what the chunk's step has to add.

        Args:
            chunk: Which.
            weights: As for step.
            of_deltas: What the reach's deltas are multiplied with to give the gradients at them, (L, N, b).
            of_error: Likewise for the answers' error, (N, b).
            error: The answers' error, (N, b, D).
        """
        share, depth = self.network.share, len(weights)
        deltas = [delta[chunk] for delta in self.reach_deltas]
        along_deltas = [once_at_output(share, layer, depth, x) for layer, x in enumerate(of_deltas.unbind(0))]
        at_deltas = [delta * along.unsqueeze(-1) for delta, along in zip(deltas, along_deltas, strict=True)]
        at_error = error * once(share, of_error).unsqueeze(-1)
        of_outputs, of_arriving = [], []
        for layer, (slope, bend) in enumerate(zip(self.slopes, self.reach_bends, strict=True)):
            at_delta = sum_at_output(share, layer, depth, at_deltas[layer])
            of_arriving.append(at_delta * slope[chunk])
            of_outputs.append(at_delta * bend[chunk])
            at_deltas[layer + 1].baddbmm_(of_arriving[-1], weights[layer + 1])
        if not self.network.residual_norm:
            return ReachGradient(
                at_error + at_deltas[-1], [*of_outputs, torch.zeros_like(at_error)], of_arriving, deltas
            )
        # reach = r s with the scaled error s; r = 1 / std depends on the output: dr/d(raw) = -r^2 n / D.
        normed, of_reach = self.normed[chunk], at_deltas[-1]
        of_scaled_error = of_reach * normed.inverse_std
        self.of_reached_error[chunk] = of_scaled_error
        along = (of_reach * deltas[-1]).mean(-1, keepdim=True) * normed.inverse_std
        at_error += scaled(self.network, of_scaled_error)
        return ReachGradient(at_error, [*of_outputs, -along * normed.value], of_arriving, deltas)

    def of_answers(self) -> Tensor:
        """Gradient at the answers M(k), minus that at the values, (g, N, b, D) for all chunks; partial with a share."""
        return 2.0 * torch.stack(self.of_error[::-1])

    def of_norm(self, of_answers: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients at scale and shift of the LayerNorm, (N, 1, D), partial if of_answers is."""
        error = self.error.view_as(of_answers)
        of_weight = torch.stack(self.of_scaled_error[::-1]) * error
        for chunk, of_scaled_error in self.of_reached_error.items():
            of_weight[chunk] += of_scaled_error * error[chunk]
        of_weight.addcmul_(of_answers, self.trace.normed.value.view_as(of_answers))
        return of_weight.sum((0, 2)).unsqueeze(1), of_answers.sum((0, 2)).unsqueeze(1)


def by_chunk(tensors: list[Tensor], chunks: int) -> list[list[Tensor]]:
    """Views (N, ...) of each chunk of tensors (g N, ...); slicing in every step would cost as much as a product."""
    return [list(x.unflatten(0, (chunks, -1)).unbind(0)) for x in tensors]
