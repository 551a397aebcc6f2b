"""A run that was stopped, by whatever means, goes on as if it had not been; what cannot go on is refused."""

import dataclasses
import json
import os
import shutil
import signal
import time

import pytest

from pretrain.checkpoint.resume import find_resume_point
from pretrain.config.files import load_run_config
from pretrain.run import lock_run_folder
from tests.pretrain.jobs import read_metrics
from titans_mcore.weights import find_checkpoint, load_full, load_into
from tokenization.manifest import Manifest

# Batches of 2, 2, 2, 2, 4, 4 samples, rows of 16 tokens and from step 5 on of 32.
WARM_UPS = ["--train.micro-batch", "1", "--train.batch-warmup-from", "2", "--train.batch-warmup-tokens", "250"]
WARM_UPS += ["--train.sequence-warmup-from", "16", "--train.sequence-warmup-tokens", "250"]
# Segments of 16 tokens stay open between steps, so that a state's own keys and its recalled memory are in use, too.
CARRIED = ["--data.carry-state", "true", "--train.sequence-length", "12", "--train.micro-batch", "1"]
TIME = ("seconds", "tokens_per_second", "data_wait_seconds", "save_stall_seconds", "memory_bytes")


def numbers(run_dir):
    """What metrics.jsonl says of every step, without the times."""
    return [{name: value for name, value in record.items() if name not in TIME} for record in read_metrics(run_dir)]


def tensor_files(run_dir):
    """Checksums of the newest checkpoint's weights, optimizer and random states."""
    record = json.loads((find_checkpoint(run_dir) / "checkpoint.json").read_text())
    return {name: file["sha256"] for name, file in record["files"].items() if name.endswith(".safetensors")}


def wait_for_step(job, run_dir, step, *, saved=0, timeout_seconds=300):
    """Until a step is done, and the checkpoint behind the step `saved`, if any, is on the disk: that may come later."""
    checkpoint = run_dir / "checkpoints" / f"step-{saved:08d}"
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and job.process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(run_dir)) and (not saved or checkpoint.is_dir()):
            return
        time.sleep(0.01)
    job.kill()
    pytest.fail(f"step {step} was not reached: {job.process.communicate()}")


