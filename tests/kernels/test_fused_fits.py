"""What the kernels do not take is refused in one sentence, before anything runs."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from titans_mcore.kernels import fused_fits

from .problems import Sizes, by_kernels, make_problem


def weights(width: int, hidden: int = 0) -> list[torch.Tensor]:
    if not hidden:
        return [torch.zeros(2, width, width)]
    return [torch.zeros(2, width, hidden), torch.zeros(2, hidden, width)]


@pytest.mark.parametrize(("width", "hidden", "chunk_size"), [(16, 0, 16), (64, 256, 16), (128, 0, 128), (32, 64, 64)])
def test_shapes_that_fit(width: int, hidden: int, chunk_size: int, device: str) -> None:
    queries = torch.zeros(1, 5, 2, width, device=device)
    assert fused_fits(queries, weights(width, hidden), chunk_size) == ""
    assert fused_fits(queries.bfloat16(), weights(width, hidden), chunk_size) == ""


@pytest.mark.parametrize(
    ("queries", "matrices", "chunk_size", "sentence"),
    [
        (torch.zeros(1, 5, 2, 16), weights(16), 8, "chunk_size is 8"),
        (torch.zeros(1, 5, 2, 16), weights(16), 48, "chunk_size is 48"),
        (torch.zeros(1, 5, 2, 24), weights(24), 16, "head width is 24"),
        (torch.zeros(1, 5, 2, 256), weights(256), 16, "head width is 256"),
        (torch.zeros(1, 5, 2, 16), weights(16, 48), 16, "hidden width is 48"),
        (torch.zeros(1, 5, 2, 16), weights(16, 512), 16, "hidden width is 512"),
        (torch.zeros(1, 5, 2, 16), weights(16) * 3, 16, "this one has 3"),
        (torch.zeros(1, 5, 2, 16, dtype=torch.float64), weights(16), 16, "these are torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(
    queries: torch.Tensor, matrices: list[torch.Tensor], chunk_size: int, sentence: str, device: str
) -> None:
    assert sentence in fused_fits(queries.to(device), matrices, chunk_size)


def test_a_processor_without_the_interpreter_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "these are on cpu" in fused_fits(torch.zeros(1, 5, 2, 16), weights(16), 16)


def test_missing_triton_is_named_when_a_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need the triton package"):
        by_kernels(make_problem(Sizes(depth=1)).cast(torch.float32, "cpu"))


def test_importing_the_package_imports_no_triton() -> None:
    check = "import sys, titans_mcore.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
