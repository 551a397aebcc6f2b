"""The fused kernels behind the same door as the chunk form, where they are installed and fit."""

import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checkpoint import Recomputed
from .chunk import coefficients
from .inputs import Matrices, Tokens
from .layout import Chunks
from .rule import VERSION, Memory, Rule, last_step_share, step_mass

# By name: this file travels with an exported model, which uses the kernels where the package is installed.
_KERNELS = "titans_mcore.kernels"
_SMALLEST_BLOCK = 16  # tokens that a matrix product in a kernel takes at least


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
    """From gates (L, g, N, b); what autograd differentiates around the kernels.

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


def held_theta(rule: Rule, tokens: Tokens) -> Tensor:
    """theta (B, T, H, 1) of a single matrix as the rule takes it: its inputs are the keys. Of two it is as it was."""
    if not rule.holds_last:
        return tokens.theta
    square = tokens.keys.to(tokens.theta.dtype).square().sum(-1, keepdim=True)
    return tokens.theta * last_step_share(step_mass(tokens.theta, tokens.eta), square)


def chunk_mass(rule: Rule, theta: Tensor, eta: Tensor) -> Tensor | None:
    """b times theta / (1 - eta) of the first of two matrices, (g, N, b), from gates (L, g, N, b).

    None where the rule holds no step of a lower matrix. What the first of two matrices pulls is this times
    |k|^2 |delta|^2, which the kernels know.
    """
    return rule.lower_steps(len(theta)) * step_mass(theta[0], eta[0]) if rule.exact and len(theta) == 2 else None


def why_not_fused(memory: Memory, queries: Tensor, *, channelwise: bool, sharded: bool) -> str:
    """Why the fused kernels cannot run for these arguments, in a sentence; empty if they can."""
    if sharded:
        return "the fused memory kernels compute whole memories, not parts of them; use memory backend 'chunked'"
    if channelwise:
        return "the fused memory kernels forget by head, not by channel; use memory backend 'chunked'"
    if memory.rule.holds_last and len(memory.initial) > 1:
        return "the fused memory kernels lack the stable rule of plain networks of several matrices; use 'chunked'"
    if importlib.util.find_spec(_KERNELS.partition(".")[0]) is None:
        return "the fused memory kernels come with the titans-mcore package; install it or use memory backend 'chunked'"
    kernels = importlib.import_module(_KERNELS)
    if getattr(kernels, "VERSION", None) != VERSION:
        return "the fused memory kernels installed are another version's; install this titans-mcore, or use 'chunked'"
    reason: str = kernels.fused_fits(queries, memory.initial, memory.rule.chunk_size)
    return reason


def fused_scan(
    memory: Memory, tokens: Tokens, start: Matrices, chunks: Chunks, fresh: Matrices | None = None
) -> tuple[Tensor, Matrices]:
    """The same as chunk.chunk_scan; queries, keys and values in half precision are multiplied as such."""
    network, rule = memory.network, memory.rule
    batch, length, heads = tokens.keys.shape[:3]
    device, size, block = tokens.keys.device, chunks.size, _block(chunks.size)
    if block != size:
        tokens = tokens.map(lambda x: _into_blocks(x, size, block))
        counts = torch.full((length // size, batch), size) if chunks.counts is None else chunks.counts
        chunks = Chunks(block, chunks.closed, counts, chunks.restarts)
    assert isinstance(tokens.alpha, Tensor)

    def coefficients_of(theta: Tensor, eta: Tensor, alpha: Tensor, real: Tensor | None) -> tuple[Tensor, ...]:
        gates, mass = gates_of(theta, eta, alpha, real), chunk_mass(rule, theta, eta)
        return gates if mass is None else (*gates, mass)

    # What leads from gates to coefficients is several times what either are: the backward pass makes it again.
    gates = [chunks.split_gate(x) for x in (held_theta(rule, tokens), tokens.eta, tokens.alpha)]
    every: list[Any] = [*gates, chunks.real(heads, device)]
    found = Recomputed.apply(coefficients_of, *every) if torch.is_grad_enabled() else coefficients_of(*every)
    closed: bool | Tensor = chunks.closed
    if chunks.closed and chunks.counts is not None:
        closed = (chunks.counts == size).to(device)
    first: dict[str, Any] = {}
    if chunks.restarts is not None:
        assert fresh is not None
        first = {
            "restarts": chunks.restarts.to(device),
            "fresh_weights": [w.flatten(0, 1) for w in fresh.weights],
            "fresh_momentum": [s.flatten(0, 1) for s in fresh.momentum],
        }
    kernels = importlib.import_module(_KERNELS)
    borders = kernels.Borders(
        closed, anchors=memory.initial if rule.anchored else [], rms_limit=rule.rms_limit, **first
    )
    reads, weights, momentum = kernels.fused_scan(
        tokens.queries,
        tokens.keys,
        tokens.values,
        Gates(*found[:4]),
        start.weights,
        start.momentum,
        residual_norm=network.residual_norm,
        exact=rule.exact,
        mass=found[4] if len(found) > 4 else None,
        norm_weight=network.norm_weight,
        norm_bias=network.norm_bias,
        borders=borders,
    )
    if block != size:
        reads = reads.unflatten(1, (-1, block))[:, :, :size].flatten(1, 2)
    return reads, Matrices(weights, momentum)


def _block(size: int) -> int:
    """Slots of a chunk as the kernels take them: a power of two."""
    return max(_SMALLEST_BLOCK, 1 << (size - 1).bit_length())


def _into_blocks(x: Tensor, size: int, block: int) -> Tensor:
    """Tokens (B, C size, ...) in chunks of more slots, the rest of them empty, (B, C block, ...)."""
    by_chunk = x.unflatten(1, (-1, size))
    return F.pad(by_chunk, (0, 0) * (x.dim() - 2) + (0, block - size)).flatten(1, 2)
