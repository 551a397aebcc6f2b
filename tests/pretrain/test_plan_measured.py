"""What `pretrain.plan` says against real runs on gloo: tensors walked, messages counted, checkpoints weighed.

Run as a module under torchrun it is the worker of these tests:

    python -m tests.pretrain.test_plan_measured CONFIG.toml OUTPUT.json "SETTINGS" ...

trains some layouts one after the other and writes, for each rank and layout, what it held and sent in one step and what
all wrote.
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.config.command_line import parse
from pretrain.data.batches import MicroBatch
from pretrain.engine import build_engine, build_model, train_step
from pretrain.plan import __main__ as plan
from tests.parallel.traffic import counted_traffic
from titans_mcore.mixers import MIXERS
from titans_mcore.parallel import context_place, sample_place, start, stop

from .jobs import Job
from .saving import save

# One fixture trains for all tests: it may take its time where other tests share the cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

# Small, and yet its parameters are nearly all that an engine holds.
SMALL = """
[model]
variant = "mac"
num_layers = 2
dim = 128
num_heads = 8
memory_heads = 4
linear_heads = 4
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
ATTENTION = [name for name, mixer in MIXERS.items() if mixer.attention]
MEMORY = [name for name, mixer in MIXERS.items() if mixer.memory]
LINEAR = [name for name in MIXERS if name not in ATTENTION + MEMORY]
TENSOR = [
    *(f"--parallel.tensor 2 --model.variant {variant}" for variant in ATTENTION if variant in MEMORY),
    *(f"--parallel.tensor 2 --model.variant {variant}" for variant in LINEAR),
    *(
        f"--parallel.tensor 2 --parallel.sequence true --model.variant {variant}"
        for variant in [*ATTENTION, "mamba2", "ttt_linear"]
    ),
]
HIDDEN = [
    f"--parallel.tensor 2 --parallel.memory-parallel hidden --model.theta-max 0.001 --model.variant {variant}"
    for variant in MEMORY
]
CONTEXT = [
    *(f"--parallel.context 2 --model.variant {variant}" for variant in [*ATTENTION, *LINEAR, "mamba2+transformer"]),
    "--parallel.context 2 --model.variant lmm --train.precision bf16",
]
DATA = [
    *(f"--parallel.zero-stage {stage}" for stage in range(4)),
    *(f"--parallel.zero-stage {stage} --train.precision bf16" for stage in (1, 3)),
    *(f"--parallel.zero-stage {stage} --parallel.offload-optimizer true" for stage in (1, 2, 3)),
    "--parallel.zero-stage 2 --parallel.offload-optimizer true --train.precision bf16",
]


def bytes_held(engine) -> int:
    """Bytes of all tensors but buckets and the parameters that ZeRO 3 has gathered for a while."""
    left_out = communication_buffers(engine)
    return sum(size for place, (size, _) in storages().items() if place not in left_out)


def measure(config, groups, folder: Path) -> dict:
    torch.manual_seed(1)
    idle = storages()  # of layouts before this one, alive until the end
    ranks = sample_place().ranks
    engine = build_engine(build_model(config, groups), config, ranks)
    rows, length = config.train.micro_batch, config.train.sequence_length

    def micro_batch() -> MicroBatch:
        tokens = torch.randint(0, config.model.vocab_size, (rows, length))
        return MicroBatch(tokens, tokens, None)

    def step() -> None:
        train_step(engine, [micro_batch() for _ in range(config.accumulation(ranks))], 1e-4)

    kept = kept_bytes(engine.module, micro_batch().part(*context_place())) if ranks == 1 else 0
    held = []
    step()  # the first one allocates the moments
    update = engine.step

    def walked_update() -> None:
        # gloo's threads let go of what was reduced a little later than its waiters go on: until nothing goes any more.
        found = [bytes_held(engine)]
        while len(found) < 5 or min(found[-4:]) < found[-5]:
            time.sleep(0.1)
            found.append(bytes_held(engine))
        held.append(found[-1] - sum(size for size, _ in idle.values()))
        update()

    engine.step = walked_update
    # Headers go through the world's group, which takes host tensors.
    with counted_traffic({"context": groups.cp, "header": dist.group.WORLD}) as traffic:
        step()
    engine.step = update
    sent = {"calls": dict(traffic.calls), "sent": dict(traffic.bytes)}
    written = save(engine, config, "of no data", folder, 1)
    weight = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    return {"bytes": max(held), **sent, "kept": kept, "checkpoint": weight}


