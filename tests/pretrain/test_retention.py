"""Which checkpoints are kept, and that the newest healthy one always is."""

import json
import math

import pytest

from pretrain.checkpoint.retention import Probation, check_room, delete_others, to_keep, whole_checkpoints
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import CheckpointConfig, HealthConfig
from pretrain.recovery.health import Health


@pytest.fixture
def run(tmp_path):
    """Makes a run folder with checkpoints of 100 tokens a step: {step: (held-out loss or None, healthy)}."""

    def make(checkpoints):
        for step, (loss, healthy) in checkpoints.items():
            folder = tmp_path / "checkpoints" / f"step-{step:08d}"
            folder.mkdir(parents=True)
            record = {"step": step, "tokens": 100 * step, "files": {}, "health": {"updates": step}}
            (folder / "checkpoint.json").write_text(json.dumps(record | ({"heldout_loss": loss} if loss else {})))
            if healthy:
                (folder / "healthy.json").write_text("{}")
        return tmp_path

    return make


def steps_of(run_dir):
    return [one.step for one in whole_checkpoints(run_dir)]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (CheckpointConfig(keep=2, keep_best=0), [60, 50, 20]),
        (CheckpointConfig(keep=1, keep_best=1), [60, 40, 20]),
        (CheckpointConfig(keep=1, keep_best=2), [60, 40, 20]),
        (CheckpointConfig(keep=1, keep_best=0, keep_every_tokens=2500), [60, 50, 30, 20]),
        (CheckpointConfig(keep=9, keep_best=0), [60, 50, 40, 30, 20, 10]),
    ],
    ids=["latest", "best", "two best", "every 2,500 tokens", "all"],
)
def test_rules_keep_the_latest_the_best_those_for_good_and_the_newest_healthy_one(run, rules, kept):
    run_dir = run(
        {10: (4.0, True), 20: (3.0, True), 30: (None, False), 40: (2.0, False), 50: (3.5, False)} | {60: (None, False)}
    )
    delete_others(run_dir, rules)
    assert steps_of(run_dir) == kept


def test_what_is_kept_for_good_stays_as_the_run_goes_on(run):
    rules = CheckpointConfig(keep=1, keep_best=0, keep_every_tokens=250)
    kept = set()
    for step in range(1, 12):
        kept = {one.step for one in whole_checkpoints(run({step: (None, False)}))}
        kept_folders = to_keep(whole_checkpoints(run({})), rules)
        delete_others(run({}), rules)
        assert {int(folder.name[5:]) for folder in kept_folders} <= kept
    assert steps_of(run({})) == [11, 10, 8, 5, 3]


def test_a_damaged_checkpoint_is_none_and_goes(run):
    run_dir = run({10: (None, False), 20: (None, False)})
    (run_dir / "checkpoints" / "step-00000020" / "checkpoint.json").write_text("{")
    delete_others(run_dir, CheckpointConfig(keep=1))
    assert [folder.name for folder in (run_dir / "checkpoints").iterdir()] == ["step-00000010"]


def test_a_checkpoint_is_marked_once_its_steps_were_good_and_a_restart_goes_on_waiting(run):
    run_dir = run({10: (None, False), 12: (None, False)})
    health = Health(HealthConfig(healthy_after_steps=5), updates=12)
    waiting = Probation(run_dir)
    assert waiting.check(health) == []
    for step in range(13, 16):
        health.judge(step, 1.0, 1.0, updated=True)
    waiting = Probation(run_dir)
    assert [folder.name for folder in waiting.check(health)] == ["step-00000010"]
    assert waiting.check(health) == []
    health.judge(16, math.nan, 1.0, updated=False)
    for step in range(17, 30):
        health.judge(step, 1.0, 1.0, updated=True)
    assert waiting.check(health) == []
    assert [one.healthy for one in whole_checkpoints(run_dir)] == [False, True]


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path):
    config = RunConfig(checkpoint=CheckpointConfig(every_steps=100))
    check_room(config, tmp_path, 1_000)
    with pytest.raises(
        ValueError, match=r"GB free, and 6 more checkpoints of 12000000.0 GB are to be written there; make"
    ):
        check_room(config, tmp_path, 10**15)
