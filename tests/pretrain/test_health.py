"""Which steps are bad, what follows from them, and which checkpoints prove healthy: all of it without a run."""

import json
import math

import pytest

from pretrain.config.settings import HealthConfig
from pretrain.recovery.health import Health
from pretrain.recovery.rewinds import Rewind, Rewinds


def well(steps, **settings):
    """A run of good steps, whose losses lie within 0.1 nats."""
    health = Health(HealthConfig(spike_window=20, **settings))
    for step in range(1, steps + 1):
        assert health.judge(step, 4.0 + 0.1 * (step % 2), 1.0, updated=True).action == "go on"
    return health


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (4.0, math.inf), (4.0, math.nan)])
@pytest.mark.parametrize("action", ["skip", "rewind", "stop"])
def test_a_number_that_is_not_finite_does_what_the_setting_says(loss, norm, action):
    health = well(3, nonfinite=action)
    assert health.judge(4, loss, norm, updated=False).action == action
    assert (health.updates, health.left_out, health.first_bad, health.last_bad) == (3, 1, 4, 4)


def test_only_so_many_steps_in_a_row_are_skipped():
    health = well(3, in_a_row=3)
    actions = [health.judge(step, math.nan, 1.0, updated=False).action for step in (4, 5, 6)]
    assert actions == ["skip", "skip", "stop"]
    health = well(3, in_a_row=3)
    for step in range(4, 12, 2):
        assert health.judge(step, math.nan, 1.0, updated=False).action == "skip"
        assert health.judge(step + 1, 4.0, 1.0, updated=True).action == "go on"


def test_nothing_is_a_spike_before_the_usual_losses_are_known():
    assert well(19).usual_limit() == math.inf
    assert well(20).usual_limit() < math.inf


def test_a_spike_is_nats_and_deviations_above_the_median():
    assert well(20, spike_nats=0.5, spike_deviations=0.0).usual_limit() == pytest.approx(4.05 + 0.5)
    # The deviations of 4.0 and 4.1 from 4.05 are all 0.05.
    assert well(20, spike_nats=0.0, spike_deviations=10.0).usual_limit() == pytest.approx(4.05 + 10 * 1.4826 * 0.05)


def test_what_is_only_noted_is_learned_from_and_becomes_usual():
    health = well(20, spike="note")
    assert health.update_limit() == math.inf
    for step in range(21, 33):
        last = health.judge(step, 9.0, 1.0, updated=True)
        assert last.action == ("note" if step <= 30 else "go on"), step
    assert health.left_out == 0


@pytest.mark.parametrize("action", ["skip", "rewind", "stop"])
def test_a_spike_that_is_acted_upon_has_its_update_left_out(action):
    health = well(20, spike=action)
    assert health.update_limit() == health.usual_limit() < 9.0
    assert health.judge(21, 9.0, 1.0, updated=False).action == action


def test_a_checkpoint_is_healthy_after_good_updates_and_never_after_a_bad_step_behind_it():
    health = well(30, healthy_after_steps=5)
    assert health.has_proven(25, updates=25)
    assert not health.has_proven(26, updates=26)
    health.judge(31, math.nan, 1.0, updated=False)
    assert not health.has_proven(20, updates=20)
    for step in range(32, 38):
        health.judge(step, 4.0, 1.0, updated=True)
    assert not health.has_proven(30, updates=30)
    assert health.has_proven(31, updates=30)
    assert not health.has_proven(33, updates=32)


def test_health_goes_through_a_checkpoint_exactly():
    health = well(25)
    health.judge(26, math.nan, 1.0, updated=False)
    again = Health(health.settings)
    again.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert again == health
    assert again.judge(27, 4.0, 1.0, updated=True) == health.judge(27, 4.0, 1.0, updated=True)
    assert again == health


def test_batches_are_passed_over_in_every_attempt(tmp_path):
    rewinds = Rewinds.read(tmp_path)
    assert rewinds.step_after(4) == 5
    rewinds = rewinds.with_another(Rewind(3, 5, 6, "spike")).with_another(Rewind(3, 7, 7, "spike"))
    rewinds.write(tmp_path)
    again = Rewinds.read(tmp_path)
    assert again.entries == rewinds.entries
    assert [again.step_after(step) for step in (3, 4, 5, 6, 7)] == [4, 8, 8, 8, 8]
    assert (again.to(3), again.to(4)) == (2, 0)
    (tmp_path / "rewinds.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"cannot read .*rewinds.jsonl"):
        Rewinds.read(tmp_path)
