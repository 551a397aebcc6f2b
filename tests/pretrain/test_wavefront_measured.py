"""The wavefront's arithmetic against a step of four processes on gloo: what each rank does in which order, and for what
it waits. How long it waits is the machine's business and is not compared.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .jobs import Job
from .wavefront import BACKWARD, FORWARD, Computation, Work, simulate

pytestmark = pytest.mark.slow

LAYERS, RANKS, MICRO_BATCHES = 6, 4, 4
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
in_flight = {{in_flight}}
"""


class Trace:
    """What the processes noted.

    Attributes:
        in_flight: Forward passes before the first backward pass.
        computations: In wall-clock seconds.
        leaves: When a task's message left.
        work: CPU seconds of each micro-batch and rank.
    """

    def __init__(self, ranks: list[dict[str, Any]], in_flight: int) -> None:
        self.in_flight = in_flight
        self.computations: list[Computation] = []
        self.leaves: dict[tuple, float] = {}
        self.work: list[list[Work]] = [[] for _ in range(MICRO_BATCHES)]
        for rank, found in enumerate(ranks):
            # Passes of one direction go in the order of micro-batches. What is noted twice counts the last time.
            passes: list[dict[tuple[str, int], tuple[float, float]]] = [{} for _ in range(MICRO_BATCHES)]
            done = {FORWARD: 0, BACKWARD: 0}
            for what, layer, *at in found["notes"]:
                direction = what.split()[0]
                passes[done[direction]][what, layer] = at
                done[direction] += (what, layer) in (("forward ends", LAYERS - 1), ("backward ends", 0))
            for micro_batch, notes in enumerate(passes):
                self._add(micro_batch, rank, notes)

    def _add(self, micro_batch: int, rank: int, at: dict[tuple[str, int], tuple[float, float]]) -> None:
        seconds: dict[str, list[float]] = {FORWARD: [], BACKWARD: []}
        for layer in range(LAYERS):
            after = at["backward free", layer - 1] if layer else at["backward ends", 0]
            for direction, end in (FORWARD, at["forward ends", layer]), (BACKWARD, after):
                begin = at[f"{direction} begins", layer]
                self.computations.append(Computation(micro_batch, rank, direction, layer, begin[0], end[0]))
                seconds[direction].append(end[1] - begin[1])
                if (f"{direction} leaves", layer) in at:
                    self.leaves[micro_batch, rank, direction, layer] = at[f"{direction} leaves", layer][0]
        self.work[micro_batch].append(Work(seconds[FORWARD], seconds[BACKWARD]))


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{}_in_flight".format)
def trace(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Trace:
    folder = tmp_path_factory.mktemp("wavefront")
    (folder / "small.toml").write_text(SMALL.format(in_flight=request.param))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--rdzv-backend", "c10d"]
    module = ["--rdzv-endpoint", "localhost:0", "-m", "tests.pretrain.wavefront_worker"]
    files = [str(folder / "small.toml"), str(folder / "trace.json")]
    status, out, err = Job([sys.executable, *torchrun, *module, *files], folder).wait()
    assert status == 0, out + err
    return Trace(json.loads(Path(files[1]).read_text()), request.param)


def test_every_rank_does_its_tasks_in_the_simulated_order(trace):
    simulated = simulate([[Work([1.0] * LAYERS, [2.0] * LAYERS)] * RANKS] * MICRO_BATCHES, in_flight=trace.in_flight)

    def order(computations: list[Computation], rank: int) -> list[tuple]:
        return [task[:4] for task in sorted(computations, key=lambda task: task.start) if task.rank == rank]

    for rank in range(RANKS):
        assert order(trace.computations, rank) == order(simulated.computations, rank)


def test_a_task_begins_when_its_neighbours_message_has_left(trace):
    begins = {task[:4] for task in trace.computations}
    for task in trace.computations:
        step = 1 if task.direction == FORWARD else -1
        neighbour = (task.micro_batch, task.rank - step, task.direction, task.layer)
        assert (neighbour in begins) == (neighbour in trace.leaves)
        if neighbour in begins:
            assert task.start > trace.leaves[neighbour]


def test_more_in_flight_wait_less_by_the_seconds_that_the_tasks_computed(trace):
    """With a core for each rank: two cores cannot show it by the clock."""
    alone, together = simulate(trace.work), simulate(trace.work, in_flight=trace.in_flight)
    print(f"efficiency {alone.efficiency:.3f}, {trace.in_flight} in flight {together.efficiency:.3f}")
    assert (together.efficiency > alone.efficiency) == (trace.in_flight > 1)
