"""The kernels compile to machine code for a GPU. That takes no GPU, only a Triton that does not interpret."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# Six kernels of a model's size take a core a minute, and many times that on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
LAUNCHED = ["walk", "reads", "reads_backward", "chain_backward", "rest_backward", "anchors_backward"]
SMALL = {"batch": 1, "length": 32, "heads": 1, "width": 16, "hidden": 64}
MODELS = {**SMALL, "width": 64, "hidden": 256}  # the memory of every size
_CHANGES = ("TRITON_INTERPRET", "DISABLE_MMA_V3")  # what is compiled
PLAIN = {"network": "plain", "rule": "literal"}
# Of the memory of every size with tokens in bfloat16, as Triton 3.6.0's ptxas says: registers of a thread, and bytes
# that it has no register for, stored and loaded. A change that moves them is looked at, and written here.
PTXAS = {
    "walk": (255, 72, 88),
    "reads": (208, 0, 0),
    "reads_backward": (255, 128, 128),
    "chain_backward": (255, 184, 184),
    "rest_backward": (255, 92, 84),
    "anchors_backward": (138, 0, 0),
}
# Barriers that a chunk of one memory waits at, and bytes spilled, where chunk follows upon chunk; and what they were of
# a chunk's way forth and back while reads, and gradients that nobody waits for, were in the same loops.
CHAINS = {"walk": (271, 26_624), "chain_backward": (269, 79_872)}
TOGETHER = (701 + 561 + 1204, 129_024 + 13_312 + 673_280)


def compiled(
    dtype: str,
    *scans: dict[str, Any],
    documents: bool = False,
    guarded: bool = False,
    batches: Sequence[tuple[int, int]] = (),
) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name not in _CHANGES}
    asked = {"dtype": dtype, "documents": documents, "guarded": guarded, "scans": scans, "batches": batches}
    command = [sys.executable, "-m", "tests.kernels.compile_kernel", json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("dtype", "sizes", "documents"),
    [
        ("bfloat16", MODELS, True),
        ("bfloat16", {**MODELS, "depth": 1, "hidden": 0}, True),  # the state in registers
        ("float32", {**SMALL, "hidden": 16}, False),
        ("float32", {**SMALL, **PLAIN}, False),  # all left out that may be
    ],
    ids=str,
)
def test_kernels_compile_for_hopper(dtype: str, sizes: dict[str, Any], documents: bool) -> None:
    found = compiled(dtype, sizes, documents=documents)
    assert [kernel["kernel"] for kernel in found] == LAUNCHED[: -1 if sizes.get("rule") == "literal" else None]
    assert all(kernel["bytes"] > 0 for kernel in found)


def test_registers_and_what_they_do_not_hold_are_the_recorded_ones() -> None:
    found = compiled("bfloat16", MODELS)
    assert [kernel["kernel"] for kernel in found] == LAUNCHED
    if (version := importlib.metadata.version("triton")) != "3.6.0":
        pytest.skip(f"recorded with Triton 3.6.0, and this is {version}")
    measured = {k["kernel"]: (k["registers"], k["spill_stores"], k["spill_loads"]) for k in found}
    assert measured == PTXAS
    chains = {k["kernel"]: (k["waits"], k["spilled"]) for k in found if k["kernel"] in CHAINS}
    assert chains == CHAINS
    forth_and_back = [2 * walk + chain for walk, chain in zip(*chains.values(), strict=True)]
    assert all(3 * now <= before for now, before in zip(forth_and_back, TOGETHER, strict=True))


def test_training_compiles_every_kernel_once() -> None:
    """Persistent tokens, rows that end inside a chunk, batches of one row and of two, documents and none."""
    found = compiled("bfloat16", batches=[(1, 128), (2, 256), (2, 200)])
    assert sorted(kernel["kernel"] for kernel in found) == sorted(LAUNCHED)


def test_a_kernel_is_compiled_once_whatever_comes() -> None:
    """Rows of one chunk and of sixteen, groups of one and of several, one memory and many."""
    scans = [{**SMALL, "length": 16}, {**SMALL, "length": 256}, {**SMALL, "batch": 2, "heads": 8, "length": 112}]
    found = compiled("bfloat16", *scans)
    assert sorted(kernel["kernel"] for kernel in found) == sorted(LAUNCHED)
    assert any(kernel["wgmma"] for kernel in found)


def test_what_helps_against_wrong_code_leaves_no_wgmma() -> None:
    assert not any(kernel["wgmma"] for kernel in compiled("bfloat16", SMALL, guarded=True))
