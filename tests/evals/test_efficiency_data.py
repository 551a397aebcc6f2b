"""`python -m evals.efficiency data` on few tokens. No times are asserted."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from evals.command_line import EvaluationError
from evals.efficiency import data
from evals.efficiency.settings import DataSettings
from evals.efficiency.synthetic_shards import MEAN_TOKENS, VOCABULARY, write_synthetic_shards
from tokenization.manifest import Manifest, ManifestError
from tokenization.verify import verify

SMALL = ("--tokens", "3e5", "--shard-tokens", "1e5", "--sequence-length", "128", "--global-batch", "8", "--steps", "4")


@pytest.mark.slow
def test_a_start_with_and_without_an_index_and_a_resume_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evals.efficiency", "data", "--output", str(tmp_path), *SMALL]
    done = subprocess.run(
        [*command, "--extrapolate", "1e7", "--builds", "1"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "data.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    assert report["set"]["shards"] == 3
    assert abs(report["set"]["tokens"] - 3e5) < 0.1 * 3e5
    half, *whole = report["starts"].values()
    assert len(whole) == 3
    assert {one["samples"] for one in whole} == {whole[0]["samples"]}
    assert half["samples"] < whole[0]["samples"] == pytest.approx(report["set"]["tokens"] / 128, abs=4)
    assert all(one["tokens_per_second"] > 0 and 0 <= one["wait_share"] <= 1 for one in report["starts"].values())
    (larger,) = report["extrapolated"]
    assert larger["index_bytes"] == pytest.approx(report["set"]["index_bytes"] / report["set"]["tokens"] * 1e7)
    for name in (*report["starts"], "extrapolated", f"{report['set']['tokens']:,} tokens"):
        assert name in done.stdout


def test_synthetic_shards_are_whole_but_for_the_tokenizer(tmp_path: Path) -> None:
    manifest = write_synthetic_shards(tmp_path, 300_000, 100_000, 1)
    assert Manifest.load(tmp_path) == manifest
    manifest.check_quick(tmp_path)
    with pytest.raises(ManifestError) as fault:
        verify(tmp_path)
    assert str(fault.value).count("\n") == 0
    assert "tokenizer.model" in str(fault.value)
    datasets = [IndexedDataset(prefix) for prefix in manifest.train_prefixes(tmp_path)]  # kept: they unmap at their end
    assert np.mean([length for one in datasets for length in one.sequence_lengths]) == pytest.approx(
        MEAN_TOKENS, rel=0.3
    )
    assert datasets[0][0].dtype == np.uint16
    assert datasets[0][0].max() < VOCABULARY


def test_larger_sets_lie_on_the_line_through_half_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "_run", lambda request: {"cpu_seconds": request["join"]["shards"], "bytes": 7})
    starts = {
        "half, index built": {"open_cpu_seconds": 2.0, "peak_bytes": 50},
        "whole, index built": {"open_cpu_seconds": 3.0, "peak_bytes": 80},
    }
    sizes = {"tokens": 2e9, "tokens_of_half": 1e9, "index_bytes": 10}
    settings = DataSettings(output=tmp_path, sequence_length=1_000)
    found = data._extrapolate({"set": sizes, "starts": starts}, 1e10, settings)
    assert (found["samples"], found["shards"]) == (10_000_000, 10)
    assert found["build_cpu_seconds"] == 3.0 + 8 * 1.0 + 10
    assert found["build_peak_bytes"] == 80 + 8 * 30
    assert found["index_bytes"] == 50


@pytest.mark.parametrize(
    "name", ["tokens", "shard_tokens", "sequence_length", "global_batch", "steps", "builds", "threads"]
)
def test_less_than_one_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(EvaluationError, match=rf"--{name.replace('_', '-')} is 0; give at least 1"):
        DataSettings(output=tmp_path, **{name: 0})


def test_a_single_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"tokens are one shard; give --shard-tokens of half of --tokens"):
        data.measure(DataSettings(output=tmp_path, tokens=1e5, shard_tokens=1e6, threads=1))
    assert not list(tmp_path.iterdir())


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"--shards: .*nowhere/manifest\.json: missing"):
        data.measure(DataSettings(output=tmp_path, shards=tmp_path / "nowhere"))


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    with pytest.raises(EvaluationError, match=r"has 1\.0 GB free and 1,000,000,000 tokens need 5\.0 GB"):
        data.measure(DataSettings(output=tmp_path))
