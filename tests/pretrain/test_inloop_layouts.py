"""Evaluations between steps leave a run as it is, bit for bit, and find the same at every layout."""

import json
import shutil
import sys

import pytest

from pretrain.report.records import read_records

from .jobs import ROOT, Job
from .test_resume import numbers, tensor_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

# Evaluations after step 3 and, because it is the last, 5; haystacks are read in pieces of 32 tokens.
EVALUATE = "--evaluate.every-steps 3"
EVALUATE += " --evaluate.probe-shortest 320 --evaluate.probe-length 320 --evaluate.probe-samples 3"
COMMON = f"--train.steps 5 --model.num-heads 4 --model.segment-length 8 --optimizer.clip-norm 0.3 {EVALUATE}"

TIED = "--model.tie-embeddings true"
# name: processes, variant, settings
LAYOUTS = {
    "one process": (1, "mac", ""),
    "one process, lmm": (1, "lmm", ""),
    "one process, mal": (1, "mal", ""),
    "one process, tied": (1, "mac", TIED),
    "one process, carried states": (1, "mac", "--data.carry-state true"),
    "data 2, ZeRO 3": (2, "mac", "--parallel.zero-stage 3"),
    "data 2, ZeRO 2, offloaded": (2, "mac", "--parallel.zero-stage 2 --parallel.offload-optimizer true"),
    "data 2, ZeRO 3, tied": (2, "mac", f"--parallel.zero-stage 3 {TIED}"),
    "tensor 2": (2, "mac", "--parallel.tensor 2"),
    "tensor 2, sequence, recomputed": (
        2,
        "mac",
        "--parallel.tensor 2 --parallel.sequence true --train.recompute block",
    ),
    "tensor 2, hidden, lmm": (2, "lmm", "--parallel.tensor 2 --parallel.memory-parallel hidden"),
    "context 2": (2, "mac", "--parallel.context 2"),
    "context 2, mal": (2, "mal", "--parallel.context 2 --parallel.zero-stage 2"),
    "context 2 x tensor 2, sequence": (
        4,
        "mac",
        "--parallel.context 2 --parallel.tensor 2 --parallel.sequence true",
    ),
}
# The same model in one process.
REFERENCES = {
    name: "one process" + (", tied" if TIED in settings else "" if variant == "mac" else f", {variant}")
    for name, (processes, variant, settings) in LAYOUTS.items()
    if processes > 1
}


@pytest.fixture(scope="module")
def runs(worded_toml, tmp_path_factory):
    """By layout what a run found out without evaluations, and with them."""
    found = {}
    for world in sorted({processes for processes, _, _ in LAYOUTS.values()}):
        output = tmp_path_factory.mktemp("evaluated") / "found.json"
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--rdzv-backend", "c10d"]
        jobs = [
            f"{name}: --variant {variant} {COMMON} {settings}"
            for name, (processes, variant, settings) in LAYOUTS.items()
            if processes == world
        ]
        worker = ["--rdzv-endpoint", "localhost:0", "-m", "tests.pretrain.inloop_worker", str(worded_toml), str(output)]
        status, out, err = Job([sys.executable, *torchrun, *worker, *jobs], ROOT).wait(timeout_seconds=1200)
        assert status == 0, out + err
        found |= json.loads(output.read_text())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_with_evaluations_is_the_run_without_bit_for_bit(runs, layout):
    without, evaluated = runs[layout]
    assert len(without["steps"]) == 5
    assert list(evaluated["records"]) == ["3", "5"]
    for quantity in ("steps", "random", "counted"):
        assert evaluated[quantity] == without[quantity], quantity


@pytest.mark.parametrize("layout", REFERENCES)
def test_evaluations_find_the_same_at_every_layout(runs, layout):
    mine, right = runs[layout][1]["records"], runs[REFERENCES[layout]][1]["records"]
    for step, records in right.items():
        assert [kind for kind, _ in records] == ["heldout", "position_loss", "probe"]
        for (_, expected), (kind, values) in zip(records, mine[step], strict=True):
            assert values.keys() == expected.keys()
            for name in set(expected) - {"seconds", "name"}:
                assert values[name] == pytest.approx(expected[name], rel=1e-4), (step, kind, name)


def test_evaluations_see_that_the_model_has_learned(runs):
    records = runs["one process"][1]["records"]
    for place in range(3):
        before, after = (records[step][place][1] for step in ("3", "5"))
        name = "answer_loss" if "answer_loss" in before else "loss"
        # Two steps move the answer's loss by 5e-4; layouts, see above, none by 1e-4.
        assert after[name] != pytest.approx(before[name], rel=1e-4)
    assert records["5"][0][1]["loss"] < records["3"][0][1]["loss"]


@pytest.mark.parametrize("settings", [["--parallel.tensor", "2"], ["--parallel.zero-stage", "3"]], ids=" ".join)
def test_a_resumed_run_evaluates_at_the_same_places_and_ends_like_one_without(worded_toml, tmp_path, settings):
    script = ["bash", str(ROOT / "launch" / "torchrun.sh"), "--config", str(worded_toml), "--nproc", "2"]
    steps = ["--train.steps", "5", "--checkpoint.every-steps", "4", *settings]

    def run(name, *more):
        status, _, err = Job([*script, "--run-dir", str(tmp_path / name), *steps, *more], tmp_path).wait()
        assert status == 0, err
        return tmp_path / name

    evaluated = run("evaluated", *EVALUATE.split())
    shutil.copytree(evaluated, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000005")
    resumed = run("resumed", *EVALUATE.split())
    assert evaluations_of(resumed) == evaluations_of(evaluated)
    assert [step for step, _, name, _ in evaluations_of(evaluated) if name == "niah_single_1"] == [3, 5]
    assert numbers(resumed) == numbers(evaluated)
    assert tensor_files(resumed) == tensor_files(run("without"))
    assert {"heldout", "niah_single_1"} < {name for _, _, name, _ in evaluations_of(resumed)}


def evaluations_of(run_dir):
    """Step, kind, name and values of every record of an evaluation, without what depends on the time."""
    lists = ("tokens", "loss", "lengths", "accuracy", "answer_loss")
    return [
        (record["step"], record["kind"], record.get("name"), [record.get(name) for name in lists])
        for record in read_records(run_dir)
        if record["kind"] in ("heldout", "position_loss", "probe")
    ]
