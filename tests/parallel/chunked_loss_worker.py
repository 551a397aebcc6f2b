"""Run under torchrun by test_chunked_loss: python -m tests.parallel.chunked_loss_worker OUTPUT.json

Losses and all gradients of float64 and float32 models at tensor parallel 2 whose logits stand a chunk at a time, beside
those of the same models whose logits stand whole: for each, the largest error over the tensor's largest value.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.model import TitansModel
from titans_mcore.parallel import reduce_shared_gradients, start, stop, transformer_config

from .layouts_worker import BATCH, LENGTH, SETTINGS, batch
from .regroup import groups_of

CHUNKS = [1, 6, 14, 2 * LENGTH, 1_000]
"""Tokens: one, such that do not go into the rows, a pass, more than there are."""


def losses_and_gradients(chunk: int, dtype: torch.dtype, *, sequence: bool, tied: bool) -> dict[str, Tensor]:
    """Of one pass over rows with documents."""
    groups = groups_of(2, 1)
    config = TitansConfig(variant="mag", **SETTINGS | {"tie_embeddings": tied})
    torch.manual_seed(0)
    megatron = transformer_config(config, tensor_parallel=2, sequence_parallel=sequence, dtype=dtype)
    model = TitansModel(config, megatron, groups, loss_chunk=chunk)
    if sequence:
        reduce_shared_gradients(model, groups.tp)
    tokens, starts, weights = batch()
    losses = model(tokens, tokens.roll(-1, 1), starts)
    assert losses.shape == (BATCH, LENGTH)
    (losses * weights[..., 0]).sum().backward()
    with torch.no_grad():
        assert torch.equal(model(tokens, tokens.roll(-1, 1), starts), losses)
    return {"losses": losses.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    start(1, seed=0)
    found = {}
    for sequence in (False, True):
        for tied in (False, True):
            for dtype in (torch.float64, torch.float32):
                whole = losses_and_gradients(0, dtype, sequence=sequence, tied=tied)
                for chunk in CHUNKS:
                    parts = losses_and_gradients(chunk, dtype, sequence=sequence, tied=tied)
                    assert parts.keys() == whole.keys()
                    errors = [(parts[k] - whole[k]).abs().max() / whole[k].abs().max() for k in whole]
                    worst = torch.stack(errors).max().double()
                    dist.all_reduce(worst, dist.ReduceOp.MAX)
                    found[f"{dtype} sequence={sequence} tied={tied} chunk={chunk}"] = worst.item()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
