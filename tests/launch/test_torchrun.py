"""launch/torchrun.sh and `python -m pretrain.train` as a user meets them."""

import os
import subprocess
import sys

import pytest

from pretrain.config.files import load_run_config
from tests.pretrain.jobs import ROOT, Job, read_metrics

SCRIPT = ROOT / "launch" / "torchrun.sh"
SHORT = ["--variant", "transformer", "--train.steps", "2"]


@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_whose_launcher_was_killed_while_it_imported_does_not_train_on(tmp_path, alive):
    """Nobody sends it a signal then: it has to look."""
    launcher = os.getpid() if alive else os.getppid()
    names = {"TITANS_STATUS_DIR": str(tmp_path), "TITANS_LAUNCHER": str(launcher), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from pretrain.launch.status import follow_launcher; follow_launcher()"]
    ended = subprocess.run(command, env=os.environ | names, capture_output=True, text=True)
    assert ended.returncode == (0 if alive else 1), ended.stderr
    assert ended.stderr.strip() == ("" if alive else "error: the launcher has ended; nothing is trained without it")


def test_help_needs_nothing(tmp_path):
    status, out, err = Job(["bash", str(SCRIPT), "--help"], tmp_path).wait()
    assert (status, err) == (0, "")
    assert out.startswith("usage: bash launch/torchrun.sh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.step", "3"], "error: unknown setting --train.step in the command line; did you mean --train.steps?"),
        (["--variant", "mega"], "error: variant is 'mega'; it must be one of deltanet, gated_deltanet, lmm, mac, "),
        (["--data.path", "/nowhere"], "/nowhere"),
        (["--nproc", "two"], "error: --nproc is 'two'; it must be a number of processes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_before_any_process_starts(launch, tmp_path, arguments, message):
    status, out, err = launch(tmp_path / "run", *arguments).wait(120)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_processes_that_the_layout_does_not_divide_are_refused_in_one_line(launch, tmp_path):
    status, out, err = launch(tmp_path / "run", "--parallel.tensor", "2", "--nproc", "3").wait()
    assert (status, out) == (2, "")
    assert err.startswith("error: 3 processes cannot be divided into tensor-parallel groups of 2; start a multiple")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_processes_that_tensor_and_context_do_not_divide_are_refused_in_one_line(launch, tmp_path):
    layout = ["--parallel.tensor", "2", "--parallel.context", "2", "--nproc", "2"]
    status, out, err = launch(tmp_path / "run", *layout).wait()
    assert (status, out) == (2, "")
    assert err.startswith(
        "error: 2 processes cannot be divided into groups of tensor 2 x context 2; start a multiple of 4"
    )
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_heads_that_the_layout_does_not_divide_are_refused_in_one_line(train, tmp_path):
    status, out, err = train(tmp_path / "run", "--parallel.tensor", "2", "--model.num-heads", "1").wait()
    assert (status, out) == (2, "")
    assert err.startswith("error: num_heads 1 cannot be divided by tensor parallel size 2; choose")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_one_process_trains_without_torchrun_and_compiles_nothing_for_it(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    status, out, err = train(tmp_path / "run", *SHORT, "--schedule.warmup-steps", "0").wait()
    assert status == 0, err
    assert err == ""
    lines = out.splitlines()
    assert "tensor 1 x data 1, ZeRO 1" in lines[0]
    assert lines[1].startswith("shards: checksums of 4 files, ")
    assert lines[2].startswith("step 1/2 | loss 4.")
    assert "tokens/s" in lines[2]
    assert "ETA 0:00:0" in lines[2]
    assert lines[-1].startswith("done: held-out loss 4.")
    assert not (tmp_path / "compiled").exists()
    assert load_run_config(tmp_path / "run").model.variant == "transformer"
    (first, second) = read_metrics(tmp_path / "run")
    numbers = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds", "data_wait_seconds"}
    assert numbers < set(first)
    assert (second["step"], second["tokens"]) == (2, 2 * 4 * 32)


def test_two_runs_share_a_host(launch, tmp_path):
    jobs = [launch(tmp_path / name, *SHORT, "--nproc", "1") for name in ("one", "two")]
    assert [job.wait()[0] for job in jobs] == [0, 0]
    assert [len(read_metrics(tmp_path / name)) for name in ("one", "two")] == [2, 2]


def test_an_odd_number_of_parameters_trains(train, tmp_path):
    """DeepSpeed wants buckets of even size; the engine rounds up."""
    odd = [
        "--variant",
        "lmm",
        "--model.memory-heads",
        "1",
        "--model.memory-gates",
        "shared",
        "--parallel.zero-stage",
        "1",
    ]
    status, out, err = train(tmp_path / "run", "--train.steps", "1", *odd).wait(120)
    assert status == 0, out + err
    parameters = int(out.split(" parameters")[0].rsplit(" ", 1)[1].replace(",", ""))
    assert parameters % 2 == 1
