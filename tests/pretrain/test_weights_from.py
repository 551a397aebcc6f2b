"""A run that begins with the weights of another."""

import pytest
import torch

from pretrain.report.records import read_records
from titans_mcore.weights import find_checkpoint, load_full


@pytest.mark.slow
def test_a_run_begins_with_the_weights_it_is_given_at_another_layout(train, launch, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    status, _, err = train(first, "--train.steps", "2").wait()
    assert status == 0, err
    begin = ["--train.weights-from", str(first), "--train.seed", "77", "--train.steps", "1", "--optimizer.lr", "0"]
    status, out, err = launch(second, *begin, "--parallel.tensor", "2").wait()
    assert status == 0, err
    assert f"beginning with the weights of {find_checkpoint(first)}" in out
    (_, given), (_, kept) = (load_full(find_checkpoint(run)) for run in (first, second))
    assert given.keys() == kept.keys()
    assert all(torch.equal(given[name], kept[name]) for name in given)

    status, out, err = train(tmp_path / "wide", "--train.weights-from", str(first), "--model.ffn-dim", "32").wait()
    assert status == 2
    assert "ffn_dim is" in err
    assert len(err.splitlines()) == 1


def steps_of(run_dir, name):
    return {record["step"]: record[name] for record in read_records(run_dir) if record["kind"] == "step"}


@pytest.mark.slow
def test_a_decay_begins_at_a_healthy_checkpoint_of_a_stable_run(train, tmp_path):
    stable, again, decayed = (tmp_path / name for name in ("stable", "again", "decayed"))
    wsd = [
        "--schedule.shape",
        "wsd",
        "--schedule.warmup-steps",
        "2",
        "--checkpoint.every-steps",
        "2",
        "--checkpoint.keep",
        "9",
    ]
    wsd += ["--health.healthy-after-steps", "2", "--evaluate.heldout-sequences", "0"]
    status, _, err = train(stable, *wsd, "--train.steps", "6").wait()
    assert status == 0, err
    at_4 = stable / "checkpoints" / "step-00000004"
    status, out, err = train(again, *wsd, "--train.continue-from", str(at_4), "--train.steps", "6").wait()
    assert status == 0, err
    assert f"going on from {at_4}, after step 4" in out
    uninterrupted = steps_of(stable, "loss")
    assert steps_of(again, "loss") == {step: uninterrupted[step] for step in (5, 6)}  # bit for bit

    decay = ["--train.continue-from", str(stable), "--train.steps", "8", "--schedule.decay-steps", "4"]
    status, out, err = train(decayed, *wsd, *decay).wait()
    assert status == 0, err
    assert f"going on from {at_4}, after step 4" in out  # step 6 has not proven healthy
    peak = 3e-3
    expected = {step: peak * (0.1 + 0.9 * (8 - step) / 4) for step in range(5, 9)}
    assert steps_of(decayed, "lr") == pytest.approx(expected)
    assert not list(at_4.parent.glob("step-00000008"))

    for asked, message in (
        (["--train.continue-from", str(at_4), "--train.steps", "4"], "raise it"),
        (["--train.continue-from", str(at_4), "--train.seed", "7"], "seed was 1234 and is 7"),
        (["--train.continue-from", str(tmp_path)], "has no whole checkpoint that has proven healthy"),
    ):
        status, _, err = train(tmp_path / "refused", *wsd, *asked).wait()
        assert status == 2
        assert message in err
        assert len(err.splitlines()) == 1


def test_weights_that_are_not_there_are_one_sentence(train, tmp_path):
    status, _, err = train(tmp_path / "run", "--train.weights-from", str(tmp_path / "nothing")).wait()
    assert status == 2
    assert err.startswith("error: ")
    assert "there is no such folder" in err
    assert len(err.splitlines()) == 1
