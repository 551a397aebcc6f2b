"""Run under torchrun: saves the weights of runs as so many tensor-parallel ranks do.

python tensor_parallel_worker.py OUTPUT SPLIT RUN..., SPLIT being what ranks share of the memory, heads or hidden
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from titans_mcore.weights import MARKER, ShardHeader, find_checkpoint, load_full, load_into, model_tensors, save_shard


def main(output: str, split: str, *runs: str) -> None:
    size = int(os.environ["WORLD_SIZE"])
    start(size, seed=1)
    torch.set_num_threads(1)
    for run in map(Path, runs):
        config, weights = load_full(find_checkpoint(run))
        megatron = transformer_config(config, tensor_parallel=size, memory_parallel=split)
        model = TitansModel(config, megatron, memory_parallel=split)
        load_into(model, weights)
        checkpoint = Path(output) / run.name / "checkpoints" / "step-00000010"
        place = {"rank": dist.get_rank(), "size": size, "step": 10, "tokens": 5120}
        values = model_tensors(model).items()
        save_shard(checkpoint / "weights", ShardHeader.of(model), values, config, **place)
        dist.barrier()
        if dist.get_rank() == 0:
            (checkpoint / MARKER).write_text(json.dumps({"step": 10, "tokens": 5120, "files": {}}))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
