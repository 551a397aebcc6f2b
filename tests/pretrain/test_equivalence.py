"""The same global batches give the same training, however model, tokens and samples are shared out."""

import json
import sys

import pytest

from titans_mcore.mixers import MIXERS

from .jobs import ROOT, Job

# One fixture trains for all tests: it may take its time where other tests share the cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

# A gradient's norm feels rounding more than a loss does: in one of the 20 steps of one variant by 1e-4. In float64 all
# gradients are equal to 1e-9 (tests/parallel/test_layouts.py).
RELATIVE = {"loss": 1e-4, "grad_norm": 1e-3, "heldout": 1e-4}
MODEL = "--model.num-heads 4 --model.segment-length 8"

# Every mixer with a memory or attention, and some that take turns, among them every linear recurrence and TTT.
VARIANTS = {
    **{name: "" for name, mixer in MIXERS.items() if mixer.memory or mixer.attention},
    "lmm+transformer": "--model.num-layers 2",
    "mamba2+gated_deltanet": "--model.num-layers 2",
    "mamba+retnet+deltanet": "--model.num-layers 3",
    "ttt_linear+ttt_mlp": "--model.num-layers 2",
}
# name: processes, settings. Every way to divide and every ZeRO stage meets every variant.
LAYOUTS = {
    "one process": (1, "--train.micro-batch 4"),
    "accumulated": (1, "--train.micro-batch 1"),
    "data 2, ZeRO 0": (2, "--parallel.zero-stage 0"),
    "data 2, ZeRO 2": (2, "--parallel.zero-stage 2"),
    "data 2, ZeRO 3": (2, "--parallel.zero-stage 3"),
    "tensor 2": (2, "--parallel.tensor 2"),
    "tensor 2, sequence, recomputed": (
        2,
        "--parallel.tensor 2 --parallel.sequence true --train.recompute except_memory --train.loss-chunk 20",
    ),
    "tensor 2 x data 2, ZeRO 3": (
        4,
        "--parallel.tensor 2 --parallel.zero-stage 3 --train.recompute block --train.loss-chunk 24",
    ),
    "tensor 2, hidden, ZeRO 2": (2, "--parallel.tensor 2 --parallel.memory-parallel hidden --parallel.zero-stage 2"),
    "tensor 4": (4, "--parallel.tensor 4"),
    "tensor 4, hidden": (4, "--parallel.tensor 4 --parallel.memory-parallel hidden"),
    "context 2": (2, "--parallel.context 2"),
    "context 2, ZeRO 2": (2, "--parallel.context 2 --parallel.zero-stage 2"),
    "context 2, in flight": (2, "--parallel.context 2 --train.micro-batch 1 --parallel.in-flight 3"),
    "context 2, in flight, ZeRO 2": (
        2,
        "--parallel.context 2 --train.micro-batch 1 --parallel.in-flight 4 --parallel.zero-stage 2 "
        "--train.recompute block",
    ),
    "context 2 x data 2, ZeRO 2, offloaded": (
        4,
        "--parallel.context 2 --parallel.zero-stage 2 --parallel.offload-optimizer true",
    ),
    "context 2 x tensor 2, sequence": (4, "--parallel.context 2 --parallel.tensor 2 --parallel.sequence true"),
    "context 4": (4, "--parallel.context 4"),
    "context 4, in flight": (4, "--parallel.context 4 --train.micro-batch 1 --parallel.in-flight 4"),
}
# Batches of 2, then of 4; rows of 8, 16 and 32 tokens: both change in the middle. For one variant.
WARM = (
    "--train.batch-warmup-from 2 --train.batch-warmup-tokens 500 "
    "--train.sequence-warmup-from 8 --train.sequence-warmup-tokens 1000"
)
WARMED = {
    "warm, one process": (1, "--train.micro-batch 2"),
    "warm, accumulated": (1, "--train.micro-batch 1"),
    **{
        f"warm, data 2, ZeRO {stage}": (2, f"--train.micro-batch 1 --parallel.zero-stage {stage}") for stage in range(4)
    },
}


@pytest.fixture(scope="module")
def curves(tiny_toml, tmp_path_factory):
    """Losses, gradient norms and held-out loss of 20 steps, by variant and layout; clipping acts on every step."""
    found = {}
    for world in sorted({processes for processes, _ in LAYOUTS.values()}):
        output = tmp_path_factory.mktemp("curves") / "curves.json"
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--rdzv-backend", "c10d"]
        runs = [
            f"{variant} {name}: --variant {variant} {MODEL} {own} --optimizer.clip-norm 0.3 {settings}"
            for name, (processes, settings) in LAYOUTS.items()
            for variant, own in VARIANTS.items()
            if processes == world
        ]
        runs += [
            f"{name}: {MODEL} --optimizer.clip-norm 0.3 {WARM} {settings}"
            for name, (processes, settings) in WARMED.items()
            if processes == world
        ]
        worker = ["--rdzv-endpoint", "localhost:0", "-m", "tests.pretrain.curves_worker"]
        command = [sys.executable, *torchrun, *worker, str(tiny_toml), str(output), *runs]
        status, out, err = Job(command, ROOT).wait(timeout_seconds=1200)
        assert status == 0, out + err
        found |= json.loads(output.read_text())
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_learns(curves, variant):
    losses = curves[f"{variant} one process"]["loss"]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.2
    assert min(curves[f"{variant} one process"]["grad_norm"]) > 0.3


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layout_trains_like_one_process(curves, variant, layout):
    for quantity, relative in RELATIVE.items():
        right = curves[f"{variant} one process"][quantity]
        assert curves[f"{variant} {layout}"][quantity] == pytest.approx(right, rel=relative), quantity


@pytest.mark.parametrize("layout", [name for name in WARMED if name != "warm, one process"])
def test_a_layout_warms_up_like_one_process(curves, layout):
    for quantity, relative in RELATIVE.items():
        right = curves["warm, one process"][quantity]
        assert curves[layout][quantity] == pytest.approx(right, rel=relative), quantity
        assert right != pytest.approx(curves["mac one process"][quantity], rel=relative)
