"""The oracle: the paper's memory as a literal loop over tokens, gradients from autograd. Slow, for every dtype.

Everything faster is proven equal to this file. It follows the paper's section 3.1 (equations 8 to 15) with the one
change that makes chunks possible: all gradients of a chunk are taken at the weights the chunk began with, but for what
the stable rule, in rule.py, does otherwise.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import Matrices, Tokens
from .rule import (
    LAYER_NORM_EPS,
    WHOLE,
    Memory,
    Network,
    Rule,
    last_step_share,
    lower_step_share,
    removable_loss,
    step_mass,
)


def naive_scan(memory: Memory, tokens: Tokens, start: Matrices) -> tuple[Tensor, Matrices]:
    """Update and read the memory token by token, beginning at the start of a chunk.

    Args:
        memory: The memory, its matrices whole.
        tokens: The tokens.
        start: Weights and momentum before the first token.

    Returns:
        What each token reads, (B, T, H, D), and weights and momentum after the last one.
    """
    network, rule, initial = memory.network, memory.rule, memory.initial
    weights, momentum = start.weights, start.momentum
    anchors = initial if rule.anchored else [torch.zeros_like(w) for w in initial]
    alpha = tokens.alpha if isinstance(tokens.alpha, list) else list(tokens.alpha.split(1, -1))
    reads = []
    for t in range(tokens.queries.shape[1]):
        if t % rule.chunk_size == 0:
            chunk_start = weights
        theta, exact_last = tokens.theta[:, t], weights[-1] if rule.exact else None
        gradients, inputs, removable = inner_gradient(
            network, chunk_start, tokens.keys[:, t], tokens.values[:, t], exact_last
        )
        if rule.exact:
            theta = held_steps(rule, theta, tokens.eta[:, t], gradients, inputs, removable)
        new_weights, new_momentum = [], []
        for layer, gradient in enumerate(gradients):
            kept = 1.0 - alpha[layer][:, t].unsqueeze(-1)  # (B, H, d_in or 1, 1)
            surprise = (
                tokens.eta[:, t, :, layer, None, None] * momentum[layer] - theta[..., layer, None, None] * gradient
            )
            new_weights.append(anchors[layer] + kept * (weights[layer] - anchors[layer]) + surprise)
            new_momentum.append(surprise)
        weights, momentum = new_weights, new_momentum
        reads.append(apply(network, weights, tokens.queries[:, t]))
        if (t + 1) % rule.chunk_size == 0:
            weights, momentum = ([rule.into_shell(x, WHOLE) for x in xs] for xs in (weights, momentum))
    return torch.stack(reads, 1), Matrices(weights, momentum)


def apply(network: Network, weights: list[Tensor], x: Tensor) -> Tensor:
    """M(x) for x (B, H, D)."""
    return answer_of(network, x, mlp(weights, x)[0])


def mlp(weights: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of the last matrix for x (B, H, D), and the input of each."""
    inputs, h = [], x
    for weight in weights:
        inputs.append(h)
        z = (h.unsqueeze(-2) @ weight).squeeze(-2)
        h = F.gelu(z)
    return z, inputs


def answer_of(network: Network, x: Tensor, z: Tensor) -> Tensor:
    """M(x) from the output of the last matrix."""
    if not network.residual_norm:
        return z
    normed = F.layer_norm(z, z.shape[-1:], eps=LAYER_NORM_EPS)
    if network.norm_weight is not None:
        normed = normed * network.norm_weight
    if network.norm_bias is not None:
        normed = normed + network.norm_bias
    return x + normed


def inner_gradient(
    network: Network, weights: list[Tensor], key: Tensor, value: Tensor, exact_last: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of |M(key) - value|^2 by matrix, the inputs of the matrices, and what can be removed of it (B, H).

    Differentiable itself when the caller's gradients are on.

    Args:
        network: The memory network.
        weights: At which they are taken.
        key: (B, H, D), like value.
        value: What is to be answered.
        exact_last: The last matrix with which M(key) and its error are worked out instead; None for the one of
            `weights`.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Through aliases of the weights: the key may depend on the same weights (MAC recalls them), and that path is
        # no part of the inner gradient.
        weights = [w.view_as(w) if differentiable and w.requires_grad else w.detach().requires_grad_() for w in weights]
        z, inputs = mlp(weights, key)
        own = z if exact_last is None else (inputs[-1].unsqueeze(-2) @ exact_last).squeeze(-2)
        own = own if own.requires_grad else own.requires_grad_()
        loss = (answer_of(network, key, own) - value).square().sum(-1)
        (delta,) = torch.autograd.grad(loss.sum(), own, create_graph=differentiable)
        gradients = torch.autograd.grad(z, weights, delta, create_graph=differentiable)
    removable = loss
    if network.residual_norm:
        normed = F.layer_norm(own, own.shape[-1:], eps=LAYER_NORM_EPS)
        scale = 1.0 if network.norm_weight is None else network.norm_weight
        shift = 0.0 if network.norm_bias is None else network.norm_bias
        aim = 2.0 * scale * (key + shift - value)
        removable = removable_loss(normed, aim - aim.mean(-1, keepdim=True))
    if not differentiable:
        inputs, removable = [x.detach() for x in inputs], removable.detach()
    return list(gradients), inputs, removable


def held_steps(
    rule: Rule, theta: Tensor, eta: Tensor, gradients: list[Tensor], inputs: list[Tensor], removable: Tensor
) -> Tensor:
    """theta (B, H, L) as an exact rule takes it."""
    mass = step_mass(theta, eta)
    last = theta[..., -1:]
    if rule.holds_last:
        last = last * last_step_share(mass[..., -1:], inputs[-1].square().sum(-1, keepdim=True))
    if theta.shape[-1] == 1:
        return last
    squares = torch.stack([g.square().sum((-1, -2)) for g in gradients[:-1]], -1)
    share = lower_step_share(removable, (mass[..., :-1] * squares).sum(-1), rule.lower_steps(theta.shape[-1]))
    return torch.cat([theta[..., :-1] * share.unsqueeze(-1), last], -1)
