"""`python -m pretrain.plan`: what it says of a run without starting it, against the model as it is built."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.files import preset_names
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import DataConfig, TrainConfig
from pretrain.engine import deepspeed_config
from pretrain.plan import __main__ as plan
from pretrain.plan.bytes import Held, activation_bytes
from pretrain.plan.layout import Layout, for_gpus, layout_of
from pretrain.plan.parameters import count_by_part, parameters_of
from pretrain.plan.step_time import dense_flops
from tests.commands import status_of
from titans_mcore.config import TitansConfig
from titans_mcore.mixers import MIXERS, parts
from titans_mcore.mixers.neural_memory import NeuralMemory
from titans_mcore.model import TitansModel
from titans_mcore.parallel import groups, transformer_config

from .jobs import Job
from .test_presets import SIZES, SYSTEMS

SETTINGS = {"num_layers": 2, "dim": 128, "num_heads": 4, "ffn_dim": 256, "vocab_size": 1000, "persistent_tokens": 4}
# The plan is for GPUs; what the native operation of CPUs keeps is less than what the forms with chunks keep.
MEMORY = {"chunk_size": 8, "segment_length": 64, "window": 48, "linear_heads": 4}
LENGTH = 256
HIDDEN = ("--parallel.memory-parallel", "hidden")
PRESET = "mac_170m"


def config_of(variant: str) -> TitansConfig:
    return TitansConfig(variant=variant, **SETTINGS, **MEMORY)


@pytest.fixture(params=[*MIXERS, "lmm+transformer"])
def model(request, one_process) -> TitansModel:
    config = config_of(request.param)
    return TitansModel(config, transformer_config(config), one_process)


def planned(*arguments: str) -> dict:
    return plan.plan_of(plan.request_of(arguments))


def refused(capsys, *arguments: str) -> str:
    """The sentence of a command line that ends with 2."""
    status = status_of(plan.main, *arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    return err


def test_the_parameters_are_those_of_the_built_model(model):
    found = parameters_of(model.titans_config)
    assert {p.name: p.shape for p in found} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    counts = count_by_part(found)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    memories = [m for m in model.modules() if isinstance(m, NeuralMemory)]
    assert counts["memory"] == sum(p.numel() for m in memories for p in m.parameters())
    mixers = model.titans_config.mixers
    assert (counts["attention"] > 0) == any(mixer.attention for mixer in mixers)
    assert (counts["memory"] > 0) == any(mixer.memory for mixer in mixers)
    mlps = [layer.mlp for layer in model.layers]
    assert counts["feed_forward"] == sum(p.numel() for m in mlps for p in m.parameters())


def slow_unless(chosen: Callable[[str, str], bool]) -> list[Any]:
    """All presets of the table, of which those that are not chosen are slow; all sizes of MAC are."""
    return [
        pytest.param(*preset, marks=[] if preset[0] == "mac" or chosen(*preset) else [pytest.mark.slow])
        for preset in product(SYSTEMS, SIZES)
    ]


def total_of(config: TitansConfig) -> int:
    """Parameters of a model, from two small ones: a period of its blocks is as large as the next."""
    period = len(config.mixers)
    few, more = (count_by_part(parameters_of(replace(config, num_layers=n)))["total"] for n in (period, 2 * period))
    return few + (config.num_layers // period - 1) * (more - few)


@pytest.mark.parametrize(("system", "size"), list(product(SYSTEMS, SIZES)))
def test_a_preset_is_as_large_as_its_name_says(system, size):
    config = plan.request_of(["--config", f"{system}_{size}", "--gpus", "8"]).config
    assert total_of(config.model) == pytest.approx(SIZES[size], rel=0.03)
    assert config.train.tokens_per_step == 2**19


@pytest.mark.parametrize(
    ("system", "size"),
    slow_unless(lambda system, size: [*SYSTEMS].index(system) % len(SIZES) == [*SIZES].index(size)),
)
def test_a_preset_is_planned_with_all_of_its_parameters(system, size):
    request = plan.request_of(["--config", f"{system}_{size}", "--gpus", "8"])
    found = plan.plan_of(request)
    assert found["parameters"]["total"] == total_of(request.config.model)
    assert found["step"]["tokens"] == 2**19
    assert found["rank"]["bytes"] > 2 * found["parameters"]["total"]
    # Six operations for each parameter and token are the usual estimate; the memory's own products come on top.
    assert found["step"]["flops"]["total"] > 5 * found["parameters"]["total"] * 2**19


def test_every_preset_is_planned():
    names = {f"{system}_{size}" for system, size in product(SYSTEMS, SIZES)}
    long = {f"{name}_long" for name in names}
    others = set(preset_names()) - names - long
    assert others == {"quickstart", "comparison", "recall"}
    for name in others:
        gpus = "2" if name == "quickstart" else "1"
        assert planned("--config", name, "--gpus", gpus)


@pytest.mark.parametrize(("system", "size"), slow_unless(lambda system, size: size == "1.3b"))
def test_a_long_context_stage_is_planned_and_fits_the_gpus_of_one_host(system, size):
    found = planned("--config", f"{system}_{size}_long", "--gpus", "8")
    assert not [note for note in found["notes"] if "do not fit" in note]
    assert found["step"]["tokens"] == 2**19


def test_json_has_the_documented_keys_and_nothing_else_is_printed(tmp_path):
    command = [sys.executable, "-m", "pretrain.plan", "--config", PRESET, "--gpus", "4", "--parallel.tensor", "2"]
    status, out, err = Job([*command, "--json"], tmp_path).wait(120)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found) == [
        "model",
        "layout",
        "parameters",
        "rank",
        "messages",
        "step",
        "time",
        "checkpoint",
        "notes",
    ]
    assert list(found["parameters"]) == ["total", "memory", "attention", "feed_forward", "embedding", "rest"]
    assert found["layout"] == {
        "gpus": 4,
        "tensor": 2,
        "data": 2,
        "zero_stage": 1,
        "precision": "bf16",
        "micro_batches": found["layout"]["micro_batches"],
        "context": 1,
        "sequence": False,
        "memory_parallel": "heads",
        "offload_optimizer": False,
        "recompute": "none",
    }
    assert found["rank"]["bytes"] == sum(found["rank"]["parts"].values())
    assert found["messages"] == {"states": 0, "headers": 0, "bytes": 0}
    assert list(found["step"]["flops"]) == ["total", "dense", "attention", "memory"]
    assert sum(found["checkpoint"]["parts"].values()) == found["checkpoint"]["bytes"]
    assert not list(tmp_path.iterdir())


def test_the_table_names_every_number(capsys):
    assert status_of(plan.main, "--config", PRESET, "--gpus", 8, "--utilisation", 0.5) == 0
    out = capsys.readouterr().out
    for words in ("Parameters", "Memory of each of 8 ranks", "FLOP a token", "GPU hours", "checkpoint"):
        assert words in out
    assert "a vocabulary of 32,000 pieces is assumed" in out


def test_time_follows_from_operations_peak_and_utilisation():
    found = planned("--config", PRESET, "--gpus", "8", "--gpu", "a100", "--utilisation", "0.5")
    time_, flops = found["time"], found["step"]["flops"]["total"]
    assert time_["step_seconds"] == pytest.approx(flops / (8 * 312e12 * 0.5))
    assert time_["hours"] == pytest.approx(time_["steps"] * time_["step_seconds"] / 3600)
    assert time_["tokens_per_second"] == pytest.approx(2**19 / time_["step_seconds"])


def test_what_is_recomputed_takes_time_and_is_no_work():
    none, except_memory, block = (
        planned("--config", PRESET, "--gpus", "8", "--train.recompute", mode)
        for mode in ("none", "except_memory", "block")
    )
    assert none["step"]["flops"] == block["step"]["flops"]
    assert none["step"]["recomputed_flops"] == 0
    memory = none["step"]["flops"]["memory"] // 3
    assert block["step"]["recomputed_flops"] - except_memory["step"]["recomputed_flops"] == memory
    share = 1 + block["step"]["recomputed_flops"] / block["step"]["flops"]["total"]
    assert block["time"]["step_seconds"] == pytest.approx(none["time"]["step_seconds"] * share)
    assert share < 4 / 3  # the head is not done again
    bytes_ = [p["rank"]["parts"]["activations"] for p in (none, except_memory, block)]
    assert bytes_ == sorted(bytes_, reverse=True)


def test_ranks_that_share_a_row_wait_as_the_wavefront_says():
    arguments = ("--config", "mag_760m", "--train.sequence-length", "131072")
    alone = planned(*arguments, "--gpus", "1", "--train.global-batch", "4")
    shared = planned(*arguments, "--gpus", "8", "--train.global-batch", "4", "--parallel.context", "8")
    efficiency = shared["time"]["wavefront_efficiency"]
    assert alone["time"]["wavefront_efficiency"] == 1
    assert efficiency == pytest.approx(24 / (24 + 7), rel=0.05)
    assert shared["time"]["step_seconds"] == pytest.approx(alone["time"]["step_seconds"] / 8 / efficiency)
    for part in ("activations", "logits"):
        assert shared["rank"]["parts"][part] == pytest.approx(alone["rank"]["parts"][part] / 8, rel=1e-6)


@pytest.mark.parametrize("variant", [name for name, mixer in MIXERS.items() if mixer.composes])
def test_ranks_whose_states_compose_lose_what_they_do_more_and_a_messages_way(variant):
    ranks, length = 8, 2**18
    words = ("--gpus", str(ranks), "--parallel.context", str(ranks), "--train.global-batch", "1")
    words += ("--train.sequence-length", str(length), "--train.micro-batch", "1", "--config")
    found = planned(*words, f"{variant}_340m")
    model, total = MIXERS[variant], found["step"]["flops"]["total"]
    more = 3 * 24 * model.composing_flops(TitansConfig(variant=variant, dim=1024, num_heads=16), length)
    assert found["time"]["wavefront_efficiency"] == pytest.approx(total / (total + more), rel=0.01)
    # One block of two is attention, which ends the advantage; many ranks are no fault of a model that has it.
    assert planned(*words, "samba_340m")["time"]["wavefront_efficiency"] < 0.8
    many = planned(*words, f"{variant}_340m", "--gpus", "64", "--parallel.context", "64")
    assert many["time"]["wavefront_efficiency"] > 2.5 * 24 / (24 + 63)
    assert not any("wavefront" in note for note in many["notes"])


def test_messages_between_ranks_do_not_grow_with_the_row():
    words = ("--config", PRESET, "--gpus", "4", "--parallel.context", "4", "--train.sequence-length")
    short, long = (planned(*words, str(length))["messages"] for length in (2**14, 2**20))
    assert short == long
    assert short["states"] == short["headers"] > 0
    assert short["bytes"] > 0


def test_an_offloaded_optimizer_is_on_the_host_and_nowhere_else():
    stage = ("--config", PRESET, "--gpus", "8", "--parallel.zero-stage", "2")
    here, away = planned(*stage)["rank"], planned(*stage, "--parallel.offload-optimizer", "true")["rank"]
    assert here["host_bytes"] == 0
    assert away["parts"]["optimizer"] == 0
    assert away["host_bytes"] == sum(away["host_parts"].values()) > here["parts"]["optimizer"]
    assert away["bytes"] < here["bytes"]


@pytest.mark.parametrize("variant", MIXERS)
@pytest.mark.parametrize("memory", ["heads", "hidden"])
def test_a_rank_has_its_share_of_what_is_divided(variant, memory):
    config = config_of(variant)
    whole, shared = parameters_of(config), parameters_of(config, 2, memory)
    assert [(p.name, p.shape) for p in shared] == [(p.name, p.shape) for p in whole]
    for parameter in shared:
        held_whole = parameter.name.endswith(("norm.weight", "persistent.tokens", "attention_norm", "memory_norm"))
        held_whole |= variant == "mamba2" and ".mixer.shared" in parameter.name
        held_whole |= ".mixer.front." in parameter.name or parameter.name.endswith(".mixer.places")  # TTT's
        if ".memory." in parameter.name:
            held_whole = memory == "hidden" and ".initial_weights." not in parameter.name
        if variant == "mag" and parameter.name.endswith(("attention_norm", "memory_norm")):
            held_whole = memory == "hidden" and "memory" in parameter.name  # head by head
        assert parameter.on_rank == parameter.count // (1 if held_whole else 2), parameter.name


def test_the_vocabulary_is_the_datas(tiny_toml, shards):
    found = planned("--config", str(tiny_toml), "--gpus", "1")
    assert found["model"]["vocab_size"] == 96
    assert not any("assumed" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "3", "--parallel.tensor", "2"], "3 processes cannot be divided into tensor-parallel groups of 2"),
        (["--gpus", "3", "--parallel.tensor", "3"], "num_heads 16 cannot be divided by tensor parallel size 3"),
        (
            ["--gpus", "3", "--parallel.tensor", "3", "--model.dim", "768", "--model.num-heads", "3"],
            "cannot be divided by tensor parallel size 3",
        ),
        (["--gpus", "7"], "train.global_batch 128 cannot be shared out over 7 data ranks"),
        (["--gpus", "2", "--parallel.zero-stage", "0"], "parallel.zero_stage 0 keeps no fp32 masters of bf16 weights"),
        (["--gpus", "2", "--parallel.zero-stage", "4"], "parallel.zero_stage is 4; it must be 0, 1, 2 or 3"),
        (["--gpus", "2", "--parallel.tensors", "2"], "unknown setting --parallel.tensors"),
        (["--gpus", "0"], "--gpus is '0'; it must be a number of GPUs, 1 or more"),
        (["--gpus"], "--gpus needs a value"),
        ([], "--gpus is missing; usage: python -m pretrain.plan"),
        (["--gpus", "2", "--gpu", "h900"], "--gpu is 'h900'; it must be one of a100, h100, h200, b200"),
        (["--gpus", "2", "--utilisation", "40"], "--utilisation is '40'; it must be above 0 and at most 1"),
        (["--gpus", "2", "--model.segment-length", "100"], "segment_length 100 is not a multiple of chunk_size 16"),
        (["--gpus", "3", "--parallel.context", "3"], "train.sequence_length 4096 cannot be divided into 3 equal parts"),
        (
            ["--gpus", "6", "--parallel.context", "4"],
            "6 processes cannot be divided into groups of tensor 1 x context 4",
        ),
        (
            ["--gpus", "2", "--parallel.tensor", "2", *HIDDEN, "--model.memory-backend", "oracle"],
            "model.memory_backend 'oracle' computes whole memories",
        ),
        (["--gpus", "2", "--parallel.sequence", "true"], "parallel.sequence shares tokens over tensor-parallel ranks"),
        (["--gpus", "2", "--parallel.pipeline", "2"], "pipeline parallelism is not supported"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_refused_in_one_sentence(capsys, arguments, sentence):
    assert sentence in refused(capsys, "--config", PRESET, *arguments)


@pytest.mark.parametrize("name", ["mac_170m", "lmm_1.3b"])
def test_buckets_are_the_engines(name):
    request = plan.request_of(["--config", name, "--gpus", "2"])
    config = for_gpus(request.config)
    layout, parameters = layout_of(config, 2), parameters_of(config.model)
    with torch.device("meta"):
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.empty(p.shape)) for p in parameters])
    settings = deepspeed_config(model, config, layout.data)["zero_optimization"]
    assert settings["reduce_bucket_size"] == settings["allgather_bucket_size"] == Held(layout, parameters).bucket


def test_a_missing_file_is_a_sentence(capsys):
    assert "no configuration at /nowhere.toml" in refused(capsys, "--config", "/nowhere.toml", "--gpus", "1")


@pytest.mark.parametrize(
    ("gpus", "tensor", "context"),
    [(1, 1, 1), (1, 2, 1), (2, 2, 1), (3, 2, 1), (6, 4, 1), (8, 4, 1), (2, 1, 4), (8, 2, 2), (6, 2, 2), (12, 1, 4)],
)
def test_a_world_is_refused_where_and_as_the_run_refuses_it(monkeypatch, gpus, tensor, context):
    def sentence(function, *arguments) -> str:
        try:
            function(*arguments)
        except ValueError as error:
            return str(error)
        return ""

    launcher = {"RANK": 0, "WORLD_SIZE": gpus, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in launcher.items():
        monkeypatch.setenv(name, str(value))
    from_run = sentence(groups._check_layout, tensor, context)
    arguments = (
        "--config",
        PRESET,
        "--gpus",
        str(gpus),
        "--parallel.tensor",
        str(tensor),
        "--parallel.context",
        str(context),
        "--train.global-batch",
        "12",
    )
    assert sentence(planned, *arguments, "--train.micro-batch", "1") == from_run


def test_the_dense_operations_are_those_that_torch_counts(model, monkeypatch):
    monkeypatch.setattr(parts, "_LEAST_WORK", math.inf)  # by products of matrices, not by oneDNN's convolutions
    config, batch = model.titans_config, 2
    tokens = torch.randint(0, config.vocab_size, (batch, LENGTH))
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, tokens).mean()
        forward = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "aten.mm" in str(op))
        loss.backward()
    both = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "aten.mm" in str(op))
    expected = dense_flops(config, parameters_of(config), batch * LENGTH, config.persistent_tokens)
    assert forward == pytest.approx(expected, rel=0.02)
    assert both == pytest.approx(3 * expected, rel=0.02)


@pytest.mark.parametrize("variant", MIXERS)
def test_visible_keys_are_those_of_the_mask(variant):
    config = config_of(variant)
    token = torch.arange(LENGTH)
    if len(MIXERS[variant].pieces(config, LENGTH)) > 1:
        same = token[:, None] // config.segment_length == token // config.segment_length
        seen = 2.0 * (same & (token <= token[:, None])).sum(1)
    else:
        seen = ((token <= token[:, None]) & (token > token[:, None] - config.window)).sum(1).double()
    mixer = MIXERS[variant]
    expected = float(seen.mean()) + mixer.persistent * config.persistent_tokens if mixer.attention else 0.0
    assert mixer.keys(config, LENGTH) == pytest.approx(expected)


def left_behind(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward pass leaves for the backward pass."""
    forward().backward()  # what is loaded and made once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = forward()
    assert loss.requires_grad
    return sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "two-documents"])
