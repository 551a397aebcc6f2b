"""Whatever is wrong with a folder or with what loads it, a sentence says so."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from titans_mcore.config import TitansConfig
from titans_mcore.hf.configuration_titans import TitansHFConfig, check_transformers
from titans_mcore.hf.convert import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, mac_run: Path) -> Path:
    return export(mac_run, tmp_path_factory.mktemp("loading") / "hf", skip_proof=True, max_shard_size="50KB").output


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copied"))


def load(folder: Path) -> object:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_a_missing_shard_is_named(folder: Path) -> None:
    load(folder)
    missing = sorted(folder.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(OSError, match=f"{missing} is missing, which .*index.json names; copy the folder again"):
        load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-3], r"is damaged: it has \d+ bytes instead of \d+"),
        (lambda content: b"\xff" * 8 + content[8:], "is damaged: it has .* and no header"),
        (lambda content: content[:8] + b"x" + content[9:], "is damaged: it has .* and no header"),
        (lambda content: b"", "is damaged: it has 0 bytes"),
    ],
    ids=["cut", "length", "header", "empty"],
)
def test_a_corrupted_shard_is_named(folder: Path, damage, message: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(OSError, match=f"{shard} {message}"):
        load(folder)


def test_a_damaged_index_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(OSError, match=r"index\.json is damaged"):
        load(folder)


def test_missing_code_is_named(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: where a folder has been loaded once, its code is there."""
    (folder / "titans_memory.py").unlink()
    script = (
        "import sys; from transformers import AutoModelForCausalLM as A;"
        "A.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", script, str(folder)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode
    assert "titans_memory.py" in result.stderr.splitlines()[-1]


def test_an_unknown_variant_is_named(folder: Path) -> None:
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "variant": "mad"}))
    with pytest.raises(ValueError, match="variant is 'mad'; it must be one of deltanet, gated_deltanet, lmm, mac, "):
        load(folder)


def test_code_that_is_not_trusted_is_not_run_and_the_remedy_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    script = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    result = subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode
    assert "trust_remote_code=True" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("version", ["4.56.2", "4.9", "3.0.0"])
def test_an_older_transformers_is_refused_in_a_sentence(version: str) -> None:
    with pytest.raises(ImportError, match=rf"need transformers 4\.57 or later, and this is {re.escape(version)}; pip"):
        check_transformers(version)


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.0.0rc1", "5.23.0", "6.0.0.dev0"])
def test_a_newer_transformers_is_taken(version: str) -> None:
    check_transformers(version)


def test_the_version_is_checked_before_anything_else(exported: Path, tmp_path: Path) -> None:
    script = (
        "import transformers; transformers.__version__ = '4.40.0'; from transformers import AutoModelForCausalLM as A;"
        f"A.from_pretrained({str(exported)!r}, trust_remote_code=True)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.stderr.splitlines()[-1].startswith("ImportError: Titans models need transformers 4.57 or later")


def test_every_setting_survives_config_json(tmp_path: Path) -> None:
    """Settings that a later version adds, too: nothing here names them."""
    other = {"variant": "mag", "memory_network": "plain", "memory_gates": "shared", "vocab_size": 77, "dim": 96}
    for field in fields(TitansConfig):
        value = field.default
        if isinstance(value, bool):
            other.setdefault(field.name, not value)
        elif isinstance(value, float):
            other.setdefault(field.name, value / 2)
    config = TitansConfig(**other)
    TitansHFConfig.from_titans(config).save_pretrained(tmp_path)
    assert TitansHFConfig.from_pretrained(tmp_path).to_titans() == config
