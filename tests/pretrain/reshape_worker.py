"""Run under torchrun by test_reshape: trains several runs one after the other in the same processes.

python reshape_worker.py CONFIG.toml RUNS "NAME FROM SETTING ..." ...

trains RUNS/NAME, beginning with the checkpoint after step 10 of RUNS/FROM unless FROM is `-`.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from pretrain import train
from titans_mcore import tensor_files
from titans_mcore.parallel import start, stop


def start_once(*arguments, seed, **named):
    """The groups can be made once in a process; later runs find them, and the random states of a new process."""
    if not dist.is_initialized():
        return start(*arguments, seed=seed, **named)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def main():
    config, runs, *jobs = sys.argv[1:]
    train.start = start_once
    rank, opened = int(os.environ["RANK"]), []
    read_tensors = tensor_files.read_tensors

    def recorded(file, holding):
        opened.append(f"{file.parent.name}/{file.name}")
        return read_tensors(file, holding)

    tensor_files.read_tensors = recorded
    for job in jobs:
        name, source, *settings = job.split()
        if source != "-" and rank == 0:
            checkpoint = "checkpoints/step-00000010"
            shutil.copytree(Path(runs, source, checkpoint), Path(runs, name, checkpoint))
        opened.clear()
        train.train(["--config", config, "--run-dir", str(Path(runs, name)), *settings])
        Path(runs, name, f"opened-by-{rank}").write_text("\n".join(opened))
    stop()


if __name__ == "__main__":
    main()
