"""The oracle: the paper's memory as a literal loop over tokens, gradients from autograd. Slow, for every dtype.

Everything faster is proven equal to this file. It follows the paper's section 3.1 (equations 8 to 15) with the one
change that makes chunks possible: all gradients of a chunk are taken at the weights the chunk began with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .coefficients import by_channel
from .network import LAYER_NORM_EPS, Network, smallest_rms
from .shell import above_floor, anchor_of, below_limit
from .stability import gain, growth, load_mass, step_scale


def recurrent_scan(
    network: Network,
    tokens: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    initial: list[Tensor],
    chunk_size: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Update and read the memory token by token, beginning at the start of a chunk.

    Args:
        network: The memory network.
        tokens: Queries, keys and values (B, T, H, D), theta, eta and alpha (B, T, H, L). Alpha may come by channel
            instead, as L tensors (B, T, H, d_in).
        weights: L of (B, H, d_in, d_out) before the first token; momentum alike.
        initial: L of (H, d_in, d_out), the learned M_0; the state shell leads emptied weights back to them.
        chunk_size: Tokens that share the point at which their gradients are taken.

    Returns:
        What each token reads, (B, T, H, D), and the weights and momentum after the last one.
    """
    queries, keys, values, theta, eta, *alpha = tokens
    if not by_channel(tokens, len(weights)):
        alpha = list(alpha[0].split(1, -1))
    forget = [a.unsqueeze(-1) for a in alpha]  # for each matrix (B, T, H, d_in or 1, 1)
    reads = []
    for t in range(queries.shape[1]):
        if t % chunk_size == 0:
            chunk_start, chunk = weights, []
        token = _inner_gradient(network, chunk_start, keys[:, t], values[:, t])
        token.masses = list(load_mass(theta[:, t], eta[:, t]).unbind(-1))
        chunk.append(token)
        scale = step_scale(*_load(chunk))
        new_weights, new_momentum = [], []
        for layer, gradient in enumerate(token.gradients):
            theta_t, eta_t = (gate[:, t, :, layer, None, None] for gate in (theta, eta))
            surprise = eta_t * momentum[layer] - theta_t * scale[..., None, None] * gradient
            new_weights.append((1.0 - forget[layer][:, t]) * weights[layer] + surprise)
            new_momentum.append(surprise)
        weights, momentum = new_weights, new_momentum
        reads.append(_memory(network, weights, queries[:, t])[0])
        if (t + 1) % chunk_size == 0:
            smallest = [smallest_rms(network.residual_norm, len(weights), w.shape[-2]) for w in weights]
            weights = [
                above_floor(below_limit(w), rms, anchor_of(start))
                for w, rms, start in zip(weights, smallest, initial, strict=True)
            ]
            momentum = [below_limit(s) for s in momentum]
    return torch.stack(reads, 1), weights, momentum


@dataclass
class _Token:
    """One token's inner gradient, by matrix: gradients (B, H, d_in, d_out), inputs (B, H, d_in), the rest (B, H)."""

    gradients: list[Tensor]
    inputs: list[Tensor]
    gains: list[Tensor]
    growths: list[Tensor]
    masses: list[Tensor]


def _memory(network: Network, weights: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """M(x) for x (B, H, D), with the input and the output of each matrix."""
    inputs, outputs = [], []
    h = x
    for weight in weights:
        inputs.append(h)
        outputs.append((h.unsqueeze(-2) @ weight).squeeze(-2))
        h = F.gelu(outputs[-1])
    if not network.residual_norm:
        return outputs[-1], inputs, outputs
    normed = F.layer_norm(outputs[-1], outputs[-1].shape[-1:], eps=LAYER_NORM_EPS)
    if network.norm_weight is not None:
        normed = normed * network.norm_weight
    if network.norm_bias is not None:
        normed = normed + network.norm_bias
    return x + normed, inputs, outputs


def _inner_gradient(network: Network, weights: list[Tensor], key: Tensor, value: Tensor) -> _Token:
    """Gradient of |M(key) - value|^2; differentiable itself when the caller's gradients are on."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Through aliases of the weights: the key may depend on the same weights (MAC recalls them), and that path is
        # no part of the inner gradient.
        weights = [w.view_as(w) if differentiable and w.requires_grad else w.detach().requires_grad_() for w in weights]
        answer, inputs, outputs = _memory(network, weights, key)
        error = answer - value
        gradients = torch.autograd.grad(error.square().sum(), weights, create_graph=differentiable, retain_graph=True)
        # The gains look at the network without LayerNorm's projection; see network.reach.
        sent = 2.0 * error * _layer_norm_scale(network, outputs[-1])
        reached = torch.autograd.grad(outputs[-1], outputs, sent, create_graph=differentiable)
        gains = [gain(delta, 2.0 * error) for delta in reached]
        growths = [
            growth(delta.square().sum(-1), h.square().sum(-1), w.shape[-2] * w.shape[-1])
            for delta, h, w in zip(reached, inputs, weights, strict=True)
        ]
    if not differentiable:
        inputs, gains, growths = ([x.detach() for x in xs] for xs in (inputs, gains, growths))
    return _Token(list(gradients), inputs, gains, growths, [])


def _layer_norm_scale(network: Network, mlp_output: Tensor) -> Tensor:
    """What LayerNorm multiplies its centred input by, scale included; 1 for a plain network."""
    if not network.residual_norm:
        return torch.ones_like(mlp_output)
    scale = (mlp_output.var(-1, unbiased=False, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    return scale.expand_as(mlp_output) if network.norm_weight is None else scale * network.norm_weight


def _load(chunk: list[_Token]) -> tuple[Tensor, Tensor]:
    """What the newest token of a chunk adds to the step bound's load, and the load without it; both (B, H)."""
    now = chunk[-1]
    parts = []
    for token in chunk:
        part = torch.zeros_like(now.gains[0])
        for layer, mass in enumerate(token.masses):
            similarity = (token.inputs[layer] * now.inputs[layer]).sum(-1).abs()
            pull = token.gains[layer] * now.gains[layer] * similarity
            part = part + mass * (pull + token.growths[layer])
        parts.append(part)
    return parts[-1], torch.stack([torch.zeros_like(parts[-1]), *parts[:-1]]).sum(0)
