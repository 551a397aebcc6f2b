"""`python -m titans_mcore.hf.verify FOLDER`: a folder proves itself again, and shows whatever has happened to it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.commands import status_of
from titans_mcore.hf.convert import export
from titans_mcore.hf.proof import files_of
from titans_mcore.hf.verify import main


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, mac_run: Path) -> Path:
    return export(mac_run, tmp_path_factory.mktemp("proven") / "hf", max_shard_size="50KB").output


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy somewhere else, under another name."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))


def fails(capsys: pytest.CaptureFixture[str], folder: Path, status: int, *more: str) -> str:
    assert status_of(main, folder, *more) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_copied_folder_is_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "README.md").write_text("my words")  # what may change
    assert status_of(main, folder) == 0
    assert "numbers differ from the trained model's by at most" in capsys.readouterr().out


def test_a_missing_file_and_a_corrupted_shard_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-5] ^= 1  # one bit of a weight
    first.write_bytes(content)
    assert f"{first} is not the file that was exported" in fails(capsys, folder, 1)
    content[-5] ^= 1
    first.write_bytes(content)
    second.unlink()
    assert f"{second} is missing" in fails(capsys, folder, 1)


def test_other_weights_fail_even_if_the_checksums_are_theirs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What catches a folder that computes something else for whatever reason: another version, another processor."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.final_norm.weight" in tensors:
            tensors["model.final_norm.weight"] *= 1.01
            save_file(tensors, file, {"format": "pt"})
    proof = json.loads((folder / "proof.json").read_text())
    proof["files"] = {name: known for name, known in files_of(folder).items() if name in proof["files"]}
    (folder / "proof.json").write_text(json.dumps(proof))
    assert "differs from the trained one by" in fails(capsys, folder, 1)


def test_a_folder_without_a_proof_that_can_be_read_gets_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "proof.json"
    proof = json.loads(file.read_text())
    file.write_text(json.dumps({**proof, "format": 1}))
    assert "has format 1; this version reads format 3" in fails(capsys, folder, 2)
    file.write_text("{")
    assert "cannot be read" in fails(capsys, folder, 2)
    file.unlink()
    assert "proof.json is missing" in fails(capsys, folder, 2)
    assert "proof.json is missing" in fails(capsys, folder / "none", 2)
