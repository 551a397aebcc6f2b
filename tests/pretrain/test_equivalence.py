"""The same global batches give the same training, however they are shared out."""

import json
import sys
from pathlib import Path

import pytest

from .jobs import Job

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).with_name("curves_worker.py"))
RELATIVE = 1e-4

# Batches of 2, then of 4; rows of 8, 16 and 32 tokens: both change in the middle.
WARM = (
    "--train.micro-batch=1,--train.batch-warmup-from=2,--train.batch-warmup-tokens=500,"
    "--train.sequence-warmup-from=8,--train.sequence-warmup-tokens=1000"
)
LAYOUTS = {
    # processes, [name=settings]
    "one process": (
        1,
        [
            "plain=--train.micro-batch=4",
            "accumulated=--train.micro-batch=1",
            f"warm-plain={WARM},--train.micro-batch=2",
            f"warm-accumulated={WARM}",
        ],
    ),
    "tensor parallel 2": (2, ["tensor=--parallel.tensor=2"]),
    "data parallel 2": (
        2,
        [f"zero{stage}=--parallel.zero-stage={stage}" for stage in range(4)]
        + [f"warm-zero{stage}={WARM},--parallel.zero-stage={stage}" for stage in range(4)],
    ),
}


@pytest.fixture(scope="module")
def curves(tiny_toml, tmp_path_factory):
    """Losses, gradient norms and held-out loss of 20 steps, by layout; clipping acts on every step."""
    found = {}
    for processes, layouts in LAYOUTS.values():
        output = tmp_path_factory.mktemp("curves") / "curves.json"
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        clipped = [f"{layout},--optimizer.clip-norm=0.3" for layout in layouts]
        command = [sys.executable, *torchrun, "--rdzv-endpoint", "localhost:0", WORKER]
        status, out, err = Job([*command, str(tiny_toml), str(output), *clipped], output.parent).wait()
        assert status == 0, out + err
        found |= json.loads(output.read_text())
    return found


def test_the_reference_learns(curves):
    losses = curves["plain"]["loss"]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.2
    assert min(curves["plain"]["grad_norm"]) > 0.3


@pytest.mark.parametrize("layout", ["accumulated", "tensor", "zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("quantity", ["loss", "grad_norm", "heldout"])
def test_a_layout_trains_like_one_process(curves, layout, quantity):
    assert curves[layout][quantity] == pytest.approx(curves["plain"][quantity], rel=RELATIVE)


@pytest.mark.parametrize("layout", ["accumulated", "zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("quantity", ["loss", "grad_norm", "heldout"])
def test_a_layout_warms_up_like_one_process(curves, layout, quantity):
    assert curves[f"warm-{layout}"][quantity] == pytest.approx(curves["warm-plain"][quantity], rel=RELATIVE)
    assert curves["warm-plain"][quantity] != pytest.approx(curves["plain"][quantity], rel=RELATIVE)
