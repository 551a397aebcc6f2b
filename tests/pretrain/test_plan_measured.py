"""What `pretrain.plan` says against real runs on gloo: tensors walked, collectives counted, checkpoints
weighed.

Run as a module under torchrun it is the worker of these tests:

    python -m tests.pretrain.test_plan_measured CONFIG.toml OUTPUT.json "SETTINGS" ...

trains some layouts one after the other and writes, for each, what rank 0 held and sent in one step and what all wrote.
"""

import gc
import json
import resource
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain import plan
from pretrain.checkpoint import save
from pretrain.command_line import parse
from pretrain.data import MicroBatch
from pretrain.engine import build_engine, build_model, train_step
from titans_mcore.parallel import DeepSpeedGroups, start, stop

from .jobs import Job

pytestmark = pytest.mark.slow

# Small, and yet its parameters are nearly all that an engine holds.
SMALL = """
[model]
variant = "mac"
num_layers = 2
dim = 128
num_heads = 4
ffn_dim = 256
chunk_size = 8
vocab_size = 1000
persistent_tokens = 4
segment_length = 32
window = 32
[train]
sequence_length = 64
global_batch = 4
micro_batch = 1
precision = "fp32"
"""
TENSOR = [f"--parallel.tensor 2 --model.variant {variant}" for variant in ("mac", "mal", "mag")]
DATA = [
    *(f"--parallel.zero-stage {stage}" for stage in range(4)),
    *(f"--parallel.zero-stage {stage} --train.precision bf16" for stage in (1, 3)),
]
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce", "all_gather")
TINY_BYTES = 100  # losses and norms: a few numbers


class Counted:
    """Counts torch.distributed's collectives while it is on: calls and bytes of those that move more than numbers."""

    def __init__(self) -> None:
        self.on, self.calls, self.bytes = False, Counter(), Counter()
        groups = DeepSpeedGroups()
        self.names = {
            groups.get_tensor_model_parallel_group(): "tensor",
            groups.get_data_parallel_group(): "data",
        }
        for name in COLLECTIVES:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name, function):
        def counted(*arguments, **named):
            group = named.get("group") or next((x for x in arguments if isinstance(x, dist.ProcessGroup)), None)
            tensors = [x for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor)]
            size = max((x.numel() * x.element_size() for x in tensors), default=0)
            if self.on and size > TINY_BYTES and group is not None and group.size() > 1:
                key = f"{self.names.get(group, 'other')} {name.removesuffix('_into_tensor').removesuffix('_tensor')}"
                self.calls[key] += 1
                self.bytes[key] += size
            return function(*arguments, **named)

        return counted


