"""The command `python -m titans_mcore.hf.convert`: its proof, its folder, and every mistake in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import status_of
from titans_mcore.hf import proof, save
from titans_mcore.hf.convert import export, main
from titans_mcore.hf.proof import TOLERANCE

from .hf_runs import save_run, tiny, train_tokenizer

Fails = Callable[..., str]
MOST_FILES = 15
"""What an exported folder may hold where the weights are one file: it is to be read."""


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs the command, which must end with a status and one sentence, and returns the sentence."""

    def run(*arguments: object, status: int = 2) -> str:
        assert status_of(main, *arguments) == status
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: "), lines
        return lines[0]

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_is_exported_and_proven(mac_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "hf"
    assert status_of(main, "--checkpoint", mac_run, "--output", output) == 0
    printed = capsys.readouterr().out
    proven = json.loads((output / "proof.json").read_text())
    assert 0 <= proven["max_abs_error"] <= TOLERANCE * proven["largest_output"]
    assert f"{proven['max_abs_error']:.3g}" in printed
    (tokens,) = proven["inputs"]["input_ids"]
    assert tokens[0] == 1
    assert proven["compared"] == len(tokens) * tiny().vocab_size
    assert torch.tensor(proven["outputs"]["logits"]).std() > 0.1
    assert set(proven["files"]) == names(output) - {"proof.json", "README.md"}
    assert len(names(output)) <= MOST_FILES
    assert "5,120 tokens" in (output / "README.md").read_text()
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 2
    assert names(tmp_path) == {"hf"}


def test_large_weights_are_spread_over_files(mac_run: Path, tmp_path: Path) -> None:
    whole = export(mac_run, tmp_path / "whole", skip_proof=True)
    spread = export(mac_run, tmp_path / "spread", skip_proof=True, max_shard_size="50KB")
    assert whole.max_abs_error is None
    files = sorted(spread.output.glob("*.safetensors"))
    assert len(files) > 2
    assert (spread.output / "model.safetensors.index.json").is_file()
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    one = load_file(whole.output / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in together.items()} == {n: t.tolist() for n, t in one.items()}


def test_a_failed_proof_leaves_nothing(
    mac_run: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = proof.native_logits

    def other_model(config, weights, *rest):
        changed = {**weights, "final_norm.weight": weights["final_norm.weight"] * 1.001}
        return real(config, changed, *rest)

    monkeypatch.setattr(proof, "native_logits", other_model)
    assert "differs from the trained one by" in fails("--checkpoint", mac_run, "--output", tmp_path / "hf", status=1)
    assert names(tmp_path) == set()


def test_a_folder_that_cannot_be_loaded_alone_fails_the_proof(
    mac_run: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"configuration_titans.py": "import titans_mcore\n", "modeling_titans.py": ""}
    monkeypatch.setattr(save, "flatten_code", lambda entries: code)
    assert "could not be loaded" in fails("--checkpoint", mac_run, "--output", tmp_path / "hf", status=1)
    assert names(tmp_path) == set()


def test_an_earlier_export_is_replaced_and_anything_else_is_not(mac_run: Path, tmp_path: Path, fails: Fails) -> None:
    output = tmp_path / "hf"
    export(mac_run, output, skip_proof=True)
    (output / "left-over").write_text("")
    export(mac_run, output, skip_proof=True)
    assert "left-over" not in names(output)

    other = tmp_path / "thesis"
    other.mkdir()
    export(mac_run, other, skip_proof=True)  # an empty folder is no obstacle
    shutil.rmtree(other)
    other.mkdir()
    (other / "chapter.tex").write_text("text")
    arguments = ("--checkpoint", mac_run, "--output", other, "--skip-proof")
    assert "not an earlier export" in fails(*arguments)
    assert names(other) == {"chapter.tex"}
    assert status_of(main, *arguments, "--overwrite") == 0
    assert "chapter.tex" not in names(other)
    assert names(tmp_path) == {"hf", "thesis"}


def test_what_is_read_is_never_replaced(mac_run: Path, tmp_path: Path, fails: Fails) -> None:
    for output in (mac_run, mac_run / "checkpoints", mac_run / "checkpoints" / "step-00000010"):
        assert "is being exported" in fails("--checkpoint", mac_run, "--output", output, "--overwrite")
    assert (mac_run / "checkpoints" / "step-00000010" / "checkpoint.json").is_file()


def test_mistakes_get_one_sentence(mac_run: Path, tmp_path: Path, tokenizer: Path, fails: Fails) -> None:
    output = tmp_path / "hf"
    assert "no such folder" in fails("--checkpoint", tmp_path / "none", "--output", output)
    (tmp_path / "empty").mkdir()
    assert "no whole checkpoint" in fails("--checkpoint", tmp_path / "empty", "--output", output)

    bare = tmp_path / "bare"
    shutil.copytree(mac_run, bare)
    shutil.rmtree(bare / "tokenizer")
    assert "no tokenizer at" in fails("--checkpoint", bare, "--output", output)
    wrong = train_tokenizer(tmp_path / "wrong.model", vocab_size=320)
    message = fails("--checkpoint", bare, "--output", output, "--tokenizer", wrong)
    assert "has 320 pieces, the model 330" in message

    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in fails("--checkpoint", mac_run, "--output", file, "--overwrite")

    message = fails("--checkpoint", mac_run, "--output", output, "--max-shard-size", "5 bags")
    assert "'5 bags'; give a size such as 5GB" in message

    weights = bare / "checkpoints" / "step-00000010" / "weights" / "tp-00-of-01.safetensors"
    content = bytearray(weights.read_bytes())
    weights.write_bytes(content[:-10])
    assert "bytes instead of" in fails("--checkpoint", bare, "--output", output, "--tokenizer", tokenizer)
    content[:8] = b"\xff" * 8
    weights.write_bytes(content)
    assert "cannot read the weights" in fails("--checkpoint", bare, "--output", output, "--tokenizer", tokenizer)
    assert not output.exists()


def test_weights_of_another_variant_are_named(tmp_path: Path, tokenizer: Path, fails: Fails) -> None:
    run = save_run(tmp_path / "run", tiny(), tokenizer)
    description = run / "checkpoints" / "step-00000010" / "weights" / "model.json"
    text = description.read_text()
    description.write_text(text.replace('"mac"', '"mal"'))
    assert "layers.0.mixer.attention.qkv_proj.weight is missing in the checkpoint" in fails(
        "--checkpoint", run, "--output", tmp_path / "hf"
    )


def test_help_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, "--help") == 0
    text = capsys.readouterr().out
    for flag in (
        "--checkpoint",
        "--output",
        "--tokenizer",
        "--overwrite",
        "--skip-proof",
        "--max-shard-size",
    ):
        assert flag in text


def test_the_card_tells_of_the_run_and_of_its_losses_at_this_checkpoint(mac_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(mac_run, run)
    marker = run / "checkpoints" / "step-00000010" / "checkpoint.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "data_fingerprint": "f1e2d3"}))
    (run / "config.toml").write_text("[train]\nsequence_length = 512\n")
    steps = [{"kind": "step", "step": step, "loss": 7.0 - step / 10} for step in (5, 10)]
    others = [{"kind": "heldout", "step": 10, "loss": 6.25}, {"kind": "position_loss", "step": 10, "loss": [1.5, 2.5]}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*steps, *others]))
    card = (export(run, tmp_path / "hf", skip_proof=True).output / "README.md").read_text()
    assert "| data fingerprint | f1e2d3 |" in card
    assert "| training loss | 6 nats a token |" in card
    assert "| held-out loss | 6.25 nats a token |" in card
    assert "sequence_length = 512" in card
    assert "6.5" not in card  # of an earlier checkpoint


def test_a_run_that_says_nothing_gets_a_card_without_empty_sections(mac_run: Path, tmp_path: Path) -> None:
    card = (export(mac_run, tmp_path / "hf", skip_proof=True).output / "README.md").read_text()
    assert "## " not in card
    assert "None" not in card
