"""The start of every process: torch.distributed, Megatron's groups, threads and random seeds, in this order."""

import math
import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d

from titans_mcore.division import check_world
from titans_mcore.parallel.cpu import enable_cpu

_ASKED_THREADS = "TITANS_THREADS"
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """A rank's place in a group.

    Attributes:
        rank: From 0.
        ranks: How many there are.
    """

    rank: int
    ranks: int


def start(
    tensor_parallel: int = 1, context_parallel: int = 1, *, seed: int, timeout_seconds: float = 1800
) -> ProcessGroupCollection:
    """Joins this process to its run: gloo without CUDA, NCCL for device tensors with it.

    Under torchrun the run has WORLD_SIZE processes; without it the run is this one process and needs no environment.
    The default CPU generator starts at `seed` on every rank, so that weights initialised on the CPU are the same
    function of the seed at every layout. On the CPU the cores are shared out between the processes of the host.

    Args:
        tensor_parallel: Ranks that share one copy of the model.
        context_parallel: Ranks (or groups of `tensor_parallel`) that share the tokens of a row; the remaining factor of
            the world is data parallel.
        seed: Seed of the weights and of Megatron's random streams.
        timeout_seconds: A collective that waits longer fails.

    Returns:
        Megatron's groups (`tp`, `dp`, `dp_cp`, ...), to be passed to the layers.

    Raises:
        ValueError: The number of processes is not a multiple of `tensor_parallel` x `context_parallel`. Every rank
            raises it before it talks to another one.
        RuntimeError: `start` was called already, without `stop`.
    """
    _check_layout(tensor_parallel, context_parallel)
    if dist.is_initialized() or parallel_state.model_parallel_is_initialized():
        raise RuntimeError("torch.distributed is running already in this process; call stop() before start()")
    on_cpu = enable_cpu()
    torch.set_flush_denormal(True)
    # Megatron overlaps gradients' all-reduce with compute by the order of launches, which one hardware queue keeps.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if on_cpu:
        _share_cores()
    else:
        torch.cuda.set_device(local_rank())
    # CPU tensors go over gloo on GPU machines too: small exchanges of sizes and names need no device.
    backend, timeout = "gloo" if on_cpu else "cpu:gloo,cuda:nccl", timedelta(seconds=timeout_seconds)
    alone: dict[str, Any] = {} if _launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timeout, **alone)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        context_parallel_size=context_parallel,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def tighten_timeouts(timeout_seconds: float) -> None:
    """From now on a collective of any group fails that waits longer: the first step, which compiles, is over."""
    # torch 2.14 has a public name for it.
    set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        if not distributed_c10d._rank_not_in_group(group):
            set_timeout(timedelta(seconds=timeout_seconds), group)


def stop() -> None:
    """Leaves the groups. Does nothing in a process that never started.

    A process without a launcher may `start` again; under torchrun the rendezvous of the first start is used up.
    """
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """Index of this process on its host: also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _launched() else 0


def sample_place() -> Place:
    """Among the ranks that read different samples: data parallelism."""
    return Place(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())


def context_place() -> Place:
    """Among the ranks that share the tokens of a row, in the order of the tokens."""
    return Place(parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def _launched() -> bool:
    return all(name in os.environ for name in _LAUNCHER_VARIABLES)


def _check_layout(tensor_parallel: int, context_parallel: int) -> None:
    check_world(int(os.environ["WORLD_SIZE"]) if _launched() else 1, tensor_parallel, context_parallel)
    if torch.cuda.is_available() and local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank()} of this host has no GPU, there are {torch.cuda.device_count()}; "
            "start one process for each GPU"
        )


def _share_cores() -> None:
    """As many threads as the user asked for, or an even share of the cores, which starves nobody.

    torchrun itself sets OMP_NUM_THREADS to 1 where nobody has; launch/torchrun.sh hands on what was set before.
    """
    launched = _launched()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched else 1
    asked = os.environ.get(_ASKED_THREADS if launched else "OMP_NUM_THREADS", "")
    threads = max(1, int(asked) if asked.isdecimal() else len(os.sched_getaffinity(0)) // local_processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


class DeepSpeedGroups:
    """Megatron's groups under the names by which DeepSpeed asks its `mpu` for them.

    DeepSpeed's data-parallel group is data x context: ranks that hold different tokens of the same weights.
    """

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def get_model_parallel_world_size(self) -> int:
        return self.get_model_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        return self.get_model_parallel_group().rank()

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
