"""The wavefront's arithmetic against a step of four processes on gloo: what each rank does in which order, and for what
it waits. How long it waits is the machine's business and is not compared.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .jobs import Job
from .wavefront import BACKWARD, FORWARD, Task, Work, simulate

pytestmark = pytest.mark.slow

LAYERS, RANKS, MICRO_BATCHES = 6, 4, 2
SMALL = f"""
[model]
variant = "mag"
num_layers = {LAYERS}
dim = 64
num_heads = 2
ffn_dim = 128
memory_expansion = 2
chunk_size = 16
vocab_size = 1000
persistent_tokens = 4
window = 64
[train]
sequence_length = 1024
global_batch = {MICRO_BATCHES}
micro_batch = 1
precision = "fp32"
[parallel]
context = {RANKS}
"""


class Trace:
    """What the processes noted, as tasks, and when messages left."""

    def __init__(self, ranks: list[dict[str, Any]]) -> None:
        self.tasks: list[Task] = []
        self.leaves: dict[tuple, float] = {}
        for rank, found in enumerate(ranks):
            size = len(found["notes"]) // MICRO_BATCHES
            for micro_batch in range(MICRO_BATCHES):
                notes = found["notes"][micro_batch * size : (micro_batch + 1) * size]
                self._add(micro_batch, rank, {(what, layer): seconds for what, layer, seconds in notes})

    def _add(self, micro_batch: int, rank: int, at: dict[tuple[str, int], float]) -> None:
        for layer in range(LAYERS):
            self.tasks.append(
                Task(micro_batch, rank, FORWARD, layer, at["forward begins", layer], at["forward ends", layer])
            )
            end = at["backward free", layer - 1] if layer else at["backward ends", 0]
            self.tasks.append(Task(micro_batch, rank, BACKWARD, layer, at["backward begins", layer], end))
            for direction in (FORWARD, BACKWARD):
                if (f"{direction} leaves", layer) in at:
                    self.leaves[micro_batch, rank, direction, layer] = at[f"{direction} leaves", layer]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("wavefront")
    (folder / "small.toml").write_text(SMALL)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--rdzv-backend", "c10d"]
    module = ["--rdzv-endpoint", "localhost:0", "-m", "tests.pretrain.wavefront_worker"]
    files = [str(folder / "small.toml"), str(folder / "trace.json")]
    status, out, err = Job([sys.executable, *torchrun, *module, *files], folder).wait()
    assert status == 0, out + err
    return Trace(json.loads(Path(files[1]).read_text()))


def test_every_rank_does_its_tasks_in_the_simulated_order(trace):
    simulated = simulate([[Work([1.0] * LAYERS, [2.0] * LAYERS)] * RANKS] * MICRO_BATCHES)

    def order(tasks: list[Task], rank: int) -> list[tuple]:
        return [task[:4] for task in sorted(tasks, key=lambda task: task.start) if task.rank == rank]

    for rank in range(RANKS):
        assert order(trace.tasks, rank) == order(simulated.tasks, rank)


def test_a_task_begins_when_its_neighbours_message_has_left(trace):
    begins = {task[:4] for task in trace.tasks}
    for task in trace.tasks:
        step = 1 if task.direction == FORWARD else -1
        neighbour = (task.micro_batch, task.rank - step, task.direction, task.layer)
        assert (neighbour in begins) == (neighbour in trace.leaves)
        if neighbour in begins:
            assert task.start > trace.leaves[neighbour]
