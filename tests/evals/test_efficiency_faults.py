"""What lost processes cost, counted in the runs' own records: no seconds are asserted of a real run."""

import json
from collections import Counter

import pytest

from evals.command_line import EvaluationError
from evals.efficiency.faults import BY_HAND, RESTARTED, WHOLE, FaultSettings, Kill, account, measure
from pretrain.report.records import read_records, resolve, written_records
from tests.launch.conftest import shards, tiny_toml

__all__ = ["shards", "tiny_toml"]


def record(kind: str, attempt: int, step: int, time: float, **values: float) -> dict:
    return {"kind": kind, "attempt": attempt, "step": step, "time": time, **values}


def test_lost_steps_and_seconds_are_those_of_a_run_worked_out_by_hand():
    """Steps of 2 seconds, saved at 2; killed after 3 of 5, and the next time before any step; 4 was on its way."""
    written = [
        record("attempt", 1, 0, 10.0, resumed_step=0),
        *(record("step", 1, step, 10.0 + 2 * step, seconds=2.0) for step in (1, 2, 3)),
        record("attempt", 2, 2, 30.0, resumed_step=2),
        record("attempt", 3, 2, 50.0, resumed_step=2),
        *(record("step", 3, step, 46.0 + 2 * step, seconds=2.0) for step in (3, 4, 5)),
        record("heldout", 3, 5, 57.0, loss=1.5),
    ]
    kills = [Kill(17.0, 0, 1, 3), Kill(41.0, 1, 2, 2)]
    found = account(written, resolve(written), kills, 50.0)
    first, second = found.pop("kills")
    assert found == {
        "seconds": 50.0,
        "productive_seconds": 10.0,
        "productive_share": 0.2,
        "repeated_seconds": 2.0,
        "steps": 5,
        "attempts": 3,
        "heldout_loss": 1.5,
    }
    assert (first["lost_steps"], first["resume_seconds"], first["caught_up_seconds"]) == (1, None, None)
    assert (second["lost_steps"], second["resume_seconds"], second["caught_up_seconds"]) == (0, 11.0, 11.0)


@pytest.mark.slow
def test_killed_runs_do_every_step_once_lose_what_was_not_saved_and_end_with_the_loss_of_the_whole_one(
    tiny_toml, shards, tmp_path
):
    settings = FaultSettings(shards, tmp_path / "out", str(tiny_toml), 9, 4, 3, 2)
    text = measure(settings)
    rows = {row["run"]: row for row in json.loads((tmp_path / "out" / "faults.json").read_text())["rows"]}
    assert [line.split("  ")[0] for line in map(str.strip, text.splitlines()[1:])] == [WHOLE, RESTARTED, BY_HAND]
    for name, row in rows.items():
        folder = settings.folder(name)
        steps = Counter(one["step"] for one in written_records(folder) if one["kind"] == "step")
        assert sorted(steps) == list(range(1, 10))
        assert row["steps"] == 9
        assert [kill["rank"] for kill in row["kills"]] == ([] if name == WHOLE else [0, 1])
        assert row["attempts"] == 1 + len(row["kills"])
        assert sum(kill["lost_steps"] for kill in row["kills"]) == sum(steps.values()) - 9
        assert 0 < row["productive_share"] < 1
    losses = {name: [one["loss"] for one in read_records(settings.folder(name)) if "loss" in one] for name in rows}
    assert losses[RESTARTED] == losses[BY_HAND] == losses[WHOLE]
    assert (settings.folder(RESTARTED).parent / "max_restarts.log").read_text().count("restart ") == 2
    with pytest.raises(EvaluationError, match="never-killed is there already"):
        FaultSettings(shards, tmp_path / "out", str(tiny_toml))


def test_a_kill_that_never_comes_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="--kill-every is 30; give less than the 20 steps"):
        FaultSettings(tmp_path, tmp_path, steps=20)


def test_a_run_that_ends_of_itself_is_named_with_its_log(tmp_path):
    with pytest.raises(
        EvaluationError, match=r"never-killed ended with status 2; what it said is in .*never-killed.log"
    ):
        measure(FaultSettings(tmp_path / "nothing", tmp_path / "out"))
    assert str(tmp_path / "nothing") in (tmp_path / "out" / "never-killed.log").read_text()