def test_activations_are_near_what_autograd_keeps(model, documents):
    config, batch = model.titans_config, 1
    tokens = torch.randint(0, config.vocab_size, (batch, LENGTH))
    starts = torch.zeros(batch, LENGTH, dtype=torch.bool)
    starts[:, [0, LENGTH // 2]] = True
    measured = left_behind(lambda: model(tokens, tokens, starts if documents else None).mean())
    train = TrainConfig(sequence_length=LENGTH, micro_batch=batch, global_batch=batch)
    run = RunConfig(model=config, train=train, data=DataConfig(reset_documents=documents))
    parts = activation_bytes(run, Layout(1, 1, 1, 1, torch.float32, 1))
    estimated = parts["activations"] + parts["memory_states"] + parts["logits"] / 2  # the logits themselves go
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("recompute", ["none", "except_memory", "block"])
def test_what_recomputation_leaves_is_near_what_the_forward_pass_leaves(one_process, recompute):
    config = TitansConfig(variant="mag", **SETTINGS, **MEMORY)
    model = TitansModel(config, transformer_config(config), one_process, recompute=recompute)
    tokens = torch.randint(0, config.vocab_size, (1, LENGTH))
    left = left_behind(lambda: model(tokens, tokens).mean())

    def parts(mode: str) -> dict[str, int]:
        train = TrainConfig(sequence_length=LENGTH, micro_batch=1, global_batch=1, recompute=mode)
        run = RunConfig(model=config, train=train, data=DataConfig(reset_documents=False))
        return activation_bytes(run, Layout(1, 1, 1, 1, torch.float32, 1, recompute=mode))

    found = parts(recompute)
    estimated = found["activations"] + found["memory_states"] + found["logits"] / 2
    if recompute != "none":  # less the one block that is computed again, which comes with the backward pass
        final_norm = 8 * config.dim * LENGTH
        estimated -= (parts("none")["activations"] - final_norm) / config.num_layers
    if recompute == "block":
        estimated -= found["memory_states"]
    assert estimated == pytest.approx(left, rel=0.1)
