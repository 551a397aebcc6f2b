"""A long run that is killed at random: it ends like one that was left alone, and leaves nothing behind."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.pretrain.jobs import read_metrics

from .test_resume import numbers, tensor_files

STEPS, KILLS = 2_000, 20
ARGUMENTS = ["--variant", "transformer", "--train.steps", str(STEPS), "--checkpoint.every-steps", "100"]
ARGUMENTS += ["--nproc", "2", "--logging.every-steps", "500"]


def processes_of(run_dir):
    """Processes that have the run folder on their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_dir).encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.slow
def test_two_thousand_steps_with_random_kills_end_like_an_undisturbed_run_and_leave_nothing(launch, tmp_path):
    status, _, err = launch(tmp_path / "straight", *ARGUMENTS).wait(900)
    assert status == 0, err

    run_dir, rng = tmp_path / "killed", random.Random(0)
    for _ in range(KILLS):
        job = launch(run_dir, *ARGUMENTS)
        goal = len(read_metrics(run_dir)) + rng.randint(20, STEPS // KILLS - 10)  # all kills before the end
        while len(read_metrics(run_dir)) < goal:
            assert job.process.poll() is None
            time.sleep(0.02)
        job.kill()
        job.wait()
    status, _, err = launch(run_dir, *ARGUMENTS).wait(900)
    assert status == 0, err

    assert numbers(run_dir) == numbers(tmp_path / "straight")
    assert tensor_files(run_dir) == tensor_files(tmp_path / "straight")
    assert processes_of(run_dir) == []
    left = {path.relative_to(run_dir).parts[0] for path in run_dir.rglob("*") if ".partial" in path.name}
    assert left == set()
    kept = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert len(kept) <= 3 + 1 + 1  # the newest, the best, the newest healthy one
    assert not [name for name in os.listdir("/dev/shm") if str(os.getpid()) in name]
