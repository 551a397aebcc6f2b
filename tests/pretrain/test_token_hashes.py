"""Every layout, and a restart with another one, sees the same global batches: hashes of tokens, in real processes."""

import json
import sys
from pathlib import Path

import pytest

from pretrain.config.command_line import parse

from .batches_worker import hashes
from .jobs import Job
from .tiny_shards import write_shards

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).with_name("batches_worker.py"))
STEPS, RESTART = 9, 5
BATCH = "--train.global-batch 16 --train.micro-batch 2"
WARM_UPS = (
    "--train.batch-warmup-from 8 --train.batch-warmup-tokens 900 "
    "--train.sequence-warmup-from 8 --train.sequence-warmup-tokens 2500"
)
# name: processes, tensor ranks, context ranks, first step; each reads to the last one, a restart saw nothing before.
LAYOUTS = {
    "data-2": (2, 1, 1, 0),
    "restart-with-2": (2, 1, 1, RESTART),
    "tensor-2": (2, 2, 1, 0),
    "context-2": (2, 1, 2, 0),
    "data-4": (4, 1, 1, 0),
    "restart-with-4": (4, 1, 1, RESTART),
    "tensor-2-data-2": (4, 2, 1, 0),
    "context-2-tensor-2": (4, 2, 2, 0),
    "context-2-data-2": (4, 1, 2, 0),
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The settings of two runs: one folder, and a blend under both warm-ups."""
    first = write_shards(tmp_path_factory.mktemp("first"), documents=15)
    second = write_shards(tmp_path_factory.mktemp("second"), documents=9, seed=5, train_shards=2)
    blend = f"--data.blend {first}=0.7 {second}=0.3"
    return {"folder": f"{BATCH} --data.path {first}", "blend": f"{BATCH} {WARM_UPS} {blend}"}


@pytest.fixture(scope="module")
def tiny(tiny_toml, tmp_path_factory):
    """The tiny configuration without data."""
    toml = tmp_path_factory.mktemp("config") / "tiny.toml"
    toml.write_text("\n".join(line for line in tiny_toml.read_text().splitlines() if not line.startswith("path")))
    return toml


@pytest.fixture(scope="module")
def found(tiny, flags, tmp_path_factory):
    """Hashes by step for each run and layout; the processes of one number start once."""
    seen = {}
    for processes in (2, 4):
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        cases = [
            f"{run}/{name} {tensor} {context} {first} {STEPS} {words}"
            for run, words in flags.items()
            for name, (count, tensor, context, first) in LAYOUTS.items()
            if count == processes
        ]
        command = [sys.executable, *torchrun, "--rdzv-endpoint", "localhost:0", WORKER]
        status, out, err = Job([*command, str(tiny), str(folder), str(folder / "out.json"), *cases], folder).wait()
        assert status == 0, out + err
        seen |= json.loads((folder / "out.json").read_text())
    return seen


@pytest.fixture(scope="module")
def reference(tiny, flags, one_process, tmp_path_factory):
    """The hashes of one process."""
    folder, seen = tmp_path_factory.mktemp("one"), {}
    for run, words in flags.items():
        config = parse(["--config", str(tiny), "--run-dir", str(folder), *words.split()]).config
        seen[run] = hashes(config, one_process, folder, 0, STEPS)
        assert len(set(seen[run].values())) == STEPS
    return seen


@pytest.mark.parametrize("run", ["folder", "blend"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_and_a_restart_with_another_one_see_the_global_batches_of_one_process(found, reference, run, layout):
    first = LAYOUTS[layout][3]
    assert found[f"{run}/{layout}"] == {str(step): reference[run][step] for step in range(first, STEPS)}


def test_the_steps_pass_the_end_of_an_epoch_and_restarts_come_in_the_middle_of_one(flags, tiny, one_process, tmp_path):
    from pretrain.data.folders import open_data, open_samples

    config = parse(["--config", str(tiny), "--run-dir", str(tmp_path), *flags["folder"].split()]).config
    samples, _ = open_samples(config, open_data(config), tmp_path)
    assert samples.per_epoch < 16 * STEPS
    assert 0 < 16 * RESTART % samples.per_epoch < samples.per_epoch - 16
