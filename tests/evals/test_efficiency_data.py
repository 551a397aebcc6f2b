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
from evals.efficiency.synthetic_shards import MEAN_TOKENS, VOCABULARY, write_sparse_shards, write_synthetic_shards
from tokenization.manifest import Manifest, ManifestError
from tokenization.verify import verify

SMALL = ("--tokens", "3e5", "--shard-tokens", "1e5", "--sequence-length", "128", "--global-batch", "8", "--steps", "4")


@pytest.mark.slow
def test_starts_with_and_without_an_index_and_a_resume_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evals.efficiency", "data", "--output", str(tmp_path), *SMALL]
    command += ["--sparse", "4e6", "--builds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    small, large = json.loads((tmp_path / "data.json").read_text())["sets"]
    assert [one["shards"] for one in (small, large)] == [3, 2]
    for one, tokens in ((small, 3e5), (large, 4e6)):
        assert abs(one["tokens"] - tokens) < 0.1 * tokens
        assert one["samples"] == pytest.approx(one["tokens"] / 128, abs=4)
        assert one["index_bytes"] > 22 * one["samples"]
        assert len(one["starts"]) == 3
        for name, start in one["starts"].items():
            assert name in done.stdout
            assert start["tokens_per_second"] > 0
            assert 0 <= start["wait_share"] <= 1


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


def test_sparse_shards_open_like_others_and_take_no_room(tmp_path: Path) -> None:
    manifest = write_sparse_shards(tmp_path, 4_000_000)
    assert Manifest.load(tmp_path) == manifest
    manifest.check_quick(tmp_path)
    datasets = [IndexedDataset(prefix) for prefix in manifest.train_prefixes(tmp_path)]
    assert sum(int(one.sequence_lengths.sum()) for one in datasets) == manifest.splits["train"].tokens
    assert [len(one) for one in datasets] == [shard.documents for shard in manifest.splits["train"].datasets]
    blocks = {(file.stat().st_ino, file.stat().st_blocks) for file in tmp_path.glob("*.bin")}
    assert [count for _, count in blocks] == [0]


def test_a_sparse_set_of_less_than_two_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"--sparse is \(1000\.0,\); give sets of at least two million tokens"):
        DataSettings(output=tmp_path, sparse=(1_000.0,))


@pytest.mark.parametrize(
    "name", ["tokens", "shard_tokens", "sequence_length", "global_batch", "steps", "builds", "threads"]
)
def test_less_than_one_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(EvaluationError, match=rf"--{name.replace('_', '-')} is 0; give at least 1"):
        DataSettings(output=tmp_path, **{name: 0})


def test_fewer_tokens_than_a_sample_are_refused_in_the_words_of_a_run(tmp_path: Path) -> None:
    settings = DataSettings(output=tmp_path, tokens=1e4, sequence_length=100_000, threads=1, builds=1)
    with pytest.raises(EvaluationError, match=r"a measurement failed: .* fewer tokens than one sequence"):
        data.measure(settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"--shards: .*nowhere/manifest\.json: missing"):
        data.measure(DataSettings(output=tmp_path, shards=tmp_path / "nowhere"))


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    with pytest.raises(EvaluationError, match=r"has 1\.0 GB free and 1,000,000,000 tokens need 5\.0 GB"):
        data.measure(DataSettings(output=tmp_path))
