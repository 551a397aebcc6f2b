"""The one table between native and exported parameters, by name.

Names are near-identical on purpose; the exported model gets `model.` in front, and transformers' names where it has
conventions. Natively the vocabulary is padded; the padding is left out of an export and put back on the way in.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from titans_mcore.config import TitansConfig
from titans_mcore.mixers import MixerSpec
from titans_mcore.mixers.parts import Parts


@dataclass(frozen=True)
class NameRule:
    """One parameter on both sides."""

    native: str
    """Its name in a checkpoint."""
    exported: str
    """Its name in the exported model."""
    vocabulary: bool = False
    """Whether its rows are the vocabulary, which is padded natively."""


_BLOCK = {
    "input_norm.weight": "input_norm.weight",
    "pre_mlp_norm.weight": "pre_mlp_norm.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up_proj.weight",  # gate and value in one matrix
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def _tensor_names(config: TitansConfig, mixer: MixerSpec) -> list[str]:
    """What a checkpoint has of a mixer: it is made once, without memory, and asked."""
    with FakeTensorMode():
        made = mixer.module(config, Parts(config))
    return list(made.state_dict())


def rules(config: TitansConfig) -> list[NameRule]:
    """The rule of every tensor of a model."""
    table = [NameRule("embedding.weight", "model.embedding.weight", vocabulary=True)]
    names = {mixer.name: _tensor_names(config, mixer) for mixer in config.mixers}
    for layer, mixer in enumerate(config.blocks):
        block = _BLOCK | {f"mixer.{name}": f"mixer.{name}" for name in names[mixer.name]}
        table += [
            NameRule(f"layers.{layer}.{native}", f"model.layers.{layer}.{exported}")
            for native, exported in block.items()
        ]
    table.append(NameRule("final_norm.weight", "model.final_norm.weight"))
    if not config.tie_embeddings:
        table.append(NameRule("output_layer.weight", "lm_head.weight", vocabulary=True))
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
