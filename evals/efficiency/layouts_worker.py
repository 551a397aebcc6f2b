"""One step of models at layouts of one division of the processes; evals.efficiency.layouts starts it under torchrun.

python -m evals.efficiency.layouts_worker OUTPUT.json TENSOR CONTEXT CASE.json ...

A case is a file of run settings, and of whether bytes are asked for. Rank 0 writes, for each, what it sent in a step or
what it held before the update.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evals.report import write_json
from pretrain.config import RunConfig
from pretrain.config_files import build
from pretrain.data import MicroBatch
from pretrain.engine import build_engine, build_model, train_step
from titans_mcore.parallel import DeepSpeedGroups, sample_place, start, stop
from titans_mcore.parallel.traffic import counted_traffic


def measure(config: RunConfig, groups: Any, *, held: bool) -> dict[str, Any]:
    """Traffic of a step by group and operation, or bytes held by part before its update."""
    torch.manual_seed(config.train.seed)
    idle = set(storages())  # of cases before this one
    engine = build_engine(build_model(config, groups), config, sample_place().ranks)
    rows, length = config.train.micro_batch, config.train.sequence_length

    def step() -> None:
        tokens = [torch.randint(0, config.model.vocab_size, (rows, length)) for _ in range(micro_batches)]
        train_step(engine, [MicroBatch(x, x, None) for x in tokens], 1e-4)

    micro_batches = config.accumulation(sample_place().ranks)
    if held:
        step()  # the first one allocates the moments
        update, found = engine.step, []

        def looked_at() -> None:
            found.append(bytes_by_part(engine, idle))
            update()

        engine.step = looked_at
        step()
        numbers = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        return {"held": found[-1], "numbers": numbers}
    named = {"tensor": groups.tp, "context": groups.cp, "data": DeepSpeedGroups().get_data_parallel_group()}
    assert dist.group.WORLD is not None
    with counted_traffic({**named, "header": dist.group.WORLD}) as traffic:
        step()
    return {"calls": traffic.calls, "bytes": traffic.bytes}


def bytes_by_part(engine: Any, idle: set[int]) -> dict[str, int]:
    """Bytes of weights, optimizer and gradients on this rank, DeepSpeed's communication buckets apart."""
    sizes = {place: size for place, (size, _) in storages().items() if place not in idle}
    stage3 = engine.zero_optimization_stage() == 3
    parameters = list(engine.module.parameters())
    weights = {_place(p.ds_tensor if stage3 else p.data) for p in parameters}
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [x for state in base.state.values() for x in state.values() if isinstance(x, Tensor)]
    masters = engine.optimizer.fp32_partitioned_groups_flat if stage3 else []
    stepped = [p for group in base.param_groups for p in group["params"]]
    optimizer = {_place(x) for x in [*masters, *stepped, *states]} - weights
    parts = {"weights": weights, "optimizer": optimizer}
    parts["gradients"] = set(sizes) - weights - optimizer - communication_buffers(engine)
    return {name: sum(sizes.get(place, 0) for place in places) for name, places in parts.items()}


def communication_buffers(engine: Any) -> set[int]:
    """Storages of DeepSpeed's buckets, and of the parameters that ZeRO 3 has gathered for a while."""
    buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
    buffers = [x for bucket in buckets for x in (bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer])]
    gathered = [p.data for p in engine.module.parameters()] if engine.zero_optimization_stage() == 3 else []
    return {_place(x) for x in [*buffers, *gathered] if x is not None}


def storages() -> dict[int, tuple[int, Tensor]]:
    """Bytes of every storage on the CPU that a tensor lies in, by address, and the tensor, which keeps it alive."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"]
    tensors += [x.grad for x in tensors if type(x) is torch.nn.Parameter and x.grad is not None]
    return {_place(x): (x.untyped_storage().nbytes(), x.detach()) for x in tensors}


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def main() -> None:
    """Runs the command line."""
    output, tensor, context, *files = sys.argv[1:]
    groups = start(int(tensor), int(context), seed=0)
    asked = [json.loads(Path(file).read_text()) for file in files]
    found = [measure(build(x["run"], "the case"), groups, held=x["held"]) for x in asked]
    if dist.get_rank() == 0:
        write_json(Path(output), {"cases": found})
    stop()


if __name__ == "__main__":
    main()
