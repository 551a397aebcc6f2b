"""The dual form: a chunk's updates and reads as matrix products, no gradient of a single token is ever built.

Token j's gradient at one matrix is the outer product of the matrix's input h_j and the error delta_j at its output,
both at the chunk's first weights. With G = A E diag(theta) the answer of one matrix to token t's query x_t is
a_t x_t W + f_t x_t S - sum_{j <= t} G[t, j] (x_t . h_j) delta_j, and the weights after the chunk are two products more.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .coefficients import coefficients
from .network import Network, back_propagate, finish, forward
from .stability import gain, into_ball, step_mass, step_scale


def chunked_scan(
    network: Network,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor],
    chunk_size: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same as recurrence.recurrent_scan, chunk by chunk; see there for arguments and results.

    The tokens are whole chunks, or one chunk that is still open.
    """
    length = queries.shape[1]
    closed = length % chunk_size == 0
    size = chunk_size if closed else length
    chunks = _split_into_chunks(size, queries, keys, values, theta, eta, alpha)
    reads = []
    for chunk in chunks:
        read, weights, momentum = _one_chunk(network, chunk, weights, momentum)
        if closed:
            weights, momentum = [into_ball(w) for w in weights], [into_ball(s) for s in momentum]
        reads.append(read)
    return torch.stack(reads, 1).transpose(2, 3).flatten(1, 2), weights, momentum


class _Chunk(NamedTuple):
    """One chunk's tokens: queries, keys, values (B, H, b, D); theta, mass (B, H, L, b); coefficients (B, H, L, b ...)."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    theta: Tensor
    mass: Tensor
    keep: Tensor
    carried: Tensor
    momentum: Tensor
    writes: Tensor
    decay: Tensor


def _split_into_chunks(
    size: int, queries: Tensor, keys: Tensor, values: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor
) -> list[_Chunk]:
    """Every chunk's tokens and coefficients; what does not depend on the running state is computed for all at once."""

    def split(x: Tensor) -> Tensor:  # (B, T, H, F) -> (chunks, B, H, b, F)
        return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)

    theta, eta, alpha = (split(gate).transpose(-1, -2) for gate in (theta, eta, alpha))
    gates = coefficients(eta, alpha)
    parts = (split(queries), split(keys), split(values), theta, step_mass(theta, eta))
    parts += (gates.keep, gates.carried, gates.momentum, gates.writes, gates.decay)
    # unbind once: indexing chunk by chunk would make the backward pass quadratic in the number of chunks.
    return [_Chunk._make(chunk) for chunk in zip(*(part.unbind(0) for part in parts), strict=True)]


def _one_chunk(
    network: Network, chunk: _Chunk, weights: list[Tensor], momentum: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    trace = forward(network, weights, chunk.keys)
    output_error = 2.0 * (trace.output - chunk.values)
    deltas = back_propagate(network, weights, trace, output_error)
    scale = step_scale(*_loads(chunk, trace.inputs, deltas, output_error))
    theta = chunk.theta * scale.unsqueeze(-2)  # (B, H, L, b)
    writes = chunk.writes * theta.unsqueeze(-2)  # G
    x = chunk.queries
    new_weights, new_momentum = [], []
    for layer, (weight, surprise) in enumerate(zip(weights, momentum, strict=True)):
        h, delta = trace.inputs[layer], deltas[layer]
        keep, carried = chunk.keep[:, :, layer, :, None], chunk.carried[:, :, layer, :, None]
        attended = (x @ h.transpose(-1, -2)) * writes[:, :, layer]
        z = keep * (x @ weight) + carried * (x @ surprise) - attended @ delta
        x = F.gelu(z) if layer < len(weights) - 1 else z
        written = (h * writes[:, :, layer, -1, :, None]).transpose(-1, -2) @ delta
        remembered = chunk.decay[:, :, layer, -1] * theta[:, :, layer]
        new_weights.append(keep[..., -1:, :] * weight + carried[..., -1:, :] * surprise - written)
        new_momentum.append(
            chunk.momentum[:, :, layer, -1, None, None] * surprise
            - (h * remembered.unsqueeze(-1)).transpose(-1, -2) @ delta
        )
    return finish(network, chunk.queries, x), new_weights, new_momentum


def _loads(chunk: _Chunk, inputs: list[Tensor], deltas: list[Tensor], output_error: Tensor) -> tuple[Tensor, Tensor]:
    """For every token what it adds to the step bound's load and the load, both (B, H, b)."""
    own, load = torch.zeros_like(output_error[..., 0]), torch.zeros_like(output_error[..., 0])
    for layer, (h, delta) in enumerate(zip(inputs, deltas, strict=True)):
        reach = gain(delta, output_error)
        moved = chunk.mass[:, :, layer] * reach
        similarity = (h @ h.transpose(-1, -2)).abs().tril()
        load = load + 2.0 * reach * (similarity @ moved.unsqueeze(-1)).squeeze(-1)
        own = own + 2.0 * reach * similarity.diagonal(dim1=-2, dim2=-1) * moved
    return own, load
