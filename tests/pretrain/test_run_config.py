"""Settings: from file and flags to a run folder and back, and every way to get them wrong."""

import dataclasses
import json

import pytest

from pretrain.config.command_line import parse
from pretrain.config.files import build, load_run_config, read_config, read_toml, setting_names, write_run_config
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import TrainConfig


def arguments(tiny_toml, tmp_path, *more):
    return ["--config", str(tiny_toml), "--run-dir", str(tmp_path / "run"), *more]


def test_a_written_configuration_reads_back_equal(tmp_path, tiny_toml):
    config = parse(arguments(tiny_toml, tmp_path, "--optimizer.lr", "1e-3", "--variant", "lmm")).config
    write_run_config(config, tmp_path / "run")
    assert load_run_config(tmp_path / "run") == config
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.toml"]


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path, tiny_toml):
    command = parse(arguments(tiny_toml, tmp_path, "--checkpoint.every-steps", "7", "--train.seed=9"))
    assert command.run_dir == tmp_path / "run"
    assert command.config.checkpoint.every_steps == 7
    assert command.config.train.seed == 9
    assert command.config.train.steps == 20
    assert command.config.optimizer.beta2 == 0.95


def test_settings_that_only_fit_together_may_change_in_one_command(tmp_path, tiny_toml):
    config = parse(arguments(tiny_toml, tmp_path, "--model.dim", "64", "--model.num-heads", "32")).config
    assert config.model.head_dim == 2


def test_heads_of_the_memory_follow_the_width_that_was_asked_for_last(tmp_path, tiny_toml):
    text = tiny_toml.read_text().replace("memory_heads = 2\n", "")
    (tmp_path / "tiny.toml").write_text(text)
    model = parse(arguments(tmp_path / "tiny.toml", tmp_path, "--model.dim", "192")).config.model
    assert (model.head_dim, model.memory_shape) == (96, (3, 64))
    assert parse(arguments(tiny_toml, tmp_path, "--model.dim", "192")).config.model.memory_shape == (2, 96)


def test_a_run_from_before_the_memory_had_heads_of_its_own_has_those_of_the_attention(tmp_path, tiny_toml):
    config = parse(arguments(tiny_toml, tmp_path, "--model.num-heads", "4")).config
    write_run_config(config, tmp_path)
    lines = (tmp_path / "config.toml").read_text().splitlines(keepends=True)
    (tmp_path / "config.toml").write_text("".join(line for line in lines if not line.startswith("memory_head")))
    assert load_run_config(tmp_path).model.memory_shape == (4, 8)


def test_variant_is_short_for_the_models_variant(tmp_path, tiny_toml):
    assert parse(arguments(tiny_toml, tmp_path, "--variant", "mag")).config.model.variant == "mag"


def test_the_vocabulary_comes_from_the_data_unless_it_is_given(tmp_path, tiny_toml):
    assert parse(arguments(tiny_toml, tmp_path)).config.model.vocab_size == 96
    assert parse(arguments(tiny_toml, tmp_path, "--model.vocab-size", "50")).config.model.vocab_size == 50


def test_the_path_of_the_data_is_kept_whole(tmp_path, tiny_toml, shards, monkeypatch):
    monkeypatch.chdir(shards.parent)
    assert parse(arguments(tiny_toml, tmp_path, "--data.path", shards.name)).config.data.path == str(shards)


