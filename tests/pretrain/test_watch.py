"""`python -m pretrain.watch`: what it shows of runs that go on, are finished, were killed or were never started."""

import json
import time

import pytest

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import LoggingConfig, TrainConfig
from pretrain.report.history import Curve, History, thinned
from pretrain.report.metrics import Metrics
from pretrain.report.records import Follower, read_records
from pretrain.watch import lines_of, main, memory_warnings
from tests.pretrain.jobs import read_metrics
from titans_mcore.command_line import CommandError

from .test_metrics import VALUES

STEPS = 20


def begin(run_dir, resumed_step=0) -> Metrics:
    run_dir.mkdir(exist_ok=True)
    config = RunConfig(train=TrainConfig(steps=STEPS), logging=LoggingConfig(every_steps=1000))
    return Metrics(config, run_dir, resumed_step=resumed_step, rank=0, layout="tensor 1 x data 2")


def write(metrics, steps, telemetry=True):
    for step in steps:
        heldout = {"heldout_loss": 5.0 - step / 10} if step % 10 == 0 else {}
        metrics.step(step, VALUES | {"loss": 6.0 - step / 10, "memory_bytes": 2_000_000_000} | heldout)
        if telemetry and step % 5 == 0:
            metrics.record("memory", step, {"surprise": [1.0, 2.0], "alpha": [0.1, None]})
        if telemetry and step % 10 == 0:
            metrics.record("position_loss", step, {"name": "heldout", "tokens": [512, 1024], "loss": [5.0, 4.0]})
            probe = {"lengths": [4096, 8192], "accuracy": [1.0, 0.25], "samples": 4}
            metrics.record("probe", step, {"name": "niah_single_1", **probe})


def shown(run_dir, now=None) -> str:
    return "\n".join(lines_of(History(read_records(run_dir)), now))


@pytest.mark.parametrize(
    ("held", "early_late", "words"),
    [
        ([0.1, 0.2], [0.5, 0.5], None),
        ([0.1, 0.6], [0.5, 0.9], "block 1 (60%), all along a chunk alike"),
        (
            [0.3, 0.6],
            [0.9, 0.5],
            "block 0 (30%), 1 (60%); a chunk's last quarter writes little beside its first in block 1",
        ),
    ],
)
def test_blocks_whose_steps_are_often_held_are_named_and_whether_it_is_for_a_chunks_last_tokens(
    held, early_late, words
):
    found = memory_warnings({"held": [*held, None], "early_late": [*early_late, None]})
    assert len(found) == (words is not None)
    assert all(words in sentence for sentence in found)


def test_a_run_in_progress_is_told(tmp_path, capsys):
    write(begin(tmp_path / "run"), range(1, 12))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "lo\n')  # as a full disk leaves it
    capsys.readouterr()
    main([str(tmp_path / "run")])
    out, err = capsys.readouterr()
    assert err == ""
    for words in (
        "running, attempt 1, mac",
        "step 11/20 | loss 4.9000",
        "held-out loss 4.0000 at step 10",
        "niah_single_1 accuracy by lengths at step 10   4,096: 100%  8,192: 25%",
    ):
        assert words in out
    assert f"note: 1 lines of {tmp_path / 'run' / 'metrics.jsonl'} were cut off and are left out" in out


def test_records_are_printed_as_lines_of_json_every_step_once(tmp_path, capsys):
    write(begin(tmp_path / "run"), range(1, 7))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "lo\n')
    write(begin(tmp_path / "run", resumed_step=4), range(5, 9))
    capsys.readouterr()
    main([str(tmp_path / "run"), "--json"])
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert records == read_records(tmp_path / "run")
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 9))
    assert err.startswith("note: 1 lines of ")


def test_a_run_that_was_never_started_is_a_sentence(tmp_path):
    with pytest.raises(CommandError, match=r"metrics\.jsonl is not there; name the folder of a run that was started"):
        main([str(tmp_path)])


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_just_begun_is_shown(tmp_path, steps):
    write(begin(tmp_path / "run"), range(1, steps + 1))
    assert "running" in shown(tmp_path / "run")


def test_a_finished_run_a_silent_one_and_what_happened_are_told(tmp_path):
    metrics = begin(tmp_path)
    write(metrics, range(1, 11))
    metrics.event(10, "spike", "the loss rose to 9 at step 10")
    metrics.record("event", 10, {"name": "saved", "folder": "step-00000010"})
    now = time.time()
    assert "saved" not in shown(tmp_path)
    assert "running" in shown(tmp_path, now)
    assert "no record for 0:16:4" in shown(tmp_path, now + 1000)
    assert "the loss rose to 9 at step 10" in shown(tmp_path)
    assert "ETA" in shown(tmp_path)
    write(metrics, range(11, STEPS + 1))
    assert "finished" in shown(tmp_path, now + 1000)


def test_what_a_restart_does_again_is_shown_once(tmp_path):
    write(begin(tmp_path), range(1, 12))
    write(begin(tmp_path, resumed_step=7), range(8, 10))
    history = History(read_records(tmp_path))
    assert history.series("loss").steps == list(range(1, 10))
    assert history.series("loss", "heldout").steps == []
    assert "attempt 2" in shown(tmp_path)
    assert "step  9/20" in shown(tmp_path)


def test_following_reads_each_line_once_and_waits_for_one_that_is_half_written(tmp_path):
    metrics = begin(tmp_path)
    write(metrics, range(1, 4), telemetry=False)
    follower, file = Follower(tmp_path), tmp_path / "metrics.jsonl"
    assert len(follower.read()) == 4
    size = file.stat().st_size
    write(metrics, [4], telemetry=False)
    whole = file.read_bytes()
    file.write_bytes(whole[: size + 10])
    assert len(follower.read()) == 4
    file.write_bytes(whole)
    assert [record["step"] for record in follower.read()] == [0, 1, 2, 3, 4]
    assert follower.read() == read_records(tmp_path)


def test_a_loss_that_is_no_number_leaves_a_gap(tmp_path):
    metrics = begin(tmp_path)
    for step, loss in enumerate((3.0, float("nan"), 2.0), 1):
        metrics.step(step, VALUES | {"loss": loss})
    assert History(read_records(tmp_path)).series("loss") == Curve([1, 3], [3.0, 2.0])
    assert "2.0000" in shown(tmp_path)


def test_curves_of_a_month_become_means_of_neighbours():
    long = Curve(list(range(1, 10_001)), [float(step % 10) for step in range(10_000)])
    short = thinned(long, 1000)
    assert len(short.steps) == 1000
    assert short.steps[-1] == 10_000
    assert set(short.values) == {4.5}
    assert thinned(short, 1000) == short


def test_a_real_run_shows_its_memories_and_trains_bitwise_as_without(train, tmp_path):
    arguments = ["--train.steps", "4", "--evaluate.heldout-sequences", "2", "--logging.every-steps", "2"]
    for name, every in (("with", "2"), ("without", "0")):
        status, out, err = train(tmp_path / name, *arguments, "--logging.memory-every-steps", every).wait()
        assert status == 0, out + err
    found, plain = (read_metrics(tmp_path / name) for name in ("with", "without"))
    assert [(step["loss"], step["grad_norm"]) for step in found] == [(s["loss"], s["grad_norm"]) for s in plain]
    assert [record["step"] for record in read_metrics(tmp_path / "with", "memory")] == [2, 4]
    assert not read_metrics(tmp_path / "without", "memory")
    assert {"surprise", "drift", "held"} < set(read_metrics(tmp_path / "with", "memory")[0])
    assert "finished, attempt 1, mac, tensor 1 x data 1" in shown(tmp_path / "with")
