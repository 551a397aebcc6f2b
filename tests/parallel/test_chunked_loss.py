"""Losses whose logits stand a chunk at a time are those of whole logits, and need the memory of a chunk."""

import json
import sys

import pytest
import torch

from titans_mcore.config import TitansConfig
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config

from ..pretrain.jobs import ROOT, Job


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_whole_logits_over_two_tensor_parallel_ranks(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    worker = [
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "tests.parallel.chunked_loss_worker",
        str(tmp_path / "found.json"),
    ]
    status, out, err = Job([sys.executable, *torchrun, *worker], ROOT).wait()
    assert status == 0, out + err
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 2 * 2 * 2 * 5
    for case, error in found.items():
        assert error <= (1e-12 if "float64" in case else 1e-6), f"{case}: {error:.1e}"


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that any operation gives, backward pass included."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes())
        return result


@pytest.fixture
def one_process():
    yield start(1, seed=0)
    stop()


def test_no_tensor_holds_more_logits_than_a_chunk(one_process):
    vocab, tokens, chunk = 8_192, 512, 32
    config = TitansConfig(variant="transformer", vocab_size=vocab, num_layers=1, dim=16, num_heads=2, ffn_dim=32)
    ids = torch.arange(tokens).view(2, -1) % vocab
    for loss_chunk, at_once in ((0, tokens), (chunk, chunk)):
        model = TitansModel(config, transformer_config(config), loss_chunk=loss_chunk)
        with LargestTensor() as seen:
            model(ids, ids).mean().backward()
        assert seen.largest == 4 * vocab * max(at_once, config.dim)  # logits, or the matrix that they come from
