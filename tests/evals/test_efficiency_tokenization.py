"""`python -m evals.efficiency tokenization` on a little text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"{number}\n{Path(__file__).read_text()}")
    return folder


@pytest.fixture(scope="module")
def tokenizer(text: Path) -> Path:
    model = text.parent / "tokenizer.model"
    trained = run("tokenization.train", "--input", text, "--vocab-size", 400, "--output", model)
    assert trained.returncode == 0, trained.stderr
    return model


def test_both_sides_encode_the_same_text_and_the_ratio_is_reported(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    words = ("evals.efficiency", "tokenization", "--output", tmp_path, "--input", text, "--tokenizer", tokenizer)
    done = run(*words, "--threads", 1, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "tokenization.json").read_text())
    assert report["tokens"] > 1_000
    assert report["text_bytes"] == sum(path.stat().st_size for path in text.iterdir())
    assert report["ratio"] == pytest.approx(report["encode"] / report["sentencepiece"])
    assert f"{report['ratio']:.2f} of sentencepiece's speed" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tokenization.json"]


def test_a_missing_text_is_one_sentence(tokenizer: Path, tmp_path: Path) -> None:
    words = ("evals.efficiency", "tokenization", "--output", tmp_path, "--tokenizer", tokenizer)
    done = run(*words, "--input", tmp_path / "nowhere.txt")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nowhere.txt" in done.stderr
