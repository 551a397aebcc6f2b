"""What launch/torchrun.sh does with signals and with workers that are lost, on one host."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.pretrain.jobs import ROOT, Job, read_metrics
from titans_mcore.weights import find_checkpoint

SHORT = ["--variant", "transformer", "--nproc", "1", "--evaluate.heldout-sequences", "0"]


def start(tiny_toml: Path, run_dir: Path, *arguments: str, **environment: str) -> Job:
    settings = [f"{name}={value}" for name, value in environment.items()]
    script = ["bash", str(ROOT / "launch" / "torchrun.sh"), "--config", str(tiny_toml), "--run-dir", str(run_dir)]
    return Job(["env", *settings, *script, *SHORT, *arguments], run_dir.parent)


def wait_for_step(job: Job, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not any(record["step"] >= step for record in read_metrics(run_dir)):
        if time.monotonic() > deadline or job.process.poll() is not None:
            job.kill()
            pytest.fail(f"step {step} was not reached: {job.process.communicate()}")
        time.sleep(0.01)


def kill_workers(job: Job) -> None:
    launcher = job.process.pid
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.slow
def test_a_save_of_40_seconds_survives_a_signal(tiny_toml, tmp_path):
    slow_disk = f"{ROOT}:{Path(__file__).parent / 'slow_disk'}"
    run_dir, waited = tmp_path / "run", tmp_path / "waited"
    more = {"PYTHONPATH": slow_disk, "WAITED": str(waited)}
    job = start(tiny_toml, run_dir, "--train.steps", "5000", "--checkpoint.every-steps", "0", **more)
    wait_for_step(job, run_dir, 3)
    assert not waited.exists()
    job.process.send_signal(signal.SIGUSR1)
    status, out, err = job.wait(300)
    assert (status, err) == (0, "")
    assert waited.exists()
    assert "stopped by SIGUSR1 after step" in out
    assert find_checkpoint(run_dir)


def test_a_save_that_takes_longer_than_it_may_is_a_failure_in_one_line(tiny_toml, tmp_path):
    slow_disk = f"{ROOT}:{Path(__file__).parent / 'slow_disk'}"
    run_dir = tmp_path / "run"
    more = {"PYTHONPATH": slow_disk, "SHUTDOWN_SECONDS": "2"}
    job = start(tiny_toml, run_dir, "--train.steps", "5000", "--checkpoint.every-steps", "0", **more)
    wait_for_step(job, run_dir, 3)
    job.process.send_signal(signal.SIGTERM)
    status, _, err = job.wait(300)
    assert (status, err) == (128 + signal.SIGTERM, "error: stopped by SIGTERM before every process had saved\n")


@pytest.mark.slow
def test_lost_workers_go_on_from_the_last_checkpoint_as_often_as_allowed(tiny_toml, tmp_path):
    steps = ["--train.steps", "400", "--checkpoint.every-steps", "20"]
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert start(tiny_toml, whole, *steps).wait()[0] == 0
    job = start(tiny_toml, run_dir, *steps, MAX_RESTARTS="2")
    for step in (25, 125):
        wait_for_step(job, run_dir, step)
        kill_workers(job)
    status, out, err = job.wait()
    assert status == 0, err
    assert "process 0 was killed by signal 9; all go on from the last checkpoint (restart 2 of 2)" in err
    assert "going on from" in out
    assert [record["loss"] for record in read_metrics(run_dir)] == [record["loss"] for record in read_metrics(whole)]


def test_a_run_that_was_stopped_ends_with_the_status_that_asks_for_another_start(tiny_toml, tmp_path):
    run_dir = tmp_path / "run"
    job = start(tiny_toml, run_dir, "--train.steps", "5000", "--checkpoint.every-steps", "0", REQUEUE_STATUS="75")
    wait_for_step(job, run_dir, 3)
    job.process.send_signal(signal.SIGTERM)
    status, _, err = job.wait(300)
    assert (status, err) == (75, "")
    asked = json.loads((run_dir / "requeue.json").read_text())
    done = len(read_metrics(run_dir))
    assert (asked["reason"], asked["step"], asked["finished"]) == ("SIGTERM", done, False)
    assert (run_dir / asked["checkpoint"]).is_dir()


def test_a_mistake_is_not_tried_again(tiny_toml, tmp_path):
    """The workers find it, not the launcher: another vocabulary than the data's."""
    job = start(tiny_toml, tmp_path / "run", "--train.steps", "2", "--model.vocab-size", "7", MAX_RESTARTS="3")
    status, out, err = job.wait(300)
    assert (status, out) == (2, "")
    assert err.startswith("error: model.vocab_size is 7 but the tokenizer of")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"NNODES": "two"}, "error: NNODES is 'two'; write a number of hosts, or FEWEST:MOST"),
        ({"NNODES": "2", "NODE_RANK": "first", "MASTER_ADDR": "a"}, "error: NODE_RANK is 'first'; it must be a whole"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "error: NODE_RANK is 2 and NNODES 2; number the hosts"),
        ({"NNODES": "3:2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, "error: NNODES is 3:2; write a number of hosts, or"),
        ({"MAX_RESTARTS": "-1"}, "error: MAX_RESTARTS is '-1'; it must be a whole number"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_mistaken_variable_is_one_sentence(tiny_toml, tmp_path, environment, sentence):
    status, out, err = start(tiny_toml, tmp_path / "run", **environment).wait(300)
    assert (status, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1
