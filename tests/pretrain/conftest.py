"""Shards, settings and runs that the tests share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..evals.conftest import train_tokenizer
from .jobs import ROOT, Job
from .tiny_shards import write_shards

TINY = """
[model]
variant = "mac"
num_layers = 1
dim = 32
num_heads = 2
memory_heads = 2
linear_heads = 4
ffn_dim = 64
memory_expansion = 1
chunk_size = 8
persistent_tokens = 2
segment_length = 16
window = 16
[data]
[evaluate]
heldout_sequences = 6
[train]
steps = 20
sequence_length = 32
global_batch = 4
micro_batch = 2
precision = "fp32"
[optimizer]
lr = 3e-3
[schedule]
warmup_steps = 5
[checkpoint]
every_steps = 10
"""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def tiny_toml(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.toml"
    file.write_text(TINY.replace("[data]", f'[data]\npath = "{shards}"'))
    return file


@pytest.fixture(scope="session")
def worded_toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny configuration on shards that have a real tokenizer."""
    folder = tmp_path_factory.mktemp("worded")
    shards = write_shards(folder / "shards", vocab_size=360, documents=60, tokenizer=train_tokenizer(360))
    file = folder / "tiny.toml"
    file.write_text(TINY.replace("[data]", f'[data]\npath = "{shards}"'))
    return file


@pytest.fixture(scope="session")
def launch(tiny_toml: Path, tmp_path_factory: pytest.TempPathFactory):
    """Starts launch/torchrun.sh on the tiny configuration, from a folder that is not the project's."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(run_dir: Path, *arguments: str) -> Job:
        script = str(ROOT / "launch" / "torchrun.sh")
        return Job(["bash", script, "--config", str(tiny_toml), "--run-dir", str(run_dir), *arguments], elsewhere)

    return run


@pytest.fixture(scope="session")
def train(tiny_toml: Path, tmp_path_factory: pytest.TempPathFactory):
    """Starts `python -m pretrain.train` on the tiny configuration: one process without torchrun."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(run_dir: Path, *arguments: str) -> Job:
        command = [sys.executable, "-m", "pretrain.train", "--config", str(tiny_toml), "--run-dir", str(run_dir)]
        return Job([*command, *arguments], elsewhere)

    return run


@pytest.fixture(scope="session")
def finished_run(launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 uninterrupted steps at tensor parallel 2."""
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    status, out, err = launch(run_dir, "--parallel.tensor", "2").wait()
    assert status == 0, err
    assert "done: held-out loss" in out
    return run_dir


@pytest.fixture(scope="module")
def one_process() -> Iterator[object]:
    """Megatron's groups of this process alone."""
    from titans_mcore.parallel import start, stop

    groups = start(1, seed=0)
    yield groups
    stop()