def communication_buffers(engine: Any) -> set[int]:
    """Storages of DeepSpeed's buckets, and of the parameters that ZeRO 3 has gathered for a while."""
    buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
    buffers = [x for bucket in buckets for x in (bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer])]
    gathered = [p.data for p in engine.module.parameters()] if engine.zero_optimization_stage() == 3 else []
    return {_place(x) for x in [*buffers, *gathered] if x is not None}


def storages() -> dict[int, tuple[int, torch.Tensor]]:
    """Bytes of every storage on the CPU that a tensor lies in, by address, and the tensor, which keeps it alive."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"]
    tensors += [x.grad for x in tensors if type(x) is torch.nn.Parameter and x.grad is not None]
    return {_place(x): (x.untyped_storage().nbytes(), x.detach()) for x in tensors}


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def kept_bytes(model: torch.nn.Module, micro_batch: MicroBatch) -> int:
    """Bytes of what the forward pass of a micro-batch keeps for the backward pass, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[torch.Tensor] = []  # alive, so that no two have one address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())
        return kept[-1]  # not the tensor itself, which would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*micro_batch[:3])
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for place, size in sizes.items() if place not in weights)


def worker(config_file: str, output: str, *layouts: str) -> None:
    measured, groups = {}, None
    for number, layout in enumerate(layouts):
        config = parse(["--config", config_file, "--run-dir", "unused", *layout.split()]).config
        groups = groups or start(config.parallel.tensor, config.parallel.context, seed=config.train.seed)
        measured[layout] = measure(config, groups, Path(output).parent / str(number))
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, measured)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(everyones))
    stop()


@pytest.fixture(scope="module")
def small_toml(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.toml"
    file.write_text(SMALL)
    return file


@pytest.fixture(scope="module")
def everyones(small_toml, tmp_path_factory) -> dict:
    """What each of two processes held and sent, by rank and layout."""
    found = {}
    for layouts in (TENSOR + HIDDEN, CONTEXT, DATA):
        output = tmp_path_factory.mktemp("measured") / "measured.json"
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        module = ["--rdzv-endpoint", "localhost:0", "-m", "tests.pretrain.test_plan_measured"]
        command = [sys.executable, *torchrun, *module, str(small_toml), str(output), *layouts]
        status, out, err = Job(command, output.parent).wait(timeout_seconds=1200)
        assert status == 0, out + err
        for rank, of_rank in enumerate(json.loads(output.read_text())):
            found.setdefault(rank, {}).update(of_rank)
    return found


@pytest.fixture(scope="module")
def measured(everyones) -> dict:
    """What rank 0 held and sent, by layout."""
    return everyones[0]


@pytest.fixture(scope="module")
def planned(small_toml):
    def of(gpus: int, *settings: str) -> dict:
        return plan.plan_of(plan.request_of(["--config", str(small_toml), "--gpus", str(gpus), *settings]))

    return of


@pytest.mark.parametrize("layout", [*TENSOR, *HIDDEN, *CONTEXT, *DATA])
def test_the_bytes_on_a_rank_are_within_a_tenth_of_those_of_a_run(measured, planned, layout):
    rank = planned(2, *layout.split())["rank"]
    states = rank["host_bytes"] + sum(rank["parts"][part] for part in ("weights", "gradients", "optimizer"))
    assert states == pytest.approx(measured[layout]["bytes"], rel=0.1)


@pytest.mark.parametrize("layout", [*TENSOR, *HIDDEN, *CONTEXT])
def test_activations_are_near_what_autograd_keeps(measured, planned, layout):
    parts = planned(2, *layout.split(), "--data.reset-documents", "false")["rank"]["parts"]
    estimated = parts["activations"] + parts["memory_states"] + parts["logits"] / 2  # the logits themselves go
    # So short a row that what is counted roughly, the states of its few chunks, is half of it.
    assert estimated == pytest.approx(measured[layout]["kept"], rel=0.3)


@pytest.mark.parametrize("layout", CONTEXT)
def test_the_messages_between_context_parallel_ranks_are_counted_to_the_byte(everyones, planned, layout):
    # The first of two ranks sends states, some behind headers, the last sends gradients.
    messages = planned(2, *layout.split())["messages"]
    first, last = (everyones[rank][layout] for rank in (0, 1))
    assert first["calls"].get("header send", 0) == messages["headers"]
    for found in (first, last):
        assert found["calls"]["context send"] == messages["states"]
        assert found["sent"]["context send"] == messages["bytes"]


@pytest.mark.parametrize("layout", [*TENSOR, *HIDDEN, *CONTEXT, *DATA])
def test_a_checkpoint_weighs_what_is_planned(measured, planned, layout):
    assert planned(2, *layout.split())["checkpoint"]["bytes"] == pytest.approx(measured[layout]["checkpoint"], rel=0.05)


if __name__ == "__main__":
    worker(*sys.argv[1:])
