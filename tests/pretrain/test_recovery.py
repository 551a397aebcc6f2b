"""Runs in which something goes wrong: bad steps are skipped, gone back behind, or leave an autopsy; full disks pass."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import replay
from pretrain.launch.status import EXIT_GIVEN_UP
from pretrain.recovery.rewinds import Rewinds
from pretrain.report.records import read_records
from titans_mcore.weights import find_checkpoint

from .jobs import Job, descendants, read_metrics
from .test_resume import numbers, tensor_files, wait_for_step

FAST = ["--variant", "transformer", "--schedule.warmup-steps", "0", "--logging.every-steps", "100"]
HEALTHY = ["--checkpoint.every-steps", "2", "--health.healthy-after-steps", "2"]


@pytest.fixture(scope="module")
def sabotaged(tiny_toml, tmp_path_factory):
    """Trains with something going wrong, on one process or more."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(what, run_dir, *settings, processes=1):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        command = [sys.executable, *launcher, "-m", "tests.pretrain.sabotaged_train", what]
        command += ["--config", str(tiny_toml), "--run-dir", str(run_dir), *FAST, *settings]
        return Job(command, elsewhere)

    return run


def events(run_dir, name):
    return [record for record in read_records(run_dir) if record["kind"] == "event" and record["name"] == name]


@pytest.fixture(scope="module")
def broken_and_slow(sabotaged, tmp_path_factory):
    """Folder and output of two ranks of which one is slow, and two steps are not numbers."""
    run_dir, settings = tmp_path_factory.mktemp("broken_and_slow"), ["--logging.stragglers-every-steps", "4"]
    status, out, err = sabotaged("nan! 5 6, slow 1 0.5", run_dir, "--train.steps", "9", *settings, processes=2).wait()
    assert status == 0, err
    return run_dir, out


@pytest.fixture(scope="module")
def spiked(sabotaged, tmp_path_factory):
    """A run with a spike, and what it says; one that passes over its batch from the start, with a slow disk."""
    folder = tmp_path_factory.mktemp("spiked")
    settings = [*HEALTHY, "--health.spike", "rewind", "--health.spike-window", "3", "--train.steps", "12"]
    status, out, err = sabotaged("loud 9", folder / "run", *settings).wait()
    assert status == 0, err
    (folder / "clean").mkdir()
    Rewinds.read(folder / "run").write(folder / "clean")
    status, _, said = sabotaged("stall 5", folder / "clean", *settings).wait()
    assert status == 0, said
    return folder, out, said


def test_a_step_that_is_not_a_number_is_skipped_counted_and_moves_no_learning_rate(broken_and_slow):
    run_dir, out = broken_and_slow
    steps = read_metrics(run_dir)
    assert [record["updated"] for record in steps] == [True] * 4 + [False] * 2 + [True] * 3
    assert [record["loss"] is None for record in steps] == [False] * 4 + [True] * 2 + [False] * 3
    rates = [record["lr"] for record in steps]
    assert rates[4] == rates[5] == rates[6] > rates[7]
    assert [record["tokens"] for record in steps] == [128 * step for step in range(1, 10)]
    assert "the loss is nan at step 5; skip" in out
    assert "2 updates left out" in out
    assert json.loads((find_checkpoint(run_dir) / "checkpoint.json").read_text())["health"]["updates"] == 7


def test_a_rank_that_is_slower_than_the_others_is_named(broken_and_slow):
    run_dir, out = broken_and_slow
    assert "note: rank 1 on " in out
    assert {event["rank"] for event in events(run_dir, "straggler")} == {1}


def test_a_spike_goes_back_to_the_healthy_checkpoint_and_passes_over_its_batch(spiked):
    folder, out, _ = spiked
    assert "at step 9: going back to step-00000006, and passing over step 9" in out
    assert [tuple(entry[:3]) for entry in Rewinds.read(folder / "run").entries] == [(6, 9, 9)]
    steps = read_metrics(folder / "run")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]
    assert all(record["updated"] for record in steps)
    # What was learned is what a run learns that passes over the batch from the start.
    assert numbers(folder / "clean") == numbers(folder / "run")
    assert tensor_files(folder / "clean") == tensor_files(folder / "run")


def test_a_batch_that_is_long_in_coming_is_spoken_about(spiked):
    _, _, said = spiked
    assert "has waited 0 s for the batch of step 5, and all others for it; is the storage of data.path slow?" in said


