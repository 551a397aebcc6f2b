"""The dual form with a forget rate for every channel of a matrix' input, differentiated by autograd.

(1 - alpha) is then a diagonal matrix at the left of W, and what the dual form knows as numbers, G[t, j] and a_t, are
vectors over the channels. The chunk loop is written for reading; a group of chunks is computed again in the backward
pass, so that like in checkpointed.py the states of only some chunks are kept. Shared memories are added up again in it,
and a chunk takes a sum for each of its quantities: its prediction, its load, its reads, the size of each state.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .checkpointed import group_size
from .coefficients import Coefficients, coefficients
from .network import LAYER_NORM_EPS, Network, Normed, answer, back_propagate, forward, normalise, reach, smallest_rms
from .packing import Chunks
from .sharing import into_input, into_output, of_rows, spread, sum_at_output, whole_shape
from .shell import above_floor, anchors_of, below_limit
from .stability import chunk_load, load_mass, step_scale


def channelwise_scan(
    network: Network,
    tokens: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    initial: list[Tensor],
    chunks: Chunks,
    fresh: tuple[list[Tensor], list[Tensor]] | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same as checkpointed.chunked_scan with alpha as L tensors (B, C b, H, d_in)."""
    batch, length, heads = tokens[0].shape[:3]
    share = None if network.share is None else network.share.differentiable()
    rows = replace(network.for_memories(batch), share=share)
    anchors = [x.expand(batch, *x.shape).flatten(0, 1) for x in anchors_of(initial, share)]
    state = [x.flatten(0, 1) for x in (*weights, *momentum)]
    first = [] if fresh is None else [x.flatten(0, 1) for x in (*fresh[0], *fresh[1])]
    step = group_size(length // chunks.size)
    reads = []
    for begin in range(0, length // chunks.size, step):
        group = slice(begin, begin + step)
        part = [x[:, group.start * chunks.size : group.stop * chunks.size] for x in tokens]
        arguments = (rows, chunks.group(group), len(weights), heads, *part, *anchors, *state, *first)
        read, *state = checkpoint(_group, *arguments, use_reentrant=False)
        reads.append(read)
    end = [x.unflatten(0, (batch, heads)) for x in state]
    return torch.cat(reads, 1), end[: len(weights)], end[len(weights) :]


def _group(network: Network, chunks: Chunks, depth: int, heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Reads and the state after some chunks."""
    queries, keys, values, theta, eta, *rest = tensors
    alpha, rest = rest[:depth], rest[depth:]
    anchors, state, fresh = rest[:depth], list(rest[depth : 3 * depth]), rest[3 * depth :]
    by_chunk = [chunks.split(x) for x in (queries, keys, values, theta, eta, *alpha)]
    device = queries.device
    real, full, restarted = chunks.real(heads, device), chunks.full(heads, device), chunks.restarted(heads, device)
    reads = []
    for c in range(len(by_chunk[0])):
        if restarted and (memories := restarted[c]) is not None:
            state = [x.index_copy(0, memories, first[memories]) for x, first in zip(state, fresh, strict=True)]
        here = None if real is None else real[c]
        read, after = _chunk(network, [x[c] for x in by_chunk], state, here)
        reads.append(read)
        if chunks.closed:
            inside = _into_shell(network, after, anchors)
            if full is not None:
                inside = [torch.where(full[c, :, None, None], a, b) for a, b in zip(inside, after, strict=True)]
            after = inside
        state = after
    return chunks.join(torch.stack(reads), len(queries)), *state


def _chunk(
    network: Network, tokens: list[Tensor], state: list[Tensor], real: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """What a chunk's queries read, (N, b, D), and the state after it; tokens (N, b, ...), state 2 L of (N, ...)."""
    queries, keys, values, theta, eta, *alpha = tokens
    depth = len(state) // 2
    weights, momentum = state[:depth], state[depth:]
    trace = forward(network, weights, keys)
    if network.residual_norm:
        trace.normed = _WrittenOut.of(trace.normed.raw)
    error = 2.0 * (answer(network, keys, trace.normed.value) - values)
    errors = back_propagate(network, weights, trace, error)
    rates = theta.permute(2, 0, 1), eta.permute(2, 0, 1)  # (L, N, b)
    reached, share = reach(network, weights, trace, error, errors).deltas, network.share
    load = chunk_load(trace.inputs, reached, error, load_mass(rates[0], rates[1]), share=share)
    steps = spread(share, rates[0] * step_scale(load.own, load.before))
    etas = spread(share, rates[1])
    z = queries
    after_weights, after_momentum = [], []
    for layer, (h, delta) in enumerate(zip(trace.inputs, errors.deltas, strict=True)):
        x = into_input(share, layer, depth, F.gelu(z) if layer else queries)
        delta = into_output(share, layer, depth, delta)
        part = _of_channels(etas[layer], of_rows(share, layer, depth, alpha[layer]), real)
        writes = part.writes * steps[layer][:, None, None]  # (N, d_in, b, b)
        attended = torch.einsum("ntc,njc,nctj->ntj", x, h, writes)
        z = (x * part.keep.mT) @ weights[layer] + (x * part.carried.mT) @ momentum[layer] - attended @ delta
        z = sum_at_output(share, layer, depth, z)
        end = part.keep[..., -1:] * weights[layer] + part.carried[..., -1:] * momentum[layer]
        after_weights.append(end - (h.mT * writes[:, :, -1]) @ delta)
        left = part.momentum[..., -1:] * momentum[layer]
        after_momentum.append(left - (h.mT * part.decay[:, :, -1] * steps[layer].unsqueeze(1)) @ delta)
    reads = answer(network, queries, normalise(network, z).value)
    return reads, [*after_weights, *after_momentum]


class _WrittenOut(Normed):
    """LayerNorm in operations that autograd differentiates twice; torch's own hides its derivative by the deviation."""

    @classmethod
    def of(cls, raw: Tensor) -> "_WrittenOut":
        mean = raw.mean(-1, keepdim=True)
        centred = raw - mean
        inverse_std = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        return cls(raw, centred * inverse_std, mean, inverse_std)

    def gradient(self, value_gradient: Tensor) -> Tensor:
        along = (value_gradient * self.value).mean(-1, keepdim=True)
        return self.inverse_std * (value_gradient - value_gradient.mean(-1, keepdim=True) - along * self.value)


def _of_channels(eta: Tensor, alpha: Tensor, real: Tensor | None) -> Coefficients:
    """Coefficients (N, d_in or 1, b ...) for eta (N, b) and alpha (N, b, d_in)."""
    there = None if real is None else real.unsqueeze(1)
    return coefficients(eta.unsqueeze(1), alpha.mT, there)


def _into_shell(network: Network, state: list[Tensor], anchors: list[Tensor]) -> list[Tensor]:
    """The state shell, for all memories."""
    depth, share = len(anchors), network.share
    widths = [whole_shape(share, layer, depth, w.shape)[0] for layer, w in enumerate(anchors)]
    floors = [smallest_rms(network.residual_norm, depth, width) for width in widths]
    weights = [
        above_floor(below_limit(w, share), floor, anchor, share)
        for w, floor, anchor in zip(state[:depth], floors, anchors, strict=True)
    ]
    return [*weights, *(below_limit(s, share) for s in state[depth:])]