def test_switches_take_true_and_false(tmp_path, tiny_toml):
    assert not parse(arguments(tiny_toml, tmp_path, "--model.tie-embeddings", "false")).config.model.tie_embeddings


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train.step", "3"], r"unknown setting --train\.step in the command line; did you mean --train\.steps\?"),
        (["--varaint", "mag"], r"unknown setting --varaint .* did you mean --variant\?"),
        (["--train.lr", "1"], r"did you mean --optimizer\.lr\?"),
        (["--train.steps", "many"], "--train.steps is 'many'; it must be a whole number"),
        (["--model.tie-embeddings", "perhaps"], "must be true or false"),
        (["--train.steps"], r"--train\.steps needs a value"),
        (["--train.steps", "--variant", "mag"], r"--train\.steps needs a value"),
        (["train.steps", "3"], "unexpected 'train.steps'"),
        (["--variant", "mega"], "variant is 'mega'; it must be one of deltanet, gated_deltanet, lmm, mac"),
        (["--train.steps", "0"], r"train\.steps is 0; it must be at least 1"),
        (["--optimizer.beta2", "1"], r"optimizer\.beta2 is 1\.0; it must be below 1"),
        (["--optimizer.lr", "nan"], r"optimizer\.lr is nan; it must be at least 0"),
        (["--parallel.zero-stage", "4"], "zero_stage is 4; it must be 0, 1, 2 or 3"),
        (
            ["--optimizer.name", "muon"],
            r"whole matrices, .*zero_stage 1 divide over ranks; use .*zero_stage 0 \(in fp32\)",
        ),
        (["--optimizer.name", "sgd"], r"optimizer\.name is 'sgd'; it must be one of adamw, muon"),
        (["--parallel.pipeline", "2"], r"pipeline parallelism is not supported; divide .* parallel\.tensor, .*context"),
        (["--parallel.sequence", "true"], r"parallel\.sequence shares tokens over .* parallel\.tensor is 1"),
        (["--parallel.memory-parallel", "width"], "memory_parallel is 'width'; it must be one of auto, heads, hidden"),
        (
            ["--parallel.offload-optimizer", "true", "--parallel.zero-stage", "0"],
            r"needs parallel\.zero_stage 1",
        ),
        (["--parallel.context", "2", "--parallel.zero-stage", "3"], "wait for each other forever; .* use zero_stage 1"),
        (["--parallel.context", "0"], r"parallel\.context is 0; it must be at least 1"),
        (["--parallel.context", "3"], r"sequence_length 32 cannot be divided into 3 equal parts .* a multiple of 48"),
        (["--parallel.context", "4"], r"4 equal parts of whole segments of model\.segment_length 16 .* multiple of 64"),
        (
            ["--parallel.context", "2", "--variant", "mag", "--model.window", "0"],
            r"keeps all of them; set",
        ),
        (["--parallel.tensor", "3", "--parallel.sequence", "true"], r"divides 32 tokens over parallel\.tensor 3 ranks"),
        (["--train.recompute", "some"], "train.recompute is 'some'; it must be one of none, block, except_memory"),
        (["--train.micro-batch", "3"], "global_batch 4 is not a multiple of train.micro_batch 3"),
        (["--logging.wandb", "perhaps"], "must be one of off, online, offline"),
        (["--data.path", "/nowhere"], "nowhere"),
        (["--config", "/nowhere.toml"], "no configuration at /nowhere.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_named(tmp_path, tiny_toml, more, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments(tiny_toml, tmp_path, *more))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 3", r"unknown setting train\.step in .*; did you mean train\.steps\?"),
        ("[trian]\nsteps = 3", r"unknown setting trian in .*; did you mean train\?"),
        ("steps = 3", r"unknown setting steps in .*; did you mean train\.steps\?"),
        ("train = 3", r"train in .* is 3; it is a section"),
        ('[train]\nsteps = "3"', "train.steps in .* is '3'; it must be a whole number"),
        ("[train]\nsteps = 3.0", "must be a whole number"),
        ("[train]\nsteps = true", "must be a whole number"),
        ("[train\nsteps = 3", "cannot read the configuration"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        build(read_toml(file), str(file))


@pytest.mark.parametrize("missing", ["--config", "--run-dir"])
def test_what_every_run_needs_is_asked_for(tmp_path, tiny_toml, missing):
    words = arguments(tiny_toml, tmp_path)
    at = words.index(missing)
    with pytest.raises(ValueError, match=f"{missing} is missing; usage"):
        parse(words[:at] + words[at + 2 :])


def test_help_shows_every_setting_with_its_documentation(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in setting_names():
        assert "--" + name.replace("_", "-") in shown
    assert "Samples of one step over all ranks and micro-batches." in shown


def test_the_batch_must_be_shared_out_evenly():
    config = RunConfig(train=TrainConfig(global_batch=12, micro_batch=2))
    assert [config.accumulation(ranks) for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ValueError, match=r"12 cannot be shared out over 4 data ranks .* multiple of 8"):
        config.accumulation(4)


def test_the_quickstart_configuration_is_legal():
    config = build(*read_config("quickstart"))
    assert config.accumulation(2) == 1
    for variant in ("lmm", "mac", "mal", "transformer", "gated_deltanet"):
        assert dataclasses.replace(config.model, variant=variant).variant == variant


@pytest.mark.parametrize(
    "damage", [lambda text: text.replace("steps = 20\n", "steps = 21\n"), lambda text: text[:40] + "["]
)
def test_an_edited_or_damaged_file_gives_way_to_the_checkpoint(tmp_path, tiny_toml, capsys, damage):
    config = parse(arguments(tiny_toml, tmp_path)).config
    write_run_config(config, tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    record = {"files": {}, "settings": dataclasses.asdict(config)}
    (folder / "checkpoint.json").write_text(json.dumps(record))
    assert load_run_config(tmp_path) == config
    assert not capsys.readouterr().err
    file = tmp_path / "config.toml"
    before = file.read_text()
    file.write_text(damage(before))
    assert file.read_text() != before
    assert load_run_config(tmp_path) == config
    said = capsys.readouterr().err
    assert said.startswith("note: ")
    assert str(file) in said
    assert str(folder) in said
