"""The table between native and exported parameters is total both ways."""

from typing import Any

import pytest
import torch
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.hf.configuration_titans import TitansHFConfig
from titans_mcore.hf.mapping import rules, to_exported, to_native
from titans_mcore.hf.modeling_titans import TitansForCausalLM
from titans_mcore.mixers import MIXERS
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from titans_mcore.weights import model_tensors

from .hf_runs import tiny

SETTINGS: list[dict[str, Any]] = [{"variant": variant} for variant in MIXERS]
SETTINGS += [
    {"tie_embeddings": False},
    {"memory_depth": 4},
    {"persistent_tokens": 0},
    {"memory_depth": 1, "memory_network": "plain"},
    {"variant": "mag", "vocab_size": 256},
    {"variant": "mal", "memory_heads": 3, "memory_head_dim": 8},
    {"variant": "lmm+transformer"},
]


def native_model(config: TitansConfig) -> TitansModel:
    start(1, seed=0)
    try:
        return TitansModel(config, transformer_config(config))
    finally:
        stop()
        torch.set_num_threads(1)


@pytest.fixture(params=SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def config(request: pytest.FixtureRequest) -> TitansConfig:
    return tiny(**request.param)


def test_every_tensor_has_one_rule(config: TitansConfig) -> None:
    table, model = rules(config), native_model(config)
    assert len({rule.native for rule in table}) == len(table) == len({rule.exported for rule in table})
    assert {rule.native for rule in table} == set(model_tensors(model))
    exported = TitansForCausalLM(TitansHFConfig.from_titans(config))
    assert {rule.exported for rule in table} == set(model_tensors(exported))


def test_to_native_and_back_is_equal(config: TitansConfig) -> None:
    native = model_tensors(native_model(config))
    exported = to_exported(config, native)
    model = TitansForCausalLM(TitansHFConfig.from_titans(config))
    model.load_state_dict(exported, strict=False)
    again = to_exported(config, to_native(config, model.state_dict()))
    assert list(again) == list(exported)
    assert all(torch.equal(again[name], tensor) for name, tensor in exported.items())
    back = to_native(config, exported)
    assert {name: tensor.shape for name, tensor in back.items()} == {n: t.shape for n, t in native.items()}
    assert exported["model.embedding.weight"].shape[0] == config.vocab_size
    assert back["embedding.weight"].shape[0] % 128 == 0


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return model_tensors(native_model(tiny()))


def test_a_missing_or_unknown_name_is_an_error_that_names_it(tensors: dict[str, Tensor]) -> None:
    config = tiny()
    missing = {name: t for name, t in tensors.items() if name != "layers.1.mixer.memory.gate_bias"}
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.memory\.gate_bias is missing in the checkpoint"):
        to_exported(config, missing)
    with pytest.raises(ValueError, match=r"layers\.0\.new in the checkpoint"):
        to_exported(config, {**tensors, "layers.0.new": torch.zeros(1)})
    exported = to_exported(config, tensors)
    with pytest.raises(ValueError, match=r"model\.extra in the exported model"):
        to_native(config, {**exported, "model.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model\.final_norm\.weight is missing"):
        to_native(config, {n: t for n, t in exported.items() if n != "model.final_norm.weight"})


def test_untied_matrices_of_a_tied_model_are_an_error(tensors: dict[str, Tensor]) -> None:
    exported = to_exported(tiny(), tensors)
    with pytest.raises(ValueError, match=r"differs from model\.embedding\.weight"):
        to_native(tiny(), {**exported, "lm_head.weight": exported["model.embedding.weight"] + 1})
