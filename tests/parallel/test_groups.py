"""Starting processes: alone, under a launcher, and in layouts that do not work."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from titans_mcore.parallel import DeepSpeedGroups, start, stop

LAUNCHER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3"}

TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from titans_mcore.parallel import DeepSpeedGroups, start, stop
groups = start(2, seed=7)
default = torch.rand(4)
with get_cuda_rng_tracker().fork():
    stream = torch.rand(4)
gathered = [torch.empty(8) for _ in range(2)]
dist.all_gather(gathered, torch.cat([default, stream]), group=groups.tp)
assert torch.equal(gathered[0][:4], gathered[1][:4]), "default streams differ"
assert not torch.equal(gathered[0][4:], gathered[1][4:]), "model-parallel streams are the same"
mpu = DeepSpeedGroups()
assert (mpu.get_data_parallel_world_size(), mpu.get_model_parallel_world_size()) == (1, 2)
assert mpu.get_model_parallel_rank() == mpu.get_tensor_model_parallel_rank() == dist.get_rank()
assert torch.get_num_threads() >= 1
stop()
"""


def test_a_process_alone_has_the_threads_that_were_asked_for_and_else_all_cores():
    script = "import torch; from titans_mcore.parallel import start; start(1, seed=0); print(torch.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if name not in (*LAUNCHER, "OMP_NUM_THREADS")}
    for asked, threads in (({}, len(os.sched_getaffinity(0))), ({"OMP_NUM_THREADS": "1"}, 1)):
        command, own = [sys.executable, "-c", script], environment | asked
        told = subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout
        assert int(told.split()[-1]) == threads


def test_one_process_starts_without_a_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    groups = start(1, seed=3)
    try:
        value = torch.ones(2)
        dist.all_reduce(value, group=groups.tp)
        dist.all_reduce(value, group=groups.dp_cp)
        assert value.tolist() == [1, 1]
        assert DeepSpeedGroups().get_data_parallel_world_size() == 1
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
        with pytest.raises(RuntimeError, match=r"call stop\(\) before"):
            start(1, seed=3)
    finally:
        stop()
    start(1, seed=3)
    stop()


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "message"),
    [("3", 2, "3 processes cannot be divided into tensor-parallel groups of 2"), ("2", 0, "must be at least 1")],
)
def test_a_layout_that_does_not_divide_is_refused_before_talking_to_anyone(
    monkeypatch, world_size, tensor_parallel, message
):
    for name, value in (LAUNCHER | {"WORLD_SIZE": world_size}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("it talks to the others"))
    with pytest.raises(ValueError, match=message):
        start(tensor_parallel, seed=0)
    assert not dist.is_initialized()


def test_tensor_parallel_ranks_share_the_default_stream_and_not_the_model_parallel_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(script)]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
