"""Ranks that share the rows of linear recurrences work on them at the same time, and are one process: float64."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ..pretrain.jobs import ROOT, Job
from .composed_worker import LAYOUTS, LINEAR, VARIANTS

CLOSE = 1e-10
TAILS = {name: 2 if name == "mamba2" else int(name != "retnet") for name in LINEAR}  # messages of convolutions


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("composed") / "found.json"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "4", "--rdzv-backend", "c10d"]
    worker = ["--rdzv-endpoint", "localhost:0", "-m", "tests.parallel.composed_worker", str(output)]
    status, out, err = Job([sys.executable, *torchrun, *worker], Path(ROOT)).wait(timeout_seconds=600)
    assert status == 0, out + err
    return json.loads(output.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_share_rows_are_one_process(found: Any, layout: tuple[int, int, str]) -> None:
    """Logits, losses, states, all gradients: of documents over borders and beside them, padding, rows that go on."""
    words = " ".join(map(str, layout))
    checked = {key: errors for key, errors in found["errors"].items() if key.split(" | ")[1] == words}
    variants, some = LAYOUTS[layout]
    assert len(checked) == len(variants) * (len(some) or 6) - (not some and variants == VARIANTS)
    for case, errors in checked.items():
        name = max(errors, key=lambda name: errors[name])
        assert errors[name] < CLOSE, f"{case}: {name} differs by {errors[name]:.1e}"


@pytest.mark.parametrize("variant", LINEAR)
def test_tokens_are_scanned_before_the_state_in_front_has_come(found: Any, variant: str) -> None:
    """The worker has run a pass, too, in which the first rank kept its states until all had scanned their tokens."""
    forward = ["send right", "take left"] * TAILS[variant] + ["scan", "take left", "send right"]
    backward = ["take right", "send left", "scan"] + ["send left", "take right"] * TAILS[variant]
    layers = [*forward, *forward, *backward, *backward]
    once = [word for word, _ in itertools.groupby(layers)]
    assert found["order"][variant][1] == once
    assert found["order"][variant][2] == once
