"""Small corpora, a small tokenizer, and the commands."""

import hashlib
import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.commands import status_of
from tokenization.encode import EncodeSettings
from tokenization.train import TrainSettings, train

REPOSITORY = Path(__file__).parents[2]
WORDS = (
    "the",
    "memory",
    "of",
    "a",
    "model",
    "learns",
    "at",
    "test",
    "time",
    "what",
    "surprise",
    "tells",
    "it",
    "to",
    "keep",
)

Command = Callable[..., subprocess.CompletedProcess[str]]


def make_texts(count: int, words: int = 40, seed: int = 0) -> list[str]:
    """Different texts with line ends, indents, digits and characters that no small vocabulary holds."""
    generator = random.Random(seed)
    extras = ["\n", "\n\n    ", "\t", "  ", " 1984 ", " é", " 記憶 ", "🙂", "\r\n"]
    return [
        f"text {index}: "
        + "".join(generator.choice(WORDS) + generator.choice([" "] * 6 + extras) for _ in range(words))
        for index in range(count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def encode_settings(corpus: Path, tokenizer: Path, output: Path, **changes) -> EncodeSettings:
    """Units and shards so small that even these corpora have several."""
    wanted = {"input": (str(corpus),), "workers": 1, "heldout_fraction": 0.2, "unit_mb": 0.005, **changes}
    return EncodeSettings(tokenizer=tokenizer, output=output, **wanted)


def command_line(settings: EncodeSettings) -> list[str]:
    """The same as a command."""
    options = {
        "--tokenizer": settings.tokenizer,
        "--output": settings.output,
        "--workers": settings.workers,
        "--heldout-fraction": settings.heldout_fraction,
        "--unit-mb": settings.unit_mb,
        "--shard-tokens": settings.shard_tokens,
        "--shard": settings.shard,
    }
    arguments = [str(one) for pair in options.items() for one in pair]
    return [sys.executable, "-m", "tokenization.encode", "--input", *settings.input, *arguments]


def start(settings: EncodeSettings, *more: str, hold_at: str = "", **options) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, which never gets beyond files that hold_at, a pattern, matches."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if hold_at:
        environment |= {"HOLD_AT": hold_at, "PYTHONPATH": f"{Path(__file__).with_name('held_disk')}:{REPOSITORY}"}
    return subprocess.Popen(
        [*command_line(settings), *more], cwd=REPOSITORY, env=environment, start_new_session=True, text=True, **options
    )


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a folder; plan.json and what names it hold times and places of the sources."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(60)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train(TrainSettings(input=(str(corpus),), output=path, vocab_size=400))
    return path


@pytest.fixture(scope="session")
def run() -> Command:
    """Does what `python -m tokenization.NAME ARGUMENTS...` does, in this process."""

    def call(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        main = importlib.import_module(f"tokenization.{name}").main
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            status = status_of(main, *arguments)
        return subprocess.CompletedProcess([name], status, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def fails(run: Command) -> Callable[..., str]:
    """Starts a command that must end with status 2 and one sentence, which is returned."""

    def start(name: str, *arguments: object) -> str:
        result = run(name, *arguments)
        assert result.returncode == 2, (result.stdout, result.stderr)
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: "), lines
        return lines[0]

    return start
