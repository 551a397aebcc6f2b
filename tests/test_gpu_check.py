"""launch/gpu_check.sh where there is no GPU: what it would run, and what it refuses."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from pretrain.config.files import preset_names

ROOT = Path(__file__).parents[1]


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_command_names_what_is_there() -> None:
    planned = gpu_check("--dry-run").stdout
    for preset in ("mag_340m", "transformer_340m"):
        assert f"launch/torchrun.sh --config {preset} " in planned
        assert preset in preset_names()
    assert "evals.efficiency memory --device cuda" in planned


def test_only_runs_what_was_asked_for() -> None:
    planned = gpu_check("--dry-run", "--only", "kernels", "memory").stdout
    assert [line for line in planned.splitlines() if line.startswith("==")] == ["== kernels", "== memory"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "speed"], "--only speed is not a step"),
        (["--steps", "0"], "--steps is '0'"),
        (["--output"], "--output needs a value"),
        (["--fast"], "--fast is not an option"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = gpu_check(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = gpu_check("--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_report_says_how_every_step_ended(tmp_path: Path) -> None:
    done = gpu_check("--output", str(tmp_path), "--only", "kernels")
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [step["step"] for step in report["steps"]] == ["kernels"]
    assert report["steps"][0]["status"] == done.returncode
