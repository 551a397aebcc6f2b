"""The one table between native and exported parameters: names, and how tensor-parallel ranks share each.

Names are near-identical on purpose; the exported model gets `model.` in front, and transformers' names where it has
conventions. Natively the vocabulary is padded; the padding is left out of an export and put back on the way in.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_mcore.config import TitansConfig
from titans_mcore.weights import Split

OUT, IN, HEADS, ALL = Split(0), Split(1), Split(0), None  # column-parallel, row-parallel, by heads, on every rank
GATED = Split(0, stride=2)  # gate and value in one matrix, each of them split


@dataclass(frozen=True)
class Rule:
    """One parameter on both sides."""

    native: str
    """Its name in a checkpoint."""
    exported: str
    """Its name in the exported model."""
    split: Split | None
    """How tensor-parallel ranks share it; None when each holds the whole."""
    vocabulary: bool = False
    """Whether its rows are the vocabulary, which is padded natively."""


_BLOCK = {
    "input_norm.weight": ("input_norm.weight", ALL),
    "pre_mlp_norm.weight": ("pre_mlp_norm.weight", ALL),
    "mlp.linear_fc1.weight": ("mlp.gate_up_proj.weight", GATED),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", IN),
}
_MEMORY = {
    "memory.query_gate.weight": OUT,
    "memory.key_value.weight": OUT,
    "memory.query_kernel": HEADS,
    "memory.key_value_kernel": HEADS,
    "memory.gate_bias": HEADS,
    "memory.output_norm": HEADS,
}
_MEMORY_NORM = {"memory.norm_weight": HEADS, "memory.norm_bias": HEADS}
_ATTENTION = {"attention.query_key_value.weight": OUT}
_PERSISTENT = {"persistent.tokens": ALL}
_MIXERS: dict[str, dict[str, Split | None]] = {
    "mac": {
        **_PERSISTENT,
        "memory_output.weight": IN,
        "query.weight": OUT,
        "key_value.weight": OUT,
        "attention_output.weight": IN,
        "attention_norm": ALL,
        "memory_norm": ALL,
    },
    "mag": {**_PERSISTENT, **_ATTENTION, "attention_norm": HEADS, "memory_norm": HEADS, "output.weight": IN},
    "mal": {**_PERSISTENT, **_ATTENTION, "memory_output.weight": IN, "output.weight": IN},
    "lmm": {**_PERSISTENT, "output.weight": IN},
    "transformer": {**_ATTENTION, "output.weight": IN},
}


def rules(config: TitansConfig) -> list[Rule]:
    """The rule of every parameter of a model."""
    mixer = dict(_MIXERS[config.variant])
    if config.variant != "transformer":
        mixer |= _MEMORY | (_MEMORY_NORM if config.memory_network == "residual_norm" else {})
        mixer |= {f"memory.initial_weights.{index}": HEADS for index in range(config.memory_depth)}
    block = _BLOCK | {f"mixer.{name}": (f"mixer.{name}", split) for name, split in mixer.items()}
    table = [Rule("embedding.weight", "model.embedding.weight", OUT, vocabulary=True)]
    for layer in range(config.num_layers):
        table += [
            Rule(f"layers.{layer}.{native}", f"model.layers.{layer}.{exported}", split)
            for native, (exported, split) in block.items()
        ]
    table.append(Rule("final_norm.weight", "model.final_norm.weight", ALL))
    if not config.tie_embeddings:
        table.append(Rule("output_layer.weight", "lm_head.weight", OUT, vocabulary=True))
    return table


def to_exported(config: TitansConfig, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole native tensors under exported names, without the vocabulary's padding.

    Raises:
        ValueError: A tensor is missing, or there is one that no rule knows; the message names it.
    """
    table = rules(config)
    _check_names([rule.native for rule in table], native, "the checkpoint")
    return {
        rule.exported: native[rule.native][: config.vocab_size] if rule.vocabulary else native[rule.native]
        for rule in table
    }


def to_native(config: TitansConfig, exported: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole exported tensors under native names, the vocabulary padded with zeros.

    Args:
        config: The model's settings.
        exported: A model's state_dict(), or the content of its files.

    Raises:
        ValueError: A tensor is missing, there is one that no rule knows, or matrices that should be tied differ.
    """
    from titans_mcore.parallel import padded_vocab_size

    table = rules(config)
    exported = dict(exported)
    if config.tie_embeddings and "lm_head.weight" in exported:  # a state_dict has both
        head = exported.pop("lm_head.weight")
        if not torch.equal(head, exported.get("model.embedding.weight", head)):
            raise ValueError("lm_head.weight differs from model.embedding.weight, but tie_embeddings is true")
    _check_names([rule.exported for rule in table], exported, "the exported model")
    padding = padded_vocab_size(config.vocab_size) - config.vocab_size
    return {
        rule.native: F.pad(exported[rule.exported], (0, 0, 0, padding)) if rule.vocabulary else exported[rule.exported]
        for rule in table
    }


def _check_names(known: list[str], given: Mapping[str, Tensor], where: str) -> None:
    for name in known:
        if name not in given:
            raise ValueError(f"{name} is missing in {where}; it belongs to another model?")
    for name in given:
        if name not in known:
            raise ValueError(f"{name} in {where} is not a parameter of this model; it belongs to another one?")
