"""The configurations of the paper's sizes: legal, and as large as their names say."""

import tomllib
from dataclasses import replace
from itertools import product

import pytest
import torch

from pretrain.config.command_line import parse
from pretrain.config.files import build, preset_names, read_config
from pretrain.train import memory_form, memory_of
from titans_mcore.config import TitansConfig
from titans_mcore.hf.configuration_titans import TitansHFConfig
from titans_mcore.hf.modeling_titans import TitansForCausalLM
from titans_mcore.kernels import fused
from titans_mcore.memory.fused import why_not_fused
from titans_mcore.mixers import MIXERS

SIZES = {"170m": 170e6, "340m": 340e6, "400m": 400e6, "760m": 760e6, "1.3b": 1.3e9}
TOKENS = {"170m": 15e9, "340m": 15e9, "400m": 15e9, "760m": 30e9, "1.3b": 100e9}

PATTERNS = {
    "samba": "mamba+transformer",
    "gated_deltanet_h1": "gated_deltanet+transformer",
    "gated_deltanet_h2": "mamba2+gated_deltanet+transformer",
}
SYSTEMS = {name: name for name in MIXERS} | PATTERNS
# The total of every system at every size is planned in test_plan; the linear ones are built at one.
BUILT = [(n, s) for n, s in product(SYSTEMS, SIZES) if s == "340m" or (n in MIXERS and MIXERS[n].persistent)]


def built(config: TitansConfig) -> int:
    """Parameters of the exported model."""
    with torch.device("meta"):  # shapes alone: nothing is allocated
        model = TitansForCausalLM(TitansHFConfig.from_titans(config))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("system", "size"), BUILT)
def test_a_preset_has_the_parameters_and_tokens_of_its_name(system: str, size: str) -> None:
    config = build(*read_config(f"{system}_{size}"))
    period = len(config.model.mixers)
    few, more = (built(replace(config.model, num_layers=layers)) for layers in (period, 2 * period))
    assert config.model.variant == SYSTEMS[system]
    total = few + (config.model.num_layers // period - 1) * (more - few)  # one period of blocks is as large as the next
    assert total == pytest.approx(SIZES[size], rel=0.03)
    assert config.train.tokens_per_step == 2**19
    assert config.train.steps * config.train.tokens_per_step == pytest.approx(TOKENS[size], rel=1e-3)


@pytest.mark.parametrize(("system", "size"), [(n, s) for n, s in product(MIXERS, SIZES) if MIXERS[n].memory])
def test_the_memory_of_every_size_reaches_the_fused_kernels(
    system: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # takes the CPU for a GPU
    model = build(*read_config(f"{system}_{size}")).model
    memory, queries = memory_of(model, torch.bfloat16, torch.device("cpu"))
    assert why_not_fused(memory, queries, channelwise=False, sharded=False) == ""
    assert model.memory_shape.width == 64


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "fused"),
        (("--model.memory-backend", "chunked"), "chunked"),
        (
            ("--model.memory-heads", "16", "--model.memory-head-dim", "96"),
            "chunked, which is slower; the head width is 96",
        ),
        (("--model.memory-depth", "3"), "chunked, which is slower; the fused memory kernels take memories of 1 or 2"),
        (("--model.memory-alpha", "channel"), "chunked, which is slower; the fused memory kernels forget by head"),
    ],
)
def test_a_run_on_a_gpu_says_how_its_memory_is_computed(
    overrides: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "fault_here", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    command = ["--config", "mac_340m", "--run-dir", "-", "--model.vocab-size", "512", *overrides]
    assert memory_form(parse(command).config, torch.device("meta")).startswith(said)


@pytest.mark.parametrize("system", ["ttt_linear", "ttt_mlp"])
def test_ttt_has_as_many_heads_as_published(system: str) -> None:
    models = [build(*read_config(f"{system}_{size}")).model for size in SIZES]
    assert [model.mixers[0].heads(model).popitem()[1].number for model in models] == [12, 16, 16, 16, 32]


@pytest.mark.parametrize(("system", "size"), list(product(SYSTEMS, SIZES)))
def test_a_long_context_stage_is_the_same_model_on_longer_rows(system: str, size: str) -> None:
    first, long = (build(*read_config(name)) for name in (f"{system}_{size}", f"{system}_{size}_long"))
    assert long.model == first.model
    assert long.train.sequence_length == 8 * first.train.sequence_length
    assert long.train.tokens_per_step == first.train.tokens_per_step
    assert long.train.steps == pytest.approx(first.train.steps / 10, abs=1)
    assert long.optimizer.lr == pytest.approx(first.optimizer.lr * first.schedule.min_lr_fraction)


def test_the_window_of_models_that_recall_does_not_reach_a_needle_from_its_question() -> None:
    assert build(*read_config("recall")).model.window < 45


def test_no_configuration_is_without_a_test() -> None:
    tested = {f"{system}_{size}" for system, size in product(SYSTEMS, SIZES)}
    long = {f"{name}_long" for name in tested}
    assert set(preset_names()) == {*tested, *long, "recall", "quickstart", "comparison"}


def test_what_a_name_means_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--config", "mac_760m", "--print", "--train.steps", "3"])
    shown = build(tomllib.loads(capsys.readouterr().out), "shown")
    expected = build(*read_config("mac_760m"))
    assert end.value.code == 0
    assert shown == replace(expected, train=replace(expected.train, steps=3))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mac_760", "--config mac_760 is neither a file nor a preset; did you mean mac_760m or "),
        ("quick", "--config quick is neither a file nor a preset; did you mean quickstart?"),
        ("x", "--config x is neither a file nor a preset; .*sizes.toml and the files beside it have them"),
        ("configs/mac_760m.toml", "no configuration at configs/mac_760m.toml: .* did you mean --config mac_760m?"),
    ],
)
def test_a_wrong_name_gets_the_nearest_ones(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_config(text)
