"""A tokenizer and a run for the tests of the export."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .hf_runs import save_run, tiny, train_tokenizer


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads only wait for each other in models this small; parallel.start() sets as many as there are cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def mac_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return save_run(tmp_path_factory.mktemp("run") / "mac", tiny(), tokenizer)
