"""The commands as a user meets them: help, results, and one sentence for each fault."""

import json
import shutil
from pathlib import Path

import pytest

from evals.command_line import EvaluationError
from evals.models import load_model, load_tokenizer
from evals.niah import NiahSettings
from evals.niah import __main__ as niah
from evals.niah.summary import FILES
from tests.commands import help_of, status_of

from .conftest import MakeRun, train_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        ("evals.ask", "--checkpoint"),
        ("evals.babilong", "--pg19"),
        ("evals.babilong.training_data", "--babi"),
        ("evals.harness", "--data"),
        ("evals.niah", "--checkpoint"),
        ("evals.paper", "--models"),
        ("evals.position_perplexity", "--tokenizer"),
    ],
)
def test_help_documents_settings_and_imports_nothing_heavy(module: str, setting: str) -> None:
    text, imported = help_of(module)
    assert setting in text
    assert "evals.command_line" in imported
    assert not imported & {"torch", "lm_eval"}


def test_niah_command_writes_report_and_table(
    mac_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--lengths", 450, 700, "--depths", 2, "--max-new-tokens", 8)
    assert status_of(niah.main, "--checkpoint", mac_run, "--output", tmp_path, *words) == 0
    out, err = capsys.readouterr()
    report = json.loads((tmp_path / "niah.json").read_text())
    assert set(report["accuracy_by_length"]["niah_single_1"]) == {"450", "700"}
    assert (report["trained_length"], report["model"]["variant"]) == (128, "mac")
    assert (tmp_path / "niah.png").read_bytes().startswith(b"\x89PNG")
    assert out.splitlines()[0].split()[:5] == ["control", "task", "length", "prompt", "accuracy"]
    for name in FILES:
        assert (tmp_path / name).stat().st_size > 0
    lines = err.splitlines()
    assert lines[0] == "4 samples, 2,300 tokens"
    assert [line.split(",")[0] for line in lines[1:]] == ["length 450", "length 700"]


def fault(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert status_of(niah.main, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_each_fault_is_one_sentence(mac_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*words: object, run: Path = mac_run, output: Path = tmp_path / "out") -> str:
        return fault(capsys, "--checkpoint", run, "--output", output, *words)

    assert "no checkpoint at /nowhere" in says(run=Path("/nowhere"))
    assert "no whole checkpoint" in says(run=tmp_path)
    assert "/nowhere.model: no such file" in says("--tokenizer", "/nowhere.model")
    (tmp_path / "text.model").write_text("not a model")
    assert "not a sentencepiece model" in says("--tokenizer", tmp_path / "text.model")
    (tmp_path / "empty.model").touch()
    assert "not a sentencepiece model" in says("--tokenizer", tmp_path / "empty.model")
    assert "--lengths 100: too short" in says("--lengths", 100, 2000)
    assert "--samples is 0" in says("--samples", 0)
    assert "--lengths is (0,)" in says("--lengths", 0)
    assert "--lengths is (99999999999,); give at most 16,777,216" in says("--lengths", 99999999999)
    assert "--samples is 1000000000; give at most 100,000,000" in says("--samples", 1_000_000_000)
    assert "--text /nowhere.txt: cannot be read" in says("--tasks", "n", "--text", "/nowhere.txt")
    assert "--keys is for the task mk1; add it to --tasks" in says("--tasks", "mk2", "--keys", 8)
    assert "--keys is (0,); give at least 1" in says("--tasks", "mk1", "--keys", 0)
    assert "--keys 6000: too many for these words; give at most 5194" in says("--tasks", "mk1", "--keys", 4, 6000)
    assert "--lengths 900: too short for the prompt of niah_multikey_1_keys_60" in says(
        *("--tasks", "mk1", "--keys", 60, "--lengths", 900)
    )
    assert not (tmp_path / "out").exists(), "a fault left files behind"
    (tmp_path / "file").touch()
    assert "file: is a file; give a folder" in says("--lengths", 500, output=tmp_path / "file")
    assert "file is a file; give another path" in says(output=tmp_path / "file" / "below")
    assert "the name is too long for this file system" in says(output=tmp_path / ("x" * 300))
    assert "--output /proc/sys/out: cannot be written (" in says(output=Path("/proc/sys/out"))


def test_tokenizer_with_another_vocabulary_is_refused(mac_run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.model").write_bytes(train_tokenizer(340))
    with pytest.raises(EvaluationError, match=r"tokenizer has 340 pieces but the model of .* 360"):
        load_model(mac_run, tmp_path / "other.model")


def test_damaged_weights_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(make_run("mac"), run)
    shard = next(run.rglob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + bytes(2))
    with pytest.raises(EvaluationError, match=f"{shard} has changed since it was written .*--no-verify"):
        load_model(run)
    load_model(run, verify=False)
    shard.write_bytes(content[:-1])
    with pytest.raises(EvaluationError, match="safetensors"):
        load_model(run)


def test_model_knows_where_it_comes_from(mac_run: Path, tokenizer: Path) -> None:
    model, again = load_model(mac_run), load_model(next((mac_run / "checkpoints").iterdir()))
    assert model.checkpoint_sha256 == again.checkpoint_sha256
    assert model.trained_length == again.trained_length == 128
    assert model.tokenizer.sha256 == load_tokenizer(tokenizer).sha256
    (mac_run / "config.toml").rename(mac_run / "away")
    try:
        assert load_model(mac_run).trained_length is None
    finally:
        (mac_run / "away").rename(mac_run / "config.toml")


def test_more_than_one_process_is_refused(mac_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvaluationError, match="one process"):
        load_model(mac_run)


def test_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert status_of(interrupted) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_one_depth_is_the_middle_and_many_reach_both_ends() -> None:
    assert NiahSettings(Path(), Path(), depths=1).depth_percents == [50.0]
    assert NiahSettings(Path(), Path(), depths=5).depth_percents == [0.0, 25.0, 50.0, 75.0, 100.0]
