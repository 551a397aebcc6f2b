"""Native to exported and back: the same bytes from any tensor-parallel size, the same tensors after a round."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.commands import status_of
from titans_mcore.hf import convert
from titans_mcore.hf.convert import export
from titans_mcore.hf.mapping import to_exported
from titans_mcore.hf.modeling_titans import TitansForCausalLM
from titans_mcore.hf.proof import files_of
from titans_mcore.hf.to_native import import_run, main
from titans_mcore.mixers import MIXERS
from titans_mcore.weights import damage, find_checkpoint, load_full

from .hf_runs import VOCABULARY, native_logits, save_run, tiny

ROOT = Path(__file__).resolve().parents[2]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    """A run of each variant with four heads of attention and eight of memory, saved by one process."""
    folder = tmp_path_factory.mktemp("whole")
    return {v: save_run(folder / v, tiny(variant=v, memory_heads=8), tokenizer, seed=3) for v in MIXERS}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {v: export(run, folder / v, skip_proof=True).output for v, run in whole.items()}


def saved_by(size: int, split: str, runs: list[Path], output: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--rdzv-backend", "c10d"]
    worker = ["--rdzv-endpoint", "localhost:0", str(Path(__file__).with_name("tensor_parallel_worker.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, *torchrun, *worker, str(output), split, *map(str, runs)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Path]) -> Path:
    """The runs as two tensor-parallel ranks save them."""
    folder = tmp_path_factory.mktemp("of_two_ranks")
    saved_by(2, "heads", list(whole.values()), folder)
    return folder


@pytest.mark.parametrize(
    ("size", "split"),
    [(2, "heads"), *(pytest.param(4, split, marks=pytest.mark.slow) for split in ("heads", "hidden"))],
)
def test_every_tensor_parallel_size_exports_the_same_bytes(
    size: int,
    split: str,
    whole: dict[str, Path],
    of_two_ranks: Path,
    exported: dict[str, Path],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    runs = of_two_ranks if size == 2 else tmp_path / "runs"
    if size != 2:
        saved_by(size, split, list(whole.values()), runs)
    for variant in MIXERS:
        run = runs / variant
        assert len(list(run.rglob("tp-*.safetensors"))) == size
        output = export(run, tmp_path / variant, tokenizer=tokenizer, skip_proof=True).output
        for file in exported[variant].iterdir():
            assert (output / file.name).read_bytes() == file.read_bytes(), (variant, file.name)


def test_ranks_that_disagree_about_what_all_of_them_hold_are_refused(
    of_two_ranks: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(of_two_ranks / "mac", tmp_path / "mac")
    (second,) = tmp_path.rglob("tp-01-of-02.safetensors")
    with safe_open(second, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(second)
    tensors["final_norm.weight"][5] = torch.nextafter(tensors["final_norm.weight"][5], torch.tensor(9.0))
    save_file(tensors, second, metadata)
    arguments = ["--checkpoint", tmp_path / "mac", "--output", tmp_path / "hf", "--tokenizer", tokenizer]
    assert status_of(convert.main, *arguments) == 2
    assert "the ranks hold different values of final_norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("variant", MIXERS)
def test_native_exported_native_exported_are_the_same_bits(
    variant: str, whole: dict[str, Path], exported: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = import_run(exported[variant], tmp_path / "run")
    assert damage(checkpoint, read_files=True) is None
    assert find_checkpoint(tmp_path / "run") == checkpoint
    config, tensors = load_full(checkpoint)
    first_config, first = load_full(find_checkpoint(whole[variant]))
    assert config == first_config
    assert tensors.keys() == first.keys()
    for name, tensor in first.items():
        rows = VOCABULARY if name in ("embedding.weight", "output_layer.weight") else len(tensor)
        assert torch.equal(tensors[name][:rows], tensor[:rows]), name  # the padding of the vocabulary is not exported
    again = export(tmp_path / "run", tmp_path / "hf", skip_proof=True).output  # with the tokenizer of the folder
    assert weights(again) == weights(exported[variant])
    card = (again / "README.md").read_text()
    assert f"| made of | {variant} |" in card
    assert "tokens |" not in card
    assert (again / "tokenizer.json").read_bytes() == (exported[variant] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_save_pretrained_wrote_comes_back_too(
    dtype: torch.dtype, exported: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported["mag"], trust_remote_code=True, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as after fine-tuning
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="50KB")
    config, tensors = load_full(import_run(tmp_path / "tuned", tmp_path / "run"))
    assert to_exported(config, tensors).keys() == dict(model.named_parameters()).keys()
    tokens = torch.arange(3, 40)
    with torch.no_grad():
        expected = model.float()(tokens[None]).logits[0]
    native = native_logits(config, tensors, [tokens.tolist()], cut=7)
    torch.testing.assert_close(native["whole.0"], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def fails(capsys: pytest.CaptureFixture[str], folder: Path, output: Path) -> str:
    assert status_of(main, "--folder", folder, "--output", output) == 2
    *notes, line = capsys.readouterr().err.strip().splitlines()
    assert all(note.endswith("has no proof.json, so its files are not compared with checksums") for note in notes)
    assert line.startswith("error: ")
    return line


def test_the_command_makes_a_run_and_names_mistakes(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert status_of(main, "--folder", exported["lmm"], "--output", run) == 0
    assert "begins with its weights" in capsys.readouterr().out
    assert "exists; name a run folder that does not" in fails(capsys, exported["lmm"], run)
    assert "no such folder" in fails(capsys, tmp_path / "none", tmp_path / "other")


def test_a_damaged_folder_gets_a_sentence(mac_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(mac_run, tmp_path / "hf", skip_proof=True, max_shard_size="50KB").output
    output, config = tmp_path / "run", folder / "config.json"
    settings = config.read_text()
    config.write_text(settings.replace('"mac"', '"mad"'))
    assert "variant is 'mad'; it must be one of deltanet, gated_deltanet, lmm, mac, " in fails(capsys, folder, output)
    config.write_text(settings.replace('"titans"', '"llama"'))
    assert "is of model type 'llama'" in fails(capsys, folder, output)
    config.write_text("{")
    assert "config.json cannot be read" in fails(capsys, folder, output)
    config.write_text(settings)
    first = min(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    assert f"{first} is damaged: it has " in fails(capsys, folder, output)
    first.unlink()
    assert f"{first} is missing" in fails(capsys, folder, output)
    (folder / "model.safetensors.index.json").unlink()
    assert "has no model.safetensors" in fails(capsys, folder, output)
    config.unlink()
    assert "config.json is missing" in fails(capsys, folder, output)
    assert not output.exists()


def test_an_export_that_is_not_what_was_proven_is_refused(
    mac_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(mac_run, tmp_path / "hf", skip_proof=True).output
    (folder / "proof.json").write_text(json.dumps({"files": files_of(folder)}))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + bytes(2))
    assert f"{weights} is not the file that was exported" in fails(capsys, folder, tmp_path / "run")
    assert import_run(folder, tmp_path / "run", no_verify=True).is_dir()


def test_a_folder_of_pickles_is_refused_in_a_sentence(
    mac_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(mac_run, tmp_path / "hf", skip_proof=True).output
    with pytest.raises(ValueError, match="use_safetensors is False"):
        TitansForCausalLM.from_pretrained(folder, use_safetensors=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    says = r"holds its weights as pickle \(pytorch_model.bin\), which may run code"
    assert re.search(says, fails(capsys, folder, tmp_path / "run"))
    with pytest.raises(OSError, match=says):
        TitansForCausalLM.from_pretrained(folder)


def test_weights_of_another_model_are_named(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights(exported["mag"]))
    settings = json.loads((exported["mag"] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "variant": "mal"}))
    assert "memory_output.weight is missing in the exported model" in fails(capsys, folder, tmp_path / "run")
