"""The configurations of the paper's sizes: legal, and as large as their names say."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from pretrain.config_files import build, read_toml
from titans_mcore.config import VARIANTS
from titans_mcore.hf.configuration_titans import TitansHFConfig
from titans_mcore.hf.modeling_titans import TitansForCausalLM

FOLDER = Path(__file__).resolve().parents[2] / "pretrain" / "configs"
SIZES = {"170m": 170e6, "340m": 340e6, "400m": 400e6, "760m": 760e6, "1.3b": 1.3e9}
TOKENS = {"170m": 15e9, "340m": 15e9, "400m": 15e9, "760m": 30e9, "1.3b": 100e9}

RECALL = ("mag", "mac", "transformer")


@pytest.mark.parametrize(("variant", "size"), list(product(VARIANTS, SIZES)))
def test_a_preset_has_the_parameters_and_tokens_of_its_name(variant: str, size: str) -> None:
    file = FOLDER / f"{variant}_{size}.toml"
    config = build(read_toml(file), file.name)
    with torch.device("meta"):  # shapes alone: nothing is allocated
        model = TitansForCausalLM(TitansHFConfig.from_titans(config.model))
    assert config.model.variant == variant
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(SIZES[size], rel=0.03)
    assert config.train.tokens_per_step == 2**19
    assert config.train.steps * config.train.tokens_per_step == pytest.approx(TOKENS[size], rel=1e-3)


@pytest.mark.parametrize(("variant", "size"), list(product(VARIANTS, SIZES)))
def test_a_long_context_stage_is_the_same_model_on_longer_rows(variant: str, size: str) -> None:
    names = (f"{variant}_{size}.toml", f"{variant}_{size}_long.toml")
    first, long = (build(read_toml(FOLDER / name), name) for name in names)
    assert long.model == first.model
    assert long.train.sequence_length == 8 * first.train.sequence_length
    assert long.train.tokens_per_step == first.train.tokens_per_step
    assert long.train.steps == pytest.approx(first.train.steps / 10, abs=1)
    assert long.optimizer.lr == pytest.approx(first.optimizer.lr * first.schedule.min_lr_fraction)


def test_models_that_recall_differ_in_their_mixer_alone() -> None:
    files = [FOLDER / f"recall_{variant}.toml" for variant in RECALL]
    mag, mac, transformer = (build(read_toml(file), file.name) for file in files)
    assert [config.model.variant for config in (mag, mac, transformer)] == list(RECALL)
    for config in (mac, transformer):  # the same budget, rows and optimizer
        assert replace(config, model=mag.model) == mag
    assert transformer.model.window == mag.model.window < 45
    memory = replace(mag.model, variant="mac", segment_length=mac.model.segment_length, window=mac.model.window)
    assert memory == mac.model


def test_no_configuration_is_without_a_test() -> None:
    tested = {f"{variant}_{size}.toml" for variant, size in product(VARIANTS, SIZES)}
    long = {f"{variant}_{size}_long.toml" for variant, size in product(VARIANTS, SIZES)}
    recall = {f"recall_{variant}.toml" for variant in RECALL}
    assert {file.name for file in FOLDER.iterdir()} == {*tested, *long, *recall, "quickstart.toml"}