def test_a_run_killed_in_the_middle_ends_bitwise_like_an_uninterrupted_one(launch, finished_run, tmp_path):
    run_dir = tmp_path / "killed"
    job = launch(run_dir, "--parallel.tensor", "2")
    wait_for_step(job, run_dir, 12, saved=10)
    job.kill()
    job.wait()
    done = len(read_metrics(run_dir))
    assert 12 <= done < 20
    (run_dir / "metrics.jsonl").open("a").write('{"step": 13, "lo')  # what a kill while writing leaves

    status, out, err = launch(run_dir, "--parallel.tensor", "2").wait()
    assert status == 0, err
    assert "step-00000010, after step 10" in out
    assert [record["step"] for record in numbers(run_dir)] == list(range(1, 21))
    assert numbers(run_dir) == numbers(finished_run)
    assert tensor_files(run_dir) == tensor_files(finished_run)
    assert len(tensor_files(run_dir)) == 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["--parallel.zero-stage", "3"],
        ["--train.precision", "bf16"],
        WARM_UPS,
        CARRIED,
        ["--model.persistent-tokens", "0"],
        ["--model.persistent-tokens", "0", "--parallel.zero-stage", "3"],
    ],
    ids=[
        "zero 3",
        "bf16 with fp32 masters",
        "in the middle of both warm-ups",
        "with carried states",
        "without persistent tokens",
        "zero 3, without persistent tokens",
    ],
)
def test_sharded_low_precision_and_warming_runs_go_on_bitwise(launch, tmp_path, settings):
    arguments = ["--nproc", "2", "--train.steps", "6", "--checkpoint.every-steps", "3", *settings]
    run_dir = tmp_path / "straight"
    status, _, err = launch(run_dir, *arguments).wait()
    assert (status, err) == (0, "")
    again = shutil.copytree(run_dir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    status, out, err = launch(again, *arguments).wait()
    assert (status, err) == (0, "")
    assert "step-00000003, after step 3" in out
    assert numbers(again) == numbers(run_dir)
    assert tensor_files(again) == tensor_files(run_dir)


def test_a_signal_finishes_the_step_saves_and_ends_with_0(launch, finished_run, tmp_path):
    run_dir = tmp_path / "stopped"
    job = launch(run_dir, "--parallel.tensor", "2", "--checkpoint.every-steps", "0")
    wait_for_step(job, run_dir, 3)
    job.process.send_signal(signal.SIGTERM)
    status, out, err = job.wait()
    assert status == 0, err
    steps = len(read_metrics(run_dir))
    assert 3 <= steps < 20
    assert f"stopped by SIGTERM after step {steps}, which is saved" in out
    assert find_checkpoint(run_dir).name == f"step-{steps:08d}"
    assert numbers(run_dir) == numbers(finished_run)[:steps]
    asked = json.loads((run_dir / "requeue.json").read_text())
    assert asked == {
        "reason": "SIGTERM",
        "step": steps,
        "steps": 20,
        "finished": False,
        "checkpoint": f"checkpoints/step-{steps:08d}",
        "attempt": 1,
    }


SMALL = ["--variant", "transformer", "--checkpoint.every-steps", "2", "--checkpoint.keep", "2"]
SMALL += ["--evaluate.heldout-sequences", "0", "--logging.every-steps", "100"]


@pytest.fixture(scope="module")
def limited(train, tmp_path_factory):
    """The folder of a run that a time limit ended and the next attempt finished; what both say, and what was asked."""
    run_dir = tmp_path_factory.mktemp("limited") / "run"
    status, first, err = train(run_dir, *SMALL, "--train.steps", "400", "--train.stop-after-minutes", "0.001").wait()
    assert status == 0, err
    asked = json.loads((run_dir / "requeue.json").read_text())
    status, second, err = train(run_dir, *SMALL, "--train.steps", "6").wait()
    assert status == 0, err
    return run_dir, first, second, asked


def test_a_time_limit_ends_the_run_like_a_signal_and_the_next_attempt_finishes_it(limited):
    run_dir, first, second, asked = limited
    assert "stopped by stop_after after step 1, which is saved" in first
    assert asked["reason"] == "stop_after"
    assert not (run_dir / "requeue.json").exists()
    assert "settings: train.steps 400 -> 6; train.stop_after_minutes 0.001 -> 0.0" in second


def test_weights_trained_at_tensor_parallel_2_are_the_same_model_in_one_process(finished_run, one_process):
    from pretrain.data.folders import open_data, open_samples
    from pretrain.evaluate.losses import heldout_losses
    from titans_mcore.model import TitansModel
    from titans_mcore.parallel import transformer_config

    config = load_run_config(finished_run)
    saved, state = load_full(find_checkpoint(finished_run))
    assert saved == config.model
    model = TitansModel(config.model, transformer_config(config.model), one_process)
    load_into(model, state)
    _, heldout = open_samples(config, open_data(config), finished_run)
    (reported,) = read_metrics(finished_run, "heldout")
    assert heldout_losses(model, heldout, config).mean == pytest.approx(reported["loss"], rel=1e-6)


@pytest.fixture
def resumable(finished_run, one_process, tmp_path):
    """A copy of the run, and a question: where would this configuration go on?"""
    run_dir = shutil.copytree(finished_run, tmp_path / "copy")
    config = load_run_config(run_dir)

    def ask(fingerprint=None, **sections):
        changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
        wanted = dataclasses.replace(config, **changed)
        return find_resume_point(wanted, fingerprint or Manifest.load(config.data.path).fingerprint, run_dir)

    return run_dir, ask


def test_the_newest_whole_checkpoint_is_taken(resumable, monkeypatch):
    run_dir, ask = resumable
    monkeypatch.setattr("titans_mcore.parallel.DeepSpeedGroups.get_data_parallel_world_size", lambda self: 1)
    point = ask()
    folder, progress = point.folder, point.progress
    assert folder == run_dir / "checkpoints" / "step-00000020"
    assert (progress.step, progress.samples, progress.tokens) == (20, 80, 80 * 32)


@pytest.mark.parametrize("file", ["weights/tp-01-of-02.safetensors", "optimizer/tp-00-data-000.safetensors"])
@pytest.mark.parametrize("harm", ["truncate", "flip a bit", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(resumable, capsys, file, harm):
    run_dir, ask = resumable
    path = run_dir / "checkpoints" / "step-00000020" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(content if harm == "flip a bit" else content[:-100])
    point = ask()
    assert (point.folder.name, point.progress.step) == ("step-00000010", 10)
    assert f"step-00000020 is damaged: {file}" in capsys.readouterr().err


def test_a_checkpoint_that_was_not_finished_is_not_taken(resumable):
    run_dir, ask = resumable
    newest = run_dir / "checkpoints" / "step-00000020"
    newest.rename(newest.with_name(".step-00000020.partial"))
    assert ask().folder.name == "step-00000010"
    (run_dir / "checkpoints" / "step-00000010" / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        ask()


def test_a_folder_without_checkpoints_starts_anew(resumable):
    run_dir, ask = resumable
    shutil.rmtree(run_dir / "checkpoints")
    assert ask() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"variant": "mag"}}, "another model: variant is 'mac' there and 'mag' here"),
        ({"model": {"num_layers": 3}}, "another model: num_layers is 1 there and 3 here"),
        ({"train": {"precision": "bf16"}}, "precision was float32 and is bfloat16"),
        ({"train": {"global_batch": 8}}, "global_batch was 4 and is 8"),
        ({"train": {"sequence_length": 16}}, "sequence_length was 32 and is 16"),
        ({"train": {"batch_warmup_from": 2, "batch_warmup_tokens": 9}}, "batch_warmup_tokens was 0 and is 9"),
        ({"train": {"sequence_warmup_from": 8, "sequence_warmup_tokens": 9}}, "sequence_warmup_from was 0 and is 8"),
        ({"train": {"seed": 1}}, "seed was 1234 and is 1"),
        ({"fingerprint": "other"}, "data_fingerprint was .* and is other"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_another_model_precision_or_order_of_samples_is_refused(resumable, change, message):
    _, ask = resumable
    with pytest.raises(ValueError, match=message):
        ask(**change)


def test_a_longer_run_and_other_speed_settings_may_go_on(resumable):
    _, ask = resumable
    assert ask(train={"steps": 30}, optimizer={"lr": 1e-4}, model={"memory_backend": "oracle"}).progress.step == 20


def files_of(run_dir):
    return {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}


def test_a_finished_run_keeps_its_newest_checkpoints_and_changes_nothing_when_started_again(train, limited):
    run_dir, *_ = limited
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert not read_metrics(run_dir, "heldout")

    before = files_of(run_dir)
    status, out, err = train(run_dir, *SMALL, "--train.steps", "6").wait()
    assert status == 0, err
    assert "is finished: step 6 of 6" in out
    assert files_of(run_dir) == before


def test_a_resumed_run_says_what_it_found_and_can_verify_a_loss(train, finished_run, tmp_path):
    run_dir = shutil.copytree(finished_run, tmp_path / "copy")
    arguments = ["--train.steps", "21", "--verify-resume"]
    marker = run_dir / "checkpoints" / "step-00000020" / "checkpoint.json"
    record = json.loads(marker.read_text())
    marker.write_text(json.dumps({**record, "check_loss": record["check_loss"] * 1.001}))
    status, _, err = train(run_dir, *arguments).wait()
    assert status == 2
    assert "does not give the loss it was saved with: the first sample of step 20 had" in err

    marker.write_text(json.dumps(record))
    status, out, err = train(run_dir, *arguments).wait()
    assert status == 0, err
    assert "settings: train.steps 20 -> 21; parallel.tensor 2 -> 1" in out
    assert f"data: fingerprint {record['data_fingerprint'][:16]}, the same; the next sample is number 80" in out
    assert "layout: tensor 2 -> 1" in out
    assert "random states: begun anew from the seed" in out
    assert "verified: the first sample of step 20 has the loss" in out

    status, _, err = train(tmp_path / "new", *arguments).wait()
    assert status == 2
    assert "--verify-resume has nothing to verify" in err


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(tmp_path):
    descriptor = lock_run_folder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"another process is training in .*run; wait for it"):
        lock_run_folder(tmp_path / "run")
    os.close(descriptor)
    os.close(lock_run_folder(tmp_path / "run"))


def test_workers_save_and_end_when_their_launcher_is_killed(launch, tmp_path):
    run_dir = tmp_path / "orphaned"
    job = launch(run_dir, "--parallel.tensor", "2", "--checkpoint.every-steps", "0", "--train.steps", "1000")
    wait_for_step(job, run_dir, 2)
    job.process.kill()
    _, out, _ = job.wait()  # until the workers have closed their ends of the pipes, too
    steps = len(read_metrics(run_dir))
    assert f"stopped by SIGTERM after step {steps}, which is saved" in out
    assert find_checkpoint(run_dir).name == f"step-{steps:08d}"
