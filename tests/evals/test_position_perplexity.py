"""Loss by position: equal to one pass over each row, and to what the definition says."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evals.command_line import EvaluationError
from evals.models import EvalModel, load_model
from evals.position_loss import heldout_rows, loss_by_position, summarise
from evals.position_perplexity import PositionPerplexitySettings, evaluate

from .conftest import MakeRun, write_heldout


@pytest.fixture(scope="module")
def model(mac_run: Path) -> EvalModel:
    return load_model(mac_run)


@pytest.mark.parametrize("variant", ["mac", "transformer"])
def test_streamed_loss_equals_one_pass(make_run: MakeRun, shards: Path, variant: str) -> None:
    model = load_model(make_run(variant))
    rows = heldout_rows(shards, model, 5, 333)
    tokens = torch.from_numpy(np.array(rows, np.int64))
    with torch.no_grad():
        direct = model.network.forward(tokens[:, :-1], tokens[:, 1:])  # type: ignore[attr-defined]
    for batch, piece in ((2, 50), (8, 1000)):
        streamed = loss_by_position(model, rows, batch, piece)
        np.testing.assert_allclose(streamed, direct.sum(0).numpy(), rtol=2e-5)


def test_every_heldout_token_but_the_first_is_predicted_once(shards: Path, model: EvalModel) -> None:
    rows = heldout_rows(shards, model, 100, 333)
    expected = np.random.default_rng(0).integers(3, 360, 2_000)
    assert rows.shape == (6, 334)
    assert (rows[:, 1:].ravel() == expected[1 : 6 * 333 + 1]).all()
    assert (rows[:, :-1].ravel() == expected[: 6 * 333]).all()


def test_report_has_a_bucket_for_each_power_of_two(
    tmp_path: Path, mac_run: Path, shards: Path, model: EvalModel
) -> None:
    settings = PositionPerplexitySettings(mac_run, shards, tmp_path, tokens=600, length=300, piece=64)
    evaluate(model, settings)
    report = json.loads((tmp_path / "position_perplexity.json").read_text())
    losses = loss_by_position(model, heldout_rows(shards, model, 2, 300), 2, 300) / 2
    spans = [(bucket["first"], bucket["last"]) for bucket in report["buckets"]]
    assert spans == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 300)]
    for bucket in report["buckets"]:
        mean = losses[bucket["first"] - 1 : bucket["last"]].mean()
        assert bucket["loss"] == pytest.approx(mean, rel=1e-5)
        assert bucket["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert bucket["tokens"] == 2 * (bucket["last"] - bucket["first"] + 1)
    assert report["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert report["tokens"] == 600
    assert report["trained_length"] == 128
    assert report["within_trained_length"]["loss"] == pytest.approx(losses[:128].mean(), rel=1e-5)
    assert report["beyond_trained_length"]["loss"] == pytest.approx(losses[128:].mean(), rel=1e-5)
    assert (tmp_path / "position_perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_buckets_cover_every_position_of_any_length() -> None:
    for length in (1, 2, 3, 4, 5, 8, 9, 1000):
        buckets = summarise(np.ones(length), 1, None)["buckets"]
        covered = [position for b in buckets for position in range(b["first"], b["last"] + 1)]
        assert covered == list(range(1, length + 1))


def test_shards_that_do_not_fit_are_named(shards: Path, tmp_path: Path, model: EvalModel) -> None:
    with pytest.raises(EvaluationError, match=r"heldout.bin is missing"):
        heldout_rows(tmp_path, model, 1, 10)
    with pytest.raises(EvaluationError, match=r"2,000 held-out tokens, but a row of --length 2000 needs 2,001"):
        heldout_rows(shards, model, 1, 2_000)
    write_heldout(tmp_path, np.array([1, 5, 360, 2]), [4])
    with pytest.raises(EvaluationError, match=r"holds token 360, but the model knows 360"):
        heldout_rows(tmp_path, model, 1, 2)
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": "f" * 64}}))
    with pytest.raises(EvaluationError, match="made with another tokenizer"):
        heldout_rows(tmp_path, model, 1, 2)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "heldout.bin").write_bytes(b"1234567")
    with pytest.raises(EvaluationError, match=r"heldout.bin has 7 bytes instead of 8"):
        heldout_rows(tmp_path, model, 1, 2)
    for damaged in (b"no index", (tmp_path / "heldout.idx").read_bytes()[:20]):
        (tmp_path / "heldout.idx").write_bytes(damaged)
        with pytest.raises(EvaluationError, match=r"cannot read heldout.idx"):
            heldout_rows(tmp_path, model, 1, 2)