def test_a_run_that_goes_back_in_vain_stops(sabotaged, tmp_path):
    settings = [*HEALTHY, "--health.nonfinite", "rewind", "--health.rewinds", "2", "--train.steps", "20"]
    status, _, err = sabotaged("nan! 9 10 11 12", tmp_path, *settings).wait()
    assert status == EXIT_GIVEN_UP
    assert "the loss is nan; the run went back to step 6 2 times already, at step 11" in err
    assert len(events(tmp_path, "rewind")) == 2


def test_a_run_without_a_healthy_checkpoint_has_nothing_to_go_back_to(sabotaged, tmp_path):
    status, _, err = sabotaged("nan 3", tmp_path, "--health.nonfinite", "rewind").wait()
    assert status == EXIT_GIVEN_UP
    assert "there is no healthy checkpoint to go back to, at step 3" in err


@pytest.mark.slow
def test_bad_steps_in_a_row_leave_an_autopsy_from_which_the_step_is_done_again_in_one_process(sabotaged, tmp_path):
    diverging = ["--variant", "mac", "--optimizer.lr", "1e4", "--optimizer.clip-norm", "0"]
    diverging += ["--health.in-a-row", "3"]
    _, out, err = sabotaged("nothing", tmp_path, *diverging, "--checkpoint.every-steps", "1", processes=2).wait()
    assert "done" not in out
    folder = tmp_path / "autopsy" / "step-00000004"
    facts = json.loads((folder / "autopsy.json").read_text())
    assert facts["step"] == 4
    assert facts["samples"] == [12, 15]
    assert f"error: {facts['reason']}, at step 4; the newest checkpoint is {find_checkpoint(tmp_path)}" in err
    assert [record["updated"] for record in read_metrics(tmp_path)] == [True, False, False, False]

    command = [sys.executable, "-m", "pretrain.replay", str(folder)]
    replayed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert replayed.returncode == 0, replayed.stderr
    assert replayed.stdout.count("not finite first in layers.0") == 4
    assert all(f"  {name} [" in replayed.stdout for name in ("surprise", "theta", "alpha", "held"))
    assert "4 of 4 samples are not finite" in replayed.stdout


def test_what_cannot_be_replayed_is_said_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        replay.main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path} has no whole checkpoint to replay from")
    assert err.count("\n") == 1


@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tiny_toml, tmp_path, asynchronous):
    # No file may become larger than this: the optimizer's moments (twice the weights) do not fit, the weights do.
    limit = 100_000
    command = [sys.executable, "-m", "pretrain.train", "--config", str(tiny_toml), "--run-dir", str(tmp_path / "run")]
    command += [*FAST, "--train.steps", "4", "--checkpoint.every-steps", "2"]
    command += ["--checkpoint.asynchronous", asynchronous]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert "error: the checkpoint after step 2 could not be saved: File too large" in done.stdout
    assert "the run goes on, its newest checkpoint is none; make room below" in done.stdout
    assert "error: the last checkpoint could not be saved: File too large" in done.stderr
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []

    if asynchronous == "true":
        again = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0, again.stderr
        assert find_checkpoint(tmp_path / "run").name == "step-00000004"


def test_training_goes_on_while_a_checkpoint_is_written(sabotaged, tmp_path):
    settings = ["--train.steps", "12", "--checkpoint.every-steps", "2", "--checkpoint.keep", "9"]
    status, _, err = sabotaged("save 4", tmp_path, *settings, processes=2).wait()
    assert status == 0, err
    records = read_records(tmp_path)
    saved = {record["folder"]: place for place, record in enumerate(records) if record.get("name") == "saved"}
    third = next(place for place, record in enumerate(records) if record["kind"] == "step" and record["step"] == 3)
    assert saved["step-00000002"] > third
    assert len([record for record in records if "save_stall_seconds" in record]) == 6
    assert len(saved) == 6


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_named_when_a_collective_times_out(sabotaged, tmp_path):
    settings = ["--train.steps", "100000", "--parallel.step-timeout-seconds", "5", "--checkpoint.every-steps", "0"]
    job = sabotaged("nothing", tmp_path, *settings, processes=2)
    wait_for_step(job, tmp_path, 3)
    (stopped,) = [pid for pid in descendants(job.process.pid) if b"LOCAL_RANK=1\0" in environment_of(pid)]
    os.kill(stopped, signal.SIGSTOP)
    status, _, err = job.wait()
    assert status == 1
    assert "error: communication failed in step " in err
    assert f"no answer from rank 1 on {socket.gethostname()}" in err
    assert json.loads((tmp_path / "flight_recorder" / "rank_0.json").read_text())["entries"]


def environment_of(pid):
    return Path(f"/proc/{pid}/environ").read_bytes()
