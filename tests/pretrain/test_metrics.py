"""What a run reports, and what is read of it after it was killed, started again, or could not write."""

import shlex
import socket
import sys
from pathlib import Path

import pytest

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import LoggingConfig, TrainConfig
from pretrain.report.history import clock, seconds_left
from pretrain.report.metrics import Metrics
from pretrain.report.records import read_records
from pretrain.report.sinks import check_sinks
from tests.pretrain.jobs import read_metrics

from .jobs import ROOT, Job

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


def report(run_dir, steps, resumed_step=0, rank=0, loss=4.25, **logging):
    metrics = Metrics(config(**logging), run_dir, resumed_step=resumed_step, rank=rank)
    for step in steps:
        metrics.step(step, VALUES | {"loss": loss})
    metrics.close()


def steps_of(run_dir):
    return [record["step"] for record in read_metrics(run_dir)]


def test_a_resumed_run_has_each_step_once(tmp_path):
    report(tmp_path, range(1, 8))
    (tmp_path / "metrics.jsonl").open("a").write('{"kind": "step", "attempt": 1, "step": 8, "loss"')
    report(tmp_path, range(5, 9), resumed_step=4, loss=4.0)
    assert steps_of(tmp_path) == list(range(1, 9))
    assert [record["loss"] for record in read_metrics(tmp_path)] == [4.25] * 4 + [4.0] * 4


def test_nothing_that_was_written_is_ever_changed(tmp_path):
    file = tmp_path / "metrics.jsonl"
    report(tmp_path, range(1, 8))
    before = file.read_bytes() + b'{"kind": "st'
    file.write_bytes(before)
    report(tmp_path, range(3, 9), resumed_step=2)
    assert file.read_bytes().startswith(before + b"\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run_id"]


def test_a_run_that_starts_again_from_nothing_keeps_no_old_steps(tmp_path):
    report(tmp_path, range(1, 4))
    report(tmp_path, range(1, 3))
    assert steps_of(tmp_path) == [1, 2]


def test_records_are_keyed_by_run_attempt_and_step(tmp_path):
    report(tmp_path, [1, 2])
    report(tmp_path, [2, 3], resumed_step=1)
    attempts = [record for record in read_records(tmp_path) if record["kind"] == "attempt"]
    assert [(a["attempt"], a["resumed_step"]) for a in attempts] == [(1, 0), (2, 1)]
    assert {a["host"] for a in attempts} == {socket.gethostname()}
    steps = [record for record in read_records(tmp_path) if record["kind"] == "step"]
    assert [(s["attempt"], s["step"]) for s in steps] == [(1, 1), (2, 2), (2, 3)]
    assert {record["run"] for record in read_records(tmp_path)} == {(tmp_path / "run_id").read_text().strip()}


def test_what_an_attempt_says_that_was_thought_dead_does_not_count(tmp_path):
    old = Metrics(config(), tmp_path, resumed_step=0, rank=0)
    for step in (1, 2, 3):
        old.step(step, VALUES)
    new = Metrics(config(), tmp_path, resumed_step=2, rank=0)
    old.step(4, VALUES)
    new.step(3, VALUES)
    assert [(r["attempt"], r["step"]) for r in read_records(tmp_path) if r["kind"] == "step"] == [
        (1, 1),
        (1, 2),
        (2, 3),
    ]


def test_going_back_voids_later_records_but_not_what_happened(tmp_path):
    metrics = Metrics(config(), tmp_path, resumed_step=0, rank=0)
    for step in (1, 2, 3):
        metrics.step(step, VALUES | ({"heldout_loss": 4.0 + step} if step > 1 else {}))
    metrics.event(3, "spike", "the loss rose to 9 at step 3", loss=9.0)
    metrics.event(3, "rewind", "going back to step 1", resumed_step=1)
    metrics.step(2, VALUES)
    assert steps_of(tmp_path) == [1, 2]
    assert read_metrics(tmp_path, "heldout") == []
    assert [event["name"] for event in read_metrics(tmp_path, "event")] == ["spike", "rewind"]


