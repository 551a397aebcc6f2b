"""A run that begins with the weights of another."""

import torch

from titans_mcore.weights import find_checkpoint, load_full


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


def test_weights_that_are_not_there_are_one_sentence(train, tmp_path):
    status, _, err = train(tmp_path / "run", "--train.weights-from", str(tmp_path / "nothing")).wait()
    assert status == 2
    assert err.startswith("error: ")
    assert "there is no such folder" in err
    assert len(err.splitlines()) == 1
