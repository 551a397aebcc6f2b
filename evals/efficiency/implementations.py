"""What a case runs: inputs of a length and a function of them, for each implementation. Imported by workers only.

titans-pytorch is called with what comes closest to this project's layer: momentum and forgetting on, a residual
LayerNorm network of the same shape per head, a learning rate per weight matrix (`per_parameter_lr_modulation`), its own
pre-norm and projections. Its `chunk_size` is how many tokens share one gate, momentum step and forgetting step; its
`batch_size` is how many share the weights at which gradients are taken, our chunk b. Left at None, its default, all
gradients of a sequence are taken at the first weights: less work, and another function than a memory that learns.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evals.efficiency.cases import OURS, TITANS_PYTORCH, Case
from titans_mcore.config import TitansConfig


@dataclass
class Subject:
    """What is measured.

    Attributes:
        inputs: Tensors for a length T; gradients of all that want them belong to the backward pass.
        call: From inputs to an output of the first input's shape.
        parameters: Differentiated too.
    """

    inputs: Callable[[int], list[Tensor]]
    call: Callable[[list[Tensor]], Tensor]
    parameters: Sequence[Tensor]


def build(case: Case) -> Subject:
    """The subject of a case.

    Raises:
        ModuleNotFoundError: The other implementation is not installed.
        ValueError: No such implementation.
    """
    if case.implementation == OURS:
        return _our_layer(case) if case.part == "layer" else _our_scan(case)
    if case.implementation == TITANS_PYTORCH:
        return _titans_pytorch(case)
    if case.part in _OPERATORS:
        return _OPERATORS[case.part](case)
    raise ValueError(f"nothing is called {case.implementation} {case.part}")


def layer_config(heads: int, width: int, depth: int, expansion: int, chunk: int, backend: str = "auto") -> TitansConfig:
    """Settings of a layer that is a memory of so many heads and nothing else."""
    return TitansConfig(
        variant="lmm",
        dim=heads * width,
        memory_heads=heads,
        memory_depth=depth,
        memory_expansion=expansion,
        chunk_size=chunk,
        persistent_tokens=0,
        memory_backend=backend,  # type: ignore[arg-type]
    )


def _our_layer(case: Case) -> Subject:
    """Pre-norm, projections, convolution, memory, output norm and gate, output projection; no persistent tokens."""
    from titans_mcore.mixers.lmm import LmmMixer
    from titans_mcore.mixers.parts import PlainParts

    config = layer_config(case.heads, case.width, case.depth, case.expansion, case.chunk, case.setting)
    dim = config.dim
    norm, mixer = nn.RMSNorm(dim), LmmMixer(config, PlainParts(config))
    for module in (norm, mixer):
        module.to(case.device, getattr(torch, case.dtype))
    parameters = [*norm.parameters(), *(p for p in mixer.parameters() if p.numel())]
    return Subject(lambda length: [_randn(case, length, dim)], lambda x: mixer(norm(x[0]), None)[0], parameters)


def _our_scan(case: Case) -> Subject:
    """memory_scan alone. Its gates spread over tokens about where those of a new layer stand."""
    from titans_mcore.memory import memory_scan

    widths = [case.width, *[case.expansion * case.width] * (case.depth - 1), case.width]
    kind = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    # Standard deviation 1 is where a memory with LayerNorm begins.
    weights = [torch.randn(case.heads, *shape, **kind).requires_grad_() for shape in itertools.pairwise(widths)]
    # Steps of a tenth of the largest, 0.1; momentum of two tokens; forgetting over 30 to 3,000 tokens, by head.
    forget = torch.linspace(-3.5, -8.0, case.heads, device=case.device)
    centres = [torch.full_like(forget, -2.2), torch.zeros_like(forget), forget]

    def inputs(length: int) -> list[Tensor]:
        noise = torch.randn(3, case.batch, length, case.heads, case.depth, device=case.device)
        gates = [torch.sigmoid(x + centre.unsqueeze(-1)) for x, centre in zip(noise, centres, strict=True)]
        scaled = [gate * factor for gate, factor in zip(gates, (0.1 * case.steps, 1.0, case.steps), strict=True)]
        return [*_query_key_value(case, length), *(gate.requires_grad_() for gate in scaled)]

    def call(x: list[Tensor]) -> Tensor:
        queries, keys, values, theta, eta, alpha = x
        tokens = (queries, keys, values, theta, eta, alpha)
        return memory_scan(*tokens, weights, chunk_size=case.chunk, backend=case.setting)[0]

    return Subject(inputs, call, list(weights))


def _titans_pytorch(case: Case) -> Subject:
    from titans_pytorch import MemoryMLP, NeuralMemory

    dim = case.heads * case.width
    memory = NeuralMemory(
        dim=dim,
        heads=case.heads,
        dim_head=case.width,
        chunk_size=case.gates,
        batch_size=case.chunk or None,
        model=MemoryMLP(case.width, depth=case.depth, expansion_factor=case.expansion),
        momentum=True,
        per_parameter_lr_modulation=True,
    ).to(case.device, getattr(torch, case.dtype))
    # The network it was given is a template; what is learned are its copies for each head.
    parameters = [p for name, p in memory.named_parameters() if not name.startswith("memory_model.")]
    return Subject(lambda length: [_randn(case, length, dim)], lambda x: memory(x[0])[0], parameters)


def _chunk_ttt_linear(case: Case) -> Subject:
    """TTT-Linear: one matrix, no momentum, no forgetting."""
    from fla.ops.ttt import chunk_ttt_linear

    scale, shift = (
        make(case.heads, case.width, device=case.device, dtype=getattr(torch, case.dtype)).requires_grad_()
        for make in (torch.ones, torch.zeros)
    )

    def inputs(length: int) -> list[Tensor]:
        step = 0.1 * torch.rand(case.batch, length, case.heads, 1, device=case.device)
        return [*_query_key_value(case, length), step.to(getattr(torch, case.dtype)).requires_grad_()]

    def call(x: list[Tensor]) -> Tensor:
        return chunk_ttt_linear(*x[:3], scale, shift, x[3], chunk_size=case.chunk)[0]

    return Subject(inputs, call, [scale, shift])


def _chunk_gated_delta_rule(case: Case) -> Subject:
    """Gated delta rule: one matrix, its chunk of its own choice."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def inputs(length: int) -> list[Tensor]:
        gates = torch.rand(2, case.batch, length, case.heads, device=case.device)
        log_keep, strength = F.logsigmoid(gates[0] + 3), gates[1]
        return [*_query_key_value(case, length), log_keep.requires_grad_(), strength.contiguous().requires_grad_()]

    return Subject(inputs, lambda x: chunk_gated_delta_rule(*x)[0], [])


def _flash_attention(case: Case) -> Subject:
    from flash_attn import flash_attn_func

    return Subject(
        lambda length: _query_key_value(case, length, unit=False), lambda x: flash_attn_func(*x, causal=True), []
    )


_OPERATORS = {
    "chunk_ttt_linear": _chunk_ttt_linear,
    "chunk_gated_delta_rule": _chunk_gated_delta_rule,
    "flash_attn_func": _flash_attention,
}


def _query_key_value(case: Case, length: int, unit: bool = True) -> list[Tensor]:
    tokens = [_randn(case, length, case.heads, case.width) for _ in range(3)]
    if unit:
        tokens[:2] = [F.normalize(x.detach(), dim=-1).requires_grad_() for x in tokens[:2]]
    return tokens


def _randn(case: Case, length: int, *shape: int) -> Tensor:
    dtype = getattr(torch, case.dtype)
    return torch.randn(case.batch, length, *shape, device=case.device, dtype=dtype, requires_grad=True)