def test_an_evaluation_is_a_record_of_its_own_and_the_end_of_the_line(tmp_path, capsys):
    metrics = Metrics(config(every_steps=5), tmp_path, resumed_step=0, rank=0)
    metrics.step(3, VALUES | {"heldout_loss": 3.5})
    assert capsys.readouterr().out.rstrip().endswith("| held-out loss 3.5000")
    assert read_metrics(tmp_path, "heldout") == [{"step": 3, "loss": 3.5}]
    assert "heldout_loss" not in read_metrics(tmp_path)[0]


def test_what_is_no_number_is_null_and_every_line_is_json(tmp_path):
    metrics = Metrics(config(), tmp_path, resumed_step=0, rank=0)
    metrics.step(1, VALUES | {"loss": float("nan"), "grad_norm": float("inf")})
    (step,) = read_metrics(tmp_path)
    assert (step["loss"], step["grad_norm"]) == (None, None)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(("kind", "values"), [("steps", {"loss": 1.0}), ("event", {"run": "mine"})])
def test_a_record_that_nobody_could_read_is_refused(tmp_path, kind, values):
    with pytest.raises(ValueError, match=kind):
        Metrics(config(), tmp_path, resumed_step=0, rank=0).record(kind, 1, values)


def test_nothing_is_no_record(tmp_path):
    metrics = Metrics(config(), tmp_path, resumed_step=0, rank=0)
    metrics.record("memory", 1, {})
    assert [record["kind"] for record in read_records(tmp_path)] == ["attempt"]


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    report(tmp_path, range(1, 4), rank=1)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_the_line_says_loss_speed_and_the_time_that_is_left(tmp_path, capsys):
    metrics = Metrics(config(), tmp_path, resumed_step=4, rank=0)
    metrics.step(5, VALUES | {"mfu": 0.4321, "memory_bytes": 12_340_000_000})
    assert capsys.readouterr().out.splitlines()[-1] == (
        "step  5/10 | loss 4.2500 | 1,234 tokens/s | lr 3.00e-04 | grad norm 1.500 | MFU 43.2% | memory 12.3 GB | "
        "data wait 5.0% | ETA 0:00:10"
    )


def test_what_was_not_measured_is_not_in_the_line(tmp_path, capsys):
    report(tmp_path, [1])
    line = capsys.readouterr().out
    assert "MFU" not in line
    assert "memory" not in line


def test_lines_can_be_rarer_than_steps(tmp_path, capsys):
    report(tmp_path, range(1, 11), every_steps=4)
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines()] == ["step  4", "step  8", "step 10"]
    assert len(read_metrics(tmp_path)) == 10


def test_steps_that_will_grow_take_longer_in_the_time_that_is_left():
    train = TrainConfig(
        steps=4, sequence_length=8, global_batch=4, micro_batch=1, batch_warmup_from=1, batch_warmup_tokens=8
    )
    # A step of one sample and three of four: twelve times the tokens of the first are left.
    assert seconds_left(1, 1.0, train) == pytest.approx(12)
    assert seconds_left(4, 1.0, train) == 0.0


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00:00"), (59.2, "0:01:00"), (3725, "1:02:05"), (9e5, "250:00:00")]
)
def test_durations_read_as_a_clock(seconds, shown):
    assert clock(seconds) == shown


def in_a_process(script: str, run_dir: Path, **environment: str) -> str:
    """What a script prints; wandb starts processes and threads that should not be this one's."""
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-c", script]
    status, out, err = Job([*command, str(run_dir)], ROOT).wait(120)
    assert status == 0, out + err
    return out + err


REPORTS = (
    "import sys; from pathlib import Path; from tests.pretrain.test_metrics import report\nrun = Path(sys.argv[1])\n"
)
KEY = "0123456789abcdef0123456789abcdef01234567"


