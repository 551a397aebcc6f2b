"""Run under torchrun by test_layouts: one float64 model at many layouts, its logits and all its gradients.

python -m tests.parallel.layouts_worker REFERENCE.pt OUTPUT.json LAYOUT ...

A layout is words such as "tensor=2 memory=hidden sequence context=2". One process writes the reference; more compare
with it and write, by variant and layout, the largest error of each tensor over the tensor's largest value.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.mixers import MIXERS
from titans_mcore.model import TitansModel
from titans_mcore.parallel import reduce_shared_gradients, start, stop, transformer_config
from titans_mcore.tensor_files import TPSplit, split_of

from .regroup import groups_of

BATCH, LENGTH = 2, 32
SETTINGS: dict[str, Any] = {
    "vocab_size": 100,
    "num_layers": 2,
    "dim": 32,
    "num_heads": 4,
    "memory_heads": 4,
    "linear_heads": 4,
    "ffn_dim": 64,
    "memory_expansion": 2,
    "chunk_size": 4,
    "persistent_tokens": 3,
    "segment_length": 8,
    "window": 12,
    "theta_max": 0.5,
}
# What differs from the paper's memory in ways that matter to a division; depth 2 and residual_norm are everywhere.
MEMORIES: dict[str, dict[str, Any]] = {
    "linear": {"memory_depth": 1},
    "three": {"memory_depth": 3},
    "four": {"memory_depth": 4, "memory_network": "plain"},
    "one-head": {"memory_heads": 1},
    "wider": {"memory_heads": 4, "memory_head_dim": 16},
    "shared-gates": {"memory_gates": "shared", "memory_momentum": False},
    "next-token": {"memory_init": "next_token", "gate_margin": 0.05, "gate_convolution": True},
}


def models() -> dict[str, TitansConfig]:
    """Every variant, LMM with other memories, MAC that begins by recalling, and memories with heads of their own."""
    found = {variant: TitansConfig(variant=variant, **SETTINGS) for variant in MIXERS}  # type: ignore[arg-type]
    found |= {f"lmm-{name}": TitansConfig(variant="lmm", **SETTINGS | more) for name, more in MEMORIES.items()}
    found["mac-next-token"] = TitansConfig(variant="mac", **SETTINGS | MEMORIES["next-token"])
    found |= {
        f"{variant}-two-heads": TitansConfig(variant=variant, **SETTINGS | {"memory_heads": 2})  # type: ignore[arg-type]
        for variant, mixer in MIXERS.items()
        if mixer.memory and mixer.attention
    }
    return found


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which of them begin documents, and what the logits are multiplied with to make a loss."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, SETTINGS["vocab_size"], (BATCH, LENGTH), generator=generator)
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    starts[0, 5] = starts[0, 21] = starts[1, 16] = True  # a context rank may begin with a document
    weights = torch.randn(BATCH, LENGTH, SETTINGS["vocab_size"], generator=generator, dtype=torch.float64)
    return tokens, starts, weights


class Layout:
    """One way to divide the processes, from its words."""

    def __init__(self, words: str) -> None:
        pairs = dict(word.partition("=")[::2] for word in words.split())
        self.tensor, self.context = int(pairs.get("tensor", 1)), int(pairs.get("context", 1))
        self.memory, self.sequence = pairs.get("memory", "heads"), "sequence" in pairs
        self.recompute = pairs.get("recompute", "none")


def fits(config: TitansConfig, layout: Layout) -> bool:
    """Whether there are heads for every rank, or ranks share each head's matrices."""
    return config.memory_shape.heads % layout.tensor == 0 or layout.memory == "hidden"


def run(config: TitansConfig, layout: Layout, documents: bool) -> dict[str, Tensor]:
    """Whole logits and gradients, the same on every rank."""
    groups = groups_of(layout.tensor, layout.context)
    torch.manual_seed(0)
    megatron = transformer_config(
        config,
        tensor_parallel=layout.tensor,
        sequence_parallel=layout.sequence,
        memory_parallel=layout.memory,
        dtype=torch.float64,
        draw_on=torch.device("cpu") if documents else None,  # both ways of drawing are the same at every layout
    )
    model = TitansModel(config, megatron, groups, memory_parallel=layout.memory, recompute=layout.recompute)
    if layout.sequence:
        reduce_shared_gradients(model, groups.tp)
    data, context = groups.dp, groups.cp
    rows = slice(data.rank() * BATCH // data.size(), (data.rank() + 1) * BATCH // data.size())
    tokens, starts, weights = (x[rows].chunk(context.size(), 1)[context.rank()] for x in batch())
    logits = model(tokens, starts=starts if documents and bool(starts.any()) else None)
    (logits * weights).sum().backward()
    found = {"logits": gather(gather(logits.detach(), context, 1), data, 0)}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient = parameter.grad.clone()
        dist.all_reduce(gradient, group=groups.dp_cp)
        rule, parts = split_of(parameter), parts_of(gradient, groups.tp)
        for part in parts if rule is None else []:
            assert torch.equal(part, parts[0]), f"the ranks' gradients of {name} differ"
        found[name] = parts[0] if rule is None else joined(rule, parts)
    return found


def parts_of(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's tensor."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def joined(rule: TPSplit, parts: list[Tensor]) -> Tensor:
    """The whole tensor from the parts of all tensor-parallel ranks."""
    blocks = [part.chunk(rule.stride, rule.dim) for part in parts]
    return torch.cat([block[i] for i in range(rule.stride) for block in blocks], rule.dim)


def gather(x: Tensor, group: dist.ProcessGroup, axis: int) -> Tensor:
    """The ranks' tensors one after the other."""
    return torch.cat(parts_of(x, group), axis)


def main() -> None:
    reference, output, *layouts = sys.argv[1:]
    start(1, seed=0)
    cases = [(name, config, documents) for name, config in models().items() for documents in (False, True)]
    cases = [(name, config, documents) for name, config, documents in cases if name in MIXERS or not documents]
    if dist.get_world_size() == 1:
        found = {f"{name} {documents}": run(config, Layout(""), documents) for name, config, documents in cases}
        torch.save(found, reference)
    else:
        wanted, errors = torch.load(reference), {}
        for words in layouts:
            for name, config, documents in cases:
                if not fits(config, Layout(words)):
                    continue
                found = run(config, Layout(words), documents)
                right = wanted[f"{name} {documents}"]
                assert set(found) == set(right)
                kind = f"{name}{' documents' if documents else ''}"
                errors[f"{kind} | {words}"] = {
                    key: float((x - right[key]).abs().max() / right[key].abs().max().clamp_min(1e-300))
                    for key, x in found.items()
                }
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(errors))
    stop()


if __name__ == "__main__":
    main()
