"""A checkpoint written at one layout goes on at any other, with the losses of the run that was not stopped."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from pretrain.checkpoint.resume import find_resume_point
from pretrain.config.files import load_run_config
from pretrain.data.folders import open_data
from tests.pretrain.jobs import read_metrics

from .jobs import Job
from .test_resume import numbers, tensor_files

# One fixture trains for all tests: it may take its time where other tests share the cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

WORKER = str(Path(__file__).with_name("reshape_worker.py"))
TENSOR = "--parallel.tensor 2"
# Stages divide parameters otherwise, so the sums that make the gradient's norm differ in the last bit. Clipping would
# pass that on to the fp32 masters, and where one lies between two bf16 numbers its weight would jump by a 256th: losses
# then differ by 1e-5. Without clipping masters and losses are the same to the last bit.
BF16 = "--train.precision bf16 --optimizer.clip-norm 0"
HIDDEN, CONTEXT = f"{TENSOR} --parallel.memory-parallel hidden", "--parallel.context 2"
ZERO = [f"--parallel.zero-stage {stage}" for stage in range(4)]

STARTS = [  # processes, and the runs one after the other: name, run whose step 10 it goes on from, settings
    (
        2,
        [
            *(f"data-2-zero-{stage} - {zero}" for stage, zero in enumerate(ZERO)),
            f"bf16-zero-1 - {BF16} {ZERO[1]}",
            f"again data-2-zero-1 {ZERO[1]}",
            f"1-to-3 data-2-zero-1 {ZERO[3]}",
            f"3-to-1 data-2-zero-3 {ZERO[1]}",
            f"2-to-0 data-2-zero-2 {ZERO[0]}",
            f"0-to-2 data-2-zero-0 {ZERO[2]}",
            f"bf16-1-to-3 bf16-zero-1 {BF16} {ZERO[3]}",
        ],
    ),
    (4, [f"tensor-2-data-2 - {TENSOR} --train.micro-batch 1"]),
    (
        2,
        [
            f"tensor-2 - {TENSOR}",
            f"lmm-tensor-2 - {TENSOR} --variant lmm",
            f"data-to-tensor data-2-zero-1 {TENSOR} {ZERO[3]}",
            f"heads-to-hidden tensor-2 {HIDDEN}",
            f"four-to-tensor tensor-2-data-2 {TENSOR}",
        ],
    ),
    (
        2,
        [
            f"tensor-to-data tensor-2 {ZERO[2]}",
            "lmm-tensor-to-data lmm-tensor-2 --variant lmm",
        ],
    ),
    (
        2,
        [
            f"context-2 - {CONTEXT}",
            f"hidden-to-context heads-to-hidden {CONTEXT}",
        ],
    ),
    (1, ["four-to-one tensor-2-data-2", "context-to-one context-2"]),
]
SAME_TENSOR, OTHER_TENSOR = 1e-6, 1e-4
PAIRS = {  # run that goes on: uninterrupted run, relative difference, what is said
    "1-to-3": ("data-2-zero-1", SAME_TENSOR, "ZeRO 1 -> 3"),
    "3-to-1": ("data-2-zero-3", SAME_TENSOR, "ZeRO 3 -> 1"),
    "2-to-0": ("data-2-zero-2", SAME_TENSOR, "ZeRO 2 -> 0"),
    "0-to-2": ("data-2-zero-0", SAME_TENSOR, "ZeRO 0 -> 2"),
    "bf16-1-to-3": ("bf16-zero-1", SAME_TENSOR, "ZeRO 1 -> 3"),
    "four-to-tensor": ("tensor-2-data-2", SAME_TENSOR, "data 2 -> 1"),
    "data-to-tensor": ("data-2-zero-1", OTHER_TENSOR, "tensor 1 -> 2, data 2 -> 1, ZeRO 1 -> 3"),
    "tensor-to-data": ("tensor-2", OTHER_TENSOR, "tensor 2 -> 1, data 1 -> 2, ZeRO 1 -> 2"),
    "lmm-tensor-to-data": ("lmm-tensor-2", OTHER_TENSOR, "tensor 2 -> 1, data 1 -> 2"),
    "four-to-one": ("tensor-2-data-2", OTHER_TENSOR, "tensor 2 -> 1, data 2 -> 1"),
}


@pytest.fixture(scope="module")
def trained(tiny_toml, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder with all runs, and what was printed before each run went on."""
    runs = tmp_path_factory.mktemp("runs")
    printed = {}
    for processes, jobs in STARTS:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        command = [sys.executable, *torchrun, "--rdzv-endpoint", "localhost:0", WORKER, str(tiny_toml), str(runs)]
        status, out, err = Job([*command, *jobs], runs).wait(timeout_seconds=1200)
        assert status == 0, out + err
        parts = out.split("done: held-out loss")
        printed |= {job.split()[0]: part for job, part in zip(jobs, parts, strict=False)}
    return runs, printed


