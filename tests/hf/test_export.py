"""Exported folders, loaded where this project cannot be imported, compute what the native models compute."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from titans_mcore.hf import probe
from titans_mcore.hf.configuration_titans import OLDEST
from titans_mcore.hf.convert import export
from titans_mcore.hf.flatten import flatten_code
from titans_mcore.weights import load_full

from .hf_runs import TINY, native_logits, save_run, tiny

MODELS: dict[str, dict[str, Any]] = {
    "mac": {},
    "mag": {"variant": "mag", "tie_embeddings": False},
    "mal": {"variant": "mal", "memory_depth": 3},
    "lmm": {"variant": "lmm", "memory_depth": 1, "memory_network": "plain", "conv_kernel": 1},
    "transformer": {"variant": "transformer", "window": 0},
    "hybrid": {"variant": "lmm+transformer", "num_layers": 3},
}
OLDER = {
    OLDEST: ["huggingface_hub<1.0", "tokenizers==0.22.*"],
    "5.23": ["huggingface_hub<3.0", "tokenizers==0.23.*"],  # the last before a cache's name changed
}
"""Versions of transformers that are tried beside the installed one, and what they need."""
OLDER_FOLDER = "TITANS_OLDER_TRANSFORMERS"
LENGTH = 3 * TINY["segment_length"] + 3


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: save_run(folder / name, tiny(**settings), tokenizer) for name, settings in MODELS.items()}


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(TINY["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(
    scope="session", params=["installed", *(pytest.param(version, marks=pytest.mark.slow) for version in OLDER)]
)
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path], tokens: Tensor
) -> Path:
    """What alone.py found for each exported folder, with the transformers that is here and with older ones."""
    packages = None if request.param == "installed" else older_transformers(request.param, tmp_path_factory)
    output = tmp_path_factory.mktemp("alone")
    (output / "tokens.json").write_text(json.dumps(tokens.tolist()))
    folders = [export(run, output / "exports" / name, skip_proof=True).output for name, run in runs.items()]
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(output / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    if packages:
        environment["PYTHONPATH"] = packages
    script = Path(__file__).with_name("alone.py")
    result = subprocess.run(
        [sys.executable, "-P", script, probe.__file__, output, *folders],
        cwd=output,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    version = findings(output, "mac")["transformers"]
    assert version.startswith(request.param) if packages else version == transformers.__version__
    return output


def older_transformers(version: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an older transformers, and what it needs in other versions."""
    if transformers.__version__.startswith(version):
        pytest.skip(f"transformers {version} is the installed one")
    if given := os.environ.get(OLDER_FOLDER):
        return str(Path(given, version))
    folder = str(tmp_path_factory.mktemp("older"))
    wanted = [f"transformers=={version}.*", *OLDER[version]]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *wanted]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(
            f"transformers {version} cannot be installed here; put it in {version} in the {OLDER_FOLDER} folder"
        )
    return folder


def findings(alone: Path, name: str) -> dict[str, Any]:
    return json.loads((alone / f"{name}.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_native_models(name: str, runs: dict[str, Path], alone: Path, tokens: Tensor) -> None:
    config, weights = load_full(runs[name] / "checkpoints" / "step-00000010")
    native = native_logits(config, weights, tokens.tolist(), cut=5)
    exported = load_file(alone / f"{name}.safetensors")["logits"]
    assert exported.shape == (2, LENGTH, TINY["vocab_size"])  # the vocabulary's padding is gone
    for row in range(2):
        assert exported[row].std() > 0.1
        # Of the largest logit: products of other shapes round otherwise, on some processors by more than 1e-5 itself.
        largest = float(exported[row].abs().max())
        torch.testing.assert_close(exported[row], native[f"whole.{row}"], rtol=0, atol=1e-5 * largest)
        torch.testing.assert_close(exported[row], native[f"pieces.{row}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_loads_without_this_package(name: str, alone: Path) -> None:
    found = findings(alone, name)
    assert not [module for module in found["modules"] if module.split(".")[0] == "titans_mcore"]
    assert found["variant"] == tiny(**MODELS[name]).variant
    assert found["tied"] == MODELS[name].get("tie_embeddings", True)
    assert found["text"].startswith("<s> the memory")


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_and_from_pretrained_give_the_same_bits_and_code(name: str, alone: Path) -> None:
    found = findings(alone, name)
    assert all(found["same_state"].values()), found["same_state"]
    assert found["same_logits"]
    assert found["copied_code"] == sorted(flatten_code())


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_keeps_the_memory_in_fp32(name: str, alone: Path) -> None:
    found = findings(alone, name)
    assert found["half_dtypes"] == ["torch.bfloat16"]
    assert found["half_state_dtypes"] == (
        ["torch.float32"] if any(m.memory for m in tiny(**MODELS[name]).mixers) else []
    )
    assert found["half_error"] < 1.0


@pytest.mark.parametrize("name", MODELS)
def test_a_left_padded_batch_generates_what_its_rows_do(name: str, alone: Path) -> None:
    found = findings(alone, name)["generated"]
    assert found == dict.fromkeys(("greedy", "without_cache", "beams", "pieces", "sampling"), True)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_cache_is_continued_by_several_tokens(name: str, alone: Path) -> None:
    assert all(error < 1e-4 for error in findings(alone, name)["continued"].values())
