"""The wavefront's arithmetic against a step of four processes on gloo, given the times that this step took.

Four processes share two cores, so that a layer takes longer when more ranks are at work: the times come from the trace
itself, and what is compared is the order of things and how long the ranks wait.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.planning.wavefront import BACKWARD, FORWARD, Task, Wavefront, Work, simulate

from .jobs import Job

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
# Largest distance of a rank's idle share, of the step's time (relative), and of a task's start from when all that it
# needs was there (over the step). In between lie messages, of which the arithmetic is given none, and waking up.
TOLERANCE = 0.15


class Trace:
    """What the processes noted, as tasks and as times to simulate."""

    def __init__(self, ranks: list[dict[str, Any]]) -> None:
        zero = min(rank["began"] for rank in ranks)
        self.tasks: list[Task] = []
        self.work: list[list[Work]] = [[] for _ in range(MICRO_BATCHES)]
        self.leaves: dict[tuple, float] = {}
        for rank, found in enumerate(ranks):
            free, notes = 0.0, [(what, layer, seconds - zero) for what, layer, seconds in found["notes"]]
            size = len(notes) // MICRO_BATCHES
            for micro_batch in range(MICRO_BATCHES):
                part = {(what, layer): s for what, layer, s in notes[micro_batch * size : (micro_batch + 1) * size]}
                free = self._add(micro_batch, rank, part, free)
        self.seconds = max(task.end for task in self.tasks)

    def _add(self, micro_batch: int, rank: int, at: dict[tuple[str, int], float], free: float) -> float:
        """One rank's micro-batch; when the rank was free after it."""
        last, forward, backward = LAYERS - 1, [], []
        for layer in range(LAYERS):
            begin, end = at["forward begins", layer], at["forward ends", layer]
            self.tasks.append(Task(micro_batch, rank, FORWARD, layer, begin, end))
            forward.append(end - begin)
            begin = at["backward begins", layer]
            end = at["backward free", layer - 1] if layer else at["backward ends", 0]
            self.tasks.append(Task(micro_batch, rank, BACKWARD, layer, begin, end))
            backward.append(end - begin)
            for direction in (FORWARD, BACKWARD):
                if (f"{direction} leaves", layer) in at:
                    self.leaves[micro_batch, rank, direction, layer] = at[f"{direction} leaves", layer]
        # Only the first rank's first layer does not wait: the time until then is the embedding's and the loop's.
        before = at["forward begins", 0] - free if rank == 0 else 0.0
        head = at["backward free", last] - at["forward ends", last]
        self.work[micro_batch].append(Work(forward, backward, before, head))
        return at["backward ends", 0]

    def idle_shares(self) -> list[float]:
        """Share of the step that each rank was not at work."""
        return [1 - sum(work[rank].seconds for work in self.work) / self.seconds for rank in range(len(self.work[0]))]

    def latenesses(self) -> dict[Task, float]:
        """How long after all that it needs was there each task began, beside the first one."""
        ends = {task[:4]: task.end for task in self.tasks}
        needs = {task: [x for x in self.needs(task) if x in ends] for task in self.tasks}
        return {task: task.start - max(ends[x] for x in needed) for task, needed in needs.items() if needed}

    @staticmethod
    def needs(task: Task) -> tuple[tuple, tuple]:
        """The rank's own task and its neighbour's that come before."""
        step = 1 if task.direction == FORWARD else -1
        return (*task[:3], task.layer - step), (task.micro_batch, task.rank - step, *task[2:4])


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


@pytest.fixture(scope="module")
def simulated(trace: Trace) -> Wavefront:
    return simulate(trace.work)


def test_every_rank_does_its_tasks_in_the_simulated_order(trace, simulated):
    def order(tasks: list[Task], rank: int) -> list[tuple]:
        return [task[:4] for task in sorted(tasks, key=lambda task: task.start) if task.rank == rank]

    for rank in range(RANKS):
        assert order(trace.tasks, rank) == order(simulated.tasks, rank)


def test_a_task_waits_for_its_neighbours_message_and_for_nothing_else(trace, record_property):
    begins = {task[:4]: task.start for task in trace.tasks}
    for task in trace.tasks:
        _, neighbour = trace.needs(task)
        assert (neighbour in begins) == (neighbour in trace.leaves)
        if neighbour in begins:
            assert task.start > trace.leaves[neighbour]
    latest = max(trace.latenesses().values()) / trace.seconds
    record_property("largest lateness over the step", latest)
    assert latest < TOLERANCE


def test_idle_shares_and_time_are_the_simulated_ones(trace, simulated, record_property):
    pairs = list(zip(trace.idle_shares(), simulated.idle_shares, strict=True))
    record_property("idle shares, traced and simulated", pairs)
    record_property("seconds, traced and simulated", (trace.seconds, simulated.seconds))
    assert simulated.seconds == pytest.approx(trace.seconds, rel=TOLERANCE)
    for traced, expected in pairs:
        assert traced == pytest.approx(expected, abs=TOLERANCE)
