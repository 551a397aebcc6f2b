"""Problems for the fused kernels, and their answer by the literal loop of memory/naive.py, chunk after chunk."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_mcore.kernels import Borders, fused_scan
from titans_mcore.memory.fused import chunk_mass, gates_of, held_theta
from titans_mcore.memory.inputs import Matrices, Tokens
from titans_mcore.memory.naive import naive_scan
from titans_mcore.memory.rule import Memory, Network, Rule, initial_weights


@dataclass(frozen=True)
class Sizes:
    """B rows, T tokens, H heads of width D, L matrices with F hidden channels between two, chunks of b.

    Without `forgets` all alpha are 0.
    """

    batch: int = 2
    length: int = 48
    heads: int = 2
    width: int = 16
    depth: int = 2
    hidden: int = 0
    block: int = 16
    network: str = "residual_norm"
    rule: str = "stable"
    forgets: bool = True

    @property
    def residual_norm(self) -> bool:
        return self.network == "residual_norm"

    @property
    def rule_of_updates(self) -> Rule:
        return Rule.of(self.rule, self.block, residual_norm=self.residual_norm, forgets=self.forgets)

    def __str__(self) -> str:
        hidden = f"-F{self.hidden}" if self.hidden else ""
        return (
            f"B{self.batch}-T{self.length}-H{self.heads}-D{self.width}-L{self.depth}{hidden}-b{self.block}"
            f"-{self.network}-{self.rule}{'' if self.forgets else '-keeps'}"
        )


@dataclass
class Problem:
    """Arguments of a scan, float64 until `cast`; states by memory (B, H, ...), M_0 by head (H, ...)."""

    sizes: Sizes
    tokens: list[Tensor]  # queries, keys, values (B, T, H, D), theta, eta, alpha (B, T, H, L)
    weights: list[Tensor]
    momentum: list[Tensor]
    initial: list[Tensor]  # M_0, to which forgetting leads in the stable rule
    norm: list[Tensor]  # LayerNorm's scale and shift, or nothing
    fresh: list[Tensor]  # weights, then momentum, (H, ...); used with restarts
    restarts: Tensor | None = None
    closed: bool | Tensor = True

    def parts(self) -> list[list[Tensor]]:
        return [self.tokens, self.weights, self.momentum, self.initial, self.norm, self.fresh]

    def leaves(self) -> list[Tensor]:
        return [x.requires_grad_() for part in self.parts() for x in part]

    def cast(self, tokens: torch.dtype, device: str) -> "Problem":
        """The same in float32, queries, keys and values in the dtype given."""
        parts = [[x.detach().to(device, torch.float32) for x in part] for part in self.parts()]
        parts[0][:3] = [x.to(tokens) for x in parts[0][:3]]
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in (self.restarts, self.closed)]
        return Problem(self.sizes, *parts, *moved)  # type: ignore[arg-type]

    @property
    def chunks(self) -> int:
        return self.sizes.length // self.sizes.block


def make_problem(sizes: Sizes, *, theta: float = 0.05, seed: int = 0) -> Problem:
    """Unit-norm keys and queries, gates that vary from token to token, a state that is none of the special ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, length, heads, width = sizes.batch, sizes.length, sizes.heads, sizes.width
    tokens = [normal(batch, length, heads, width) for _ in range(3)]
    tokens[:2] = [F.normalize(x, dim=-1) for x in tokens[:2]]
    gates = [torch.sigmoid(normal(batch, length, heads, sizes.depth) + shift) for shift in (0.0, 1.0, -3.0)]
    gates[0] = theta * gates[0]
    if not sizes.forgets:
        gates[2] = torch.zeros_like(gates[2])
    widths = [width, *[sizes.hidden or width] * (sizes.depth - 1), width]
    pairs = list(itertools.pairwise(widths))
    residual = sizes.residual_norm
    initial = [w.double() for w in initial_weights(heads, widths, residual_norm=residual, generator=generator)]
    weights = [w + 0.1 * normal(batch, heads, *pair) for w, pair in zip(initial, pairs, strict=True)]
    momentum = [0.01 * normal(batch, heads, *pair) for pair in pairs]
    norm = [normal(heads, width), normal(heads, width)] if residual else []
    fresh = [s * normal(heads, *pair) for s in (1.0, 0.02) for pair in pairs]
    return Problem(sizes, [*tokens, *gates], weights, momentum, initial, norm, fresh)