def storages() -> dict[int, tuple[int, torch.Tensor]]:
    """Bytes of every storage that a tensor of this process lies in, and the tensor, which keeps it alive."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"]
    tensors += [x.grad for x in tensors if type(x) is torch.nn.Parameter and x.grad is not None]
    return {x.untyped_storage().data_ptr(): (x.untyped_storage().nbytes(), x.detach()) for x in tensors}


def bytes_held(engine) -> int:
    """Bytes of all tensors but buckets and the parameters that ZeRO 3 has gathered for a while."""
    left_out = {
        x.untyped_storage().data_ptr()
        for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values()
        for x in (bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer])
        if x is not None
    }
    if engine.zero_optimization_stage() == 3:
        left_out |= {p.data.untyped_storage().data_ptr() for p in engine.module.parameters()}
    return sum(size for place, (size, _) in storages().items() if place not in left_out)


def measure(config, groups, counted: Counted, folder: Path) -> dict:
    torch.manual_seed(1)
    idle = storages()  # of layouts before this one, alive until the end
    engine = build_engine(build_model(config, groups), config, groups.dp.size())
    rows, length = config.train.micro_batch, config.train.sequence_length

    def micro_batch() -> MicroBatch:
        tokens = torch.randint(0, config.model.vocab_size, (rows, length))
        return MicroBatch(tokens, tokens, None)

    def step() -> None:
        train_step(engine, [micro_batch() for _ in range(config.accumulation(groups.dp.size()))], 1e-4)

    held, resident = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()  # the first one allocates the moments
    update = engine.step

    def walked_update() -> None:
        counted.on = False
        held.append(bytes_held(engine) - sum(size for size, _ in idle.values()))
        counted.on = True
        update()

    engine.step, counted.on = walked_update, True
    step()
    counted.on, engine.step = False, update
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)
    sent = {"calls": dict(counted.calls), "sent": dict(counted.bytes)}
    written = save(engine, config, "of no data", folder, 1)
    weight = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    return {"bytes": max(held), **sent, "peak_growth": growth, "checkpoint": weight}


def worker(config_file: str, output: str, *layouts: str) -> None:
    measured, groups, counted = {}, None, None
    for number, layout in enumerate(layouts):
        config = parse(["--config", config_file, "--run-dir", "unused", *layout.split()]).config
        groups = groups or start(config.parallel.tensor, seed=config.train.seed)
        counted = counted or Counted()
        counted.calls.clear()
        counted.bytes.clear()
        measured[layout] = measure(config, groups, counted, Path(output).parent / str(number))
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(measured))
    stop()


@pytest.fixture(scope="module")
def small_toml(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.toml"
    file.write_text(SMALL)
    return file


@pytest.fixture(scope="module")
def measured(small_toml, tmp_path_factory) -> dict:
    """What rank 0 of two processes held and sent, by layout."""
    found = {}
    for layouts in (TENSOR, DATA):
        output = tmp_path_factory.mktemp("measured") / "measured.json"
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        module = ["--rdzv-endpoint", "localhost:0", "-m", "tests.pretrain.test_plan_measured"]
        command = [sys.executable, *torchrun, *module, str(small_toml), str(output), *layouts]
        status, out, err = Job(command, output.parent).wait()
        assert status == 0, out + err
        found |= json.loads(output.read_text())
    return found


@pytest.fixture(scope="module")
def planned(small_toml):
    def of(gpus: int, *settings: str) -> dict:
        return plan.plan_of(plan.request_of(["--config", str(small_toml), "--gpus", str(gpus), *settings]))

    return of


@pytest.mark.parametrize("layout", [*TENSOR, *DATA])
def test_the_bytes_on_a_rank_are_within_a_tenth_of_those_of_a_run(measured, planned, layout, record_property):
    parts = planned(2, *layout.split())["ranks"][0]["parts"]
    record_property("peak resident growth, bytes", measured[layout]["peak_growth"])
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert states == pytest.approx(measured[layout]["bytes"], rel=0.1)


@pytest.mark.parametrize("layout", TENSOR)
def test_the_tensor_groups_collectives_are_counted_to_the_byte(measured, planned, layout):
    rows = planned(2, *layout.split())["collectives"]
    assert {row["operation"] for row in rows} == {"all_reduce"}
    assert {"tensor all_reduce": sum(row["calls"] for row in rows)} == measured[layout]["calls"]
    assert {"tensor all_reduce": sum(row["bytes"] for row in rows)} == measured[layout]["sent"]


@pytest.mark.parametrize("layout", DATA)
def test_the_data_groups_collectives_carry_what_is_planned(measured, planned, layout):
    # Bytes alone: DeepSpeed's buckets decide the number of calls.
    sent: Counter = Counter()
    for row in planned(2, *layout.split())["collectives"]:
        sent[f"{row['group']} {row['operation']}"] += row["bytes"]
    found = measured[layout]["sent"]
    assert set(found) == set(sent)
    for name, size in sent.items():
        assert size == pytest.approx(found[name], rel=0.01)


@pytest.mark.parametrize("layout", [*TENSOR, *DATA])
def test_a_checkpoint_weighs_what_is_planned(measured, planned, layout):
    assert planned(2, *layout.split())["checkpoint"]["bytes"] == pytest.approx(measured[layout]["checkpoint"], rel=0.05)


if __name__ == "__main__":
    worker(*sys.argv[1:])