def test_wandb_goes_on_under_one_id_without_a_network_and_without_the_key(tmp_path):
    script = f"{REPORTS}report(run, range(1, 4), wandb='offline')\nreport(run, range(3, 6), 2, wandb='offline')"
    printed = in_a_process(script, tmp_path, WANDB_API_KEY=KEY, WANDB_MODE="offline")
    run = (tmp_path / "run_id").read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run}.wandb"] * 2
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert KEY not in printed
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_wandb_without_a_key_asks_for_none_at_a_terminal_and_the_run_goes_on(tmp_path):
    script = f"{REPORTS}report(run, range(1, 4), wandb='online')"
    command = f"{sys.executable} -c {shlex.quote(script)} {tmp_path / 'run'}"
    (tmp_path / "run").mkdir()
    environment = ["-u", "WANDB_MODE", "-u", "WANDB_API_KEY", "-u", "NETRC", f"HOME={tmp_path}"]
    job = Job(["env", *environment, "script", "-qec", command, "/dev/null"], ROOT)
    status, out, err = job.wait(120)
    assert status == 0, out + err
    assert "left out: UsageError: No API key configured" in out
    assert steps_of(tmp_path / "run") == [1, 2, 3]


def test_a_sink_that_fails_is_named_once_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", KEY)

    class Broken:
        name, address = "a sink", ""

        def write(self, record):
            raise ConnectionError(f"https://user:password@host answered\nnothing to {KEY}")

        def close(self):
            raise ConnectionError

    metrics = Metrics(config(), tmp_path, resumed_step=0, rank=0)
    metrics._sinks.insert(0, Broken())
    for step in (1, 2, 3):
        metrics.step(step, VALUES)
    metrics.close()
    out = capsys.readouterr().out
    assert out.count("note: a sink does not take reports") == 1
    assert "ConnectionError: https://***@host answered nothing to ***\n" in out
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_sink_that_cannot_open_is_left_out_with_a_note(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no service")

    monkeypatch.setattr("pretrain.report.sinks.Wandb", refuse)
    report(tmp_path, [1], wandb="online")
    assert "left out: RuntimeError: no service" in capsys.readouterr().out
    assert steps_of(tmp_path) == [1]


def test_a_full_disk_is_said_once_and_lines_come_again_when_there_is_room(tmp_path):
    """A file that may not grow further is what a full disk is to a writer."""
    script = f"""{REPORTS}
import resource, signal
from tests.pretrain.test_metrics import VALUES, config
from pretrain.report.metrics import Metrics
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
metrics = Metrics(config(), run, resumed_step=0, rank=0)
metrics.step(1, VALUES)
size = (run / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
metrics.step(2, VALUES)
metrics.step(3, VALUES)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
metrics.step(4, VALUES)
metrics.close()
"""
    assert in_a_process(script, tmp_path).count("metrics.jsonl does not take reports") == 1
    assert steps_of(tmp_path) == [1, 4]


def test_tensorboard_has_each_number_and_replaces_steps_that_are_done_again(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, range(1, 8), tensorboard=True)
    report(tmp_path, range(5, 9), resumed_step=4, loss=4.0, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert [event.value for event in events.Scalars("loss")] == [4.25] * 4 + [4.0] * 4


def test_tensorboard_that_is_not_installed_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"tensorboard is not installed; run pip install 'titans-mcore\[tensorboard\]'"
    ):
        check_sinks(LoggingConfig(tensorboard=True))
    check_sinks(LoggingConfig())


def test_lists_become_numbers_with_names_of_their_own():
    from pretrain.report.sinks import _numbers

    memory = {"kind": "memory", "step": 3, "surprise": [1.0, None]}
    assert dict(_numbers(memory)) == {"memory/surprise/layer_00": 1.0}
    probe = {
        "kind": "probe",
        "step": 3,
        "name": "s_niah",
        "lengths": [4096, 8192],
        "accuracy": [1.0, 0.5],
        "samples": 8,
    }
    assert dict(_numbers(probe)) == {
        "probe/s_niah/accuracy/4096": 1.0,
        "probe/s_niah/accuracy/8192": 0.5,
        "probe/s_niah/samples": 8,
    }
    position = {"kind": "position_loss", "step": 3, "tokens": [512, 1024], "loss": [4.0, 3.0]}
    assert dict(_numbers(position)) == {"position_loss/loss/512": 4.0, "position_loss/loss/1024": 3.0}


def test_the_id_of_a_run_is_kept_and_what_is_none_is_refused(tmp_path):
    from pretrain.report.metrics import run_id

    assert run_id(tmp_path) == run_id(tmp_path)
    (tmp_path / "run_id").write_text("../elsewhere\n")
    with pytest.raises(ValueError, match="which is no id of a run; remove it"):
        run_id(tmp_path)