def opened(run: Path, rank: int, folder: str) -> set[str]:
    """Files of a checkpoint's folder that a rank opened to go on."""
    names = (run / f"opened-by-{rank}").read_text().split()
    return {name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")}


@pytest.mark.parametrize("run", PAIRS)
def test_a_run_goes_on_at_another_layout_with_the_losses_of_the_uninterrupted_one(trained, run):
    runs, printed = trained
    whole, relative, said = PAIRS[run]
    found, expected = read_metrics(runs / run), read_metrics(runs / whole)[10:]
    assert [record["step"] for record in found] == list(range(11, 21))
    for quantity in ("loss", "grad_norm"):
        assert [r[quantity] for r in found] == pytest.approx([r[quantity] for r in expected], rel=relative)
    heldout, of_whole = (read_metrics(runs / name, "heldout")[-1]["loss"] for name in (run, whole))
    assert heldout == pytest.approx(of_whole, rel=relative)
    other_ranks = not said.startswith("ZeRO")
    assert f"layout: {said}\n" in printed[run]
    assert ("random states: begun anew" in printed[run]) == other_ranks
    assert f"{run}/checkpoints/step-00000010, after step 10" in printed[run]


def test_the_same_layout_goes_on_bitwise_and_says_so(trained):
    runs, printed = trained
    assert numbers(runs / "again") == numbers(runs / "data-2-zero-1")[10:]
    assert tensor_files(runs / "again") == tensor_files(runs / "data-2-zero-1")
    assert ", as then" in printed["again"]


def test_no_file_of_a_checkpoint_is_a_pickle(trained):
    runs, _ = trained
    files = [path for path in runs.glob("*/checkpoints/step-*/**/*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"weights", "optimizer", "random", "step-00000020"}
    for path in files:
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            with safe_open(path, "pt") as opened_file:
                assert opened_file.keys()


def test_a_rank_opens_the_files_it_needs_and_no_more(trained):
    runs, _ = trained
    for rank in range(2):
        assert opened(runs / "again", rank, "optimizer") == {f"tp-00-data-{rank:03d}.safetensors"}
        own = {f"tp-{rank:02d}-data-{data:03d}.safetensors" for data in range(2)}
        assert opened(runs / "four-to-tensor", rank, "optimizer") == own
        assert opened(runs / "four-to-tensor", rank, "weights") == {f"tp-{rank:02d}-of-02.safetensors"}


def test_what_all_data_ranks_hold_is_written_once(trained):
    runs, _ = trained
    folder = runs / "data-2-zero-0" / "checkpoints" / "step-00000010"
    assert [path.name for path in (folder / "optimizer").iterdir()] == ["tp-00-data-000.safetensors"]
    assert len(list((folder / "random").iterdir())) == 2


@pytest.fixture
def asked(trained, one_process, tmp_path):
    """A run of which one checkpoint is left, and the question where one process would go on."""
    run = shutil.copytree(trained[0] / "data-2-zero-1", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    config = load_run_config(run)
    return run, lambda: find_resume_point(config, open_data(config).fingerprint, run)


@pytest.mark.parametrize(("harm", "words"), [("delete", "is missing"), ("truncate", r"has \d+ bytes instead of \d+")])
def test_a_missing_or_truncated_optimizer_file_is_named_before_anything_is_loaded(asked, capsys, harm, words):
    run, ask = asked
    path = run / "checkpoints" / "step-00000010" / "optimizer" / "tp-00-data-001.safetensors"
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        ask()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"step-00000010 is damaged: optimizer/tp-00-data-001.safetensors {words}", line)