def by_oracle(problem: Problem) -> list[Tensor]:
    """Reads, weights and momentum at the end, a chunk at a time."""
    sizes, depth = problem.sizes, problem.sizes.depth
    weights, momentum, reads = problem.weights, problem.momentum, []
    network, rule = Network(sizes.residual_norm, *problem.norm), sizes.rule_of_updates
    for chunk in range(problem.chunks):
        if problem.restarts is not None:
            here = problem.restarts[chunk].bool()[:, None, None, None]
            weights = [torch.where(here, a, b) for a, b in zip(problem.fresh[:depth], weights, strict=True)]
            momentum = [torch.where(here, a, b) for a, b in zip(problem.fresh[depth:], momentum, strict=True)]
        span = slice(chunk * sizes.block, (chunk + 1) * sizes.block)
        tokens = Tokens(*(x[:, span] for x in problem.tokens))
        (read, within), (_, free) = (
            naive_scan(Memory(network, of_chunk, problem.initial), tokens, Matrices(weights, momentum))
            for of_chunk in (rule, replace(rule, rms_limit=math.inf))
        )
        reads.append(read)
        closed = problem.closed
        is_closed = closed[chunk].bool() if isinstance(closed, Tensor) else torch.full((sizes.batch,), closed)
        mask = is_closed[:, None, None, None]
        weights = [torch.where(mask, a, b) for a, b in zip(within.weights, free.weights, strict=True)]
        momentum = [torch.where(mask, a, b) for a, b in zip(within.momentum, free.momentum, strict=True)]
    return [torch.cat(reads, 1), *weights, *momentum]


def by_kernels(problem: Problem, *, exact: bool | None = None, holds: bool = True) -> list[Tensor]:
    """The same by fused_scan, with the rule's errors if no others are asked for; steps may be taken unheld."""
    queries, keys, values, _, eta, alpha = problem.tokens
    sizes, depth = problem.sizes, problem.sizes.depth
    gates = held_theta(sizes.rule_of_updates, Tokens(*problem.tokens)), eta, alpha
    scale, shift = problem.norm or (None, None)
    split = [x.unflatten(1, (-1, sizes.block)).permute(4, 1, 0, 3, 2).flatten(2, 3) for x in gates]
    rule = sizes.rule_of_updates
    exact = rule.exact if exact is None else exact
    reads, weights, momentum = fused_scan(
        queries,
        keys,
        values,
        gates_of(*split),
        problem.weights,
        problem.momentum,
        residual_norm=sizes.residual_norm,
        exact=exact,
        mass=chunk_mass(rule, *split[:2]) if exact and holds else None,
        norm_weight=scale,
        norm_bias=shift,
        borders=Borders(
            problem.closed,
            problem.restarts,
            problem.fresh[:depth],
            problem.fresh[depth:],
            problem.initial if rule.anchored else [],
            rule.rms_limit,
        ),
    )
    return [reads, *weights, *momentum]


def with_gradients(scan: Callable[[Problem], list[Tensor]], problem: Problem) -> list[Tensor]:
    """What a scan finds, and the gradients of a random functional of it at all that it was given."""
    leaves = problem.leaves()
    outputs = scan(problem)
    generator = torch.Generator().manual_seed(1)
    weighted = [
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum(dtype=torch.float64)
        for x in outputs
    ]
    found = torch.autograd.grad(sum(weighted), leaves, allow_unused=True)  # type: ignore[arg-type]
    return [x.detach() for x in outputs] + [
        torch.zeros_like(leaf) if x is None else x for leaf, x in zip(leaves, found, strict=True)
    ]


def differences(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    """Largest difference of each tensor, relative to its largest entry; NaN where there is one."""
    pairs = [(a.detach().cpu().double(), b.detach().double()) for a, b in zip(ours, theirs, strict=True)]
    return [float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs]


def kernels_differ(problem: Problem, device: str) -> float:
    """Largest relative difference between kernels and oracle, gradients included; inf where a kernel gives NaN."""
    ours = with_gradients(by_kernels, problem.cast(torch.float32, device))
    found = differences(ours, with_gradients(by_oracle, problem))
    return max(x if x == x else float("inf") for x in found)
