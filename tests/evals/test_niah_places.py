"""The same samples and results wherever they run: several processes, any tensor-parallel size, an exported folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evals.command_line import EvaluationError
from evals.models import load_model
from evals.niah import NiahSettings
from evals.niah.run import evaluate
from titans_mcore import weights

from .conftest import MakeRun, spoil_code
from .test_niah_run import REPOSITORY, report_of, results

GRID = ["--lengths", "600", "800", "--depths", "3", "--samples", "3", "--max-new-tokens", "10", "--batch", "2"]
GRID += ["--tasks", "pk", "n", "--controls", "memory_reset"]


def settings_of_grid(run: Path, output: Path) -> NiahSettings:
    return NiahSettings(
        run, output, ("pk", "n"), (600, 800), 3, 3, controls=("memory_reset",), max_new_tokens=10, batch=2
    )


def torchrun(processes: int, *words: object) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0", "-m", "evals.niah"]
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_share_the_work(mac_run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    report = report_of(load_model(mac_run), settings_of_grid(mac_run, one))
    finished = torchrun(2, "--checkpoint", mac_run, "--output", two, *GRID)
    assert finished.returncode == 0, finished.stderr
    assert "in 2 processes" in finished.stderr
    assert finished.stdout.count("niah_by_length.png") == 1, "one process reports"
    assert results(two) == results(one)
    spread = json.loads((two / "niah.json").read_text())
    assert spread["accuracy_by_length"] == report["accuracy_by_length"]
    assert [row["n"] for row in spread["by_length"]] == [row["n"] for row in report["by_length"]]
    assert not list(two.glob("niah.rank-*"))
    assert len({line["peak_bytes"] for line in map(json.loads, (two / "niah.jsonl").open())}) > 1
    half = (two / "niah.jsonl").read_text().splitlines(keepends=True)[::2]
    (two / "niah.jsonl").write_text("".join(half))
    assert torchrun(2, "--checkpoint", mac_run, "--output", two, *GRID).returncode == 0
    assert results(two) == results(one)
    assert (two / "niah.jsonl").read_text().startswith("".join(half)), "finished samples were run again"


def test_a_fault_ends_all_processes_and_is_said_once(mac_run: Path, tmp_path: Path) -> None:
    finished = torchrun(2, "--checkpoint", mac_run, "--output", tmp_path, "--lengths", 100)
    assert finished.returncode != 0
    assert finished.stderr.count("error: --lengths 100: too short") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [2])
def test_a_checkpoint_of_any_tensor_parallel_size_gives_the_same_results(
    mac_run: Path, tmp_path: Path, size: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(mac_run, run)
    checkpoint = next((run / "checkpoints").iterdir())
    config, whole = weights.load_full(checkpoint)
    only = checkpoint / "weights" / weights.shard_name(0, 1)
    rules = {name: part.rule for name, part in weights.saved_weights(checkpoint).parts[0].items()}
    only.unlink()
    for rank in range(size):
        parts = {name: rule.take(whole[name], rank, size) if rule else whole[name] for name, rule in rules.items()}
        header = weights.ShardHeader({name: part.shape for name, part in parts.items()}, rules)
        weights.write_shard(only.with_name(weights.shard_name(rank, size)), header, parts.items())
    weights.write_description(only.with_name(weights.DESCRIPTION), config, size=size, step=1, tokens=1)
    files = (checkpoint / "weights").iterdir()
    listed = {f"weights/{file.name}": {"bytes": file.stat().st_size} for file in files}
    (checkpoint / weights.MARKER).write_text(json.dumps({"files": listed}))
    settings = NiahSettings(run, tmp_path / "a", lengths=(600,), depths=2, max_new_tokens=10)
    evaluate(load_model(mac_run), settings)
    evaluate(load_model(run), NiahSettings(run, tmp_path / "b", lengths=(600,), depths=2, max_new_tokens=10))
    one, other = ([line | {"checkpoint_sha256": ""} for line in results(tmp_path / folder)] for folder in ("a", "b"))
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_an_exported_folder_gives_the_samples_and_results_of_the_run(
    make_run: MakeRun, tmp_path: Path, variant: str
) -> None:
    from titans_mcore.hf.convert import export

    run, folder = make_run(variant), tmp_path / "hf"
    export(run, folder, skip_proof=True)
    ran = spoil_code(folder)
    controls = ("memory_reset", "memory_off", "random_init")
    for checkpoint in (run, folder):
        settings = NiahSettings(
            checkpoint,
            tmp_path / checkpoint.name,
            ("pk", "w"),
            (700,),
            depths=2,
            samples=2,
            controls=controls,  # type: ignore[arg-type]
            max_new_tokens=8,
        )
        report_of(load_model(checkpoint), settings)
    native, exported = (
        [line | {"checkpoint_sha256": "", "tokenizer_sha256": ""} for line in results(tmp_path / path.name)]
        for path in (run, folder)
    )
    for one, other in zip(native, exported, strict=True):
        assert one.pop("value_loss") == pytest.approx(other.pop("value_loss"), rel=1e-4)
        # Of bytes that are no text each library makes something else, in which there may be a number.
        for record in (one, other):
            del record["answer"], record["wrong_value"]
        assert one == other
    assert len(native) == 2 * 2 * 2 * 4
    assert not ran.exists()


def test_a_folder_that_is_no_export_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(EvaluationError, match=r"config.json is of model type 'llama'; name a folder that was exported"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "titans", "auto_map": {"AutoModelForCausalLM": "modeling_titans.TitansForCausalLM"}}'
    )
    with pytest.raises(EvaluationError, match=r"has no model.safetensors .*export the folder again"):
        load_model(tmp_path)
