"""What a run reports."""

import json
import sys

import pytest

from pretrain.config import RunConfig
from pretrain.metrics import Metrics, clock, read_metrics
from pretrain.settings import LoggingConfig, TrainConfig

from .jobs import Job

VALUES = {
    "loss": 4.25,
    "grad_norm": 1.5,
    "lr": 3e-4,
    "tokens": 100,
    "tokens_per_second": 1234.5,
    "seconds": 2.0,
    "data_wait_seconds": 0.1,
}


def config(**logging):
    return RunConfig(train=TrainConfig(steps=10), logging=LoggingConfig(**logging))


def report(run_dir, steps, resumed_step=0, rank=0, **logging):
    metrics = Metrics(config(**logging), run_dir, resumed_step=resumed_step, rank=rank)
    for step in steps:
        metrics.step(step, VALUES)
    metrics.close()


def test_a_resumed_run_has_each_step_once(tmp_path):
    report(tmp_path, range(1, 8))
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 8, "loss"')
    report(tmp_path, range(5, 9), resumed_step=4)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 9))
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_again_from_nothing_keeps_no_old_steps(tmp_path):
    report(tmp_path, range(1, 4))
    report(tmp_path, range(1, 3))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    report(tmp_path, range(1, 4), rank=1)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_the_line_says_loss_speed_and_the_time_that_is_left(tmp_path, capsys):
    report(tmp_path, range(5, 7), resumed_step=4)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "step  6/10 | loss 4.2500 | 1,234 tokens/s | lr 3.00e-04 | grad norm 1.500 | ETA 0:00:08"
    )


def test_lines_can_be_rarer_than_steps(tmp_path, capsys):
    report(tmp_path, range(1, 11), every_steps=4)
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines()] == ["step  4", "step  8", "step 10"]
    assert len(read_metrics(tmp_path)) == 10


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00:00"), (59.2, "0:01:00"), (3725, "1:02:05"), (9e5, "250:00:00")]
)
def test_durations_read_as_a_clock(seconds, shown):
    assert clock(seconds) == shown


def test_wandb_writes_into_the_run_folder_without_a_network(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.pretrain.test_metrics import report\n"
        "report(Path(sys.argv[1]), range(1, 4), wandb='offline')"
    )
    import pathlib

    status, _, err = Job([sys.executable, "-c", script, str(tmp_path)], pathlib.Path(__file__).parent).wait()
    assert status == 0, err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(read_metrics(tmp_path)) == 3
