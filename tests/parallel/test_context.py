"""What context-parallel ranks send each other."""

import json
import os
import subprocess
import sys

import pytest
import torch

from titans_mcore.config import TitansConfig
from titans_mcore.mixers import MIXERS
from titans_mcore.parallel.context import _Layout

from ..pretrain.jobs import ROOT

TWO_RANKS = """
import json, sys, torch, torch.distributed as dist
from titans_mcore.config import TitansConfig
from titans_mcore.mixers import MIXERS
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from tests.parallel.traffic import counted_traffic

groups, found = start(1, 2, seed=0), {}
for variant in MIXERS:
    config = TitansConfig(variant=variant, vocab_size=64, num_layers=2, dim=16, num_heads=2, ffn_dim=16, window=8,
                          chunk_size=4, linear_heads=2, memory_expansion=1, persistent_tokens=2, segment_length=8)
    model = TitansModel(config, transformer_config(config), groups)
    for length in (32, 128):
        tokens = torch.randint(0, 64, (1, length)).chunk(2, 1)[dist.get_rank()]
        with counted_traffic({"context": groups.cp, "header": dist.group.WORLD}) as traffic:
            model(tokens, labels=tokens).mean().backward()
        found[f"{variant} {length}"] = [traffic.calls, traffic.bytes]
dist.barrier()  # what is on its way may not be lost
print(json.dumps(found)) if dist.get_rank() == 0 else None
stop()
"""


def test_what_is_sent_does_not_grow_with_the_rows_and_nothing_is_gathered(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for variant in MIXERS:
        calls, sent = found[f"{variant} 32"]
        assert found[f"{variant} 128"] == [calls, sent]
        if (mixer := MIXERS[variant]).composes:  # no header says what is known
            assert calls == {"context send": 2 * mixer.messages(TitansConfig(variant=variant))}
        else:
            assert calls == {"header send": 2, "context send": 2}  # one state a layer; rank 1 sends the gradients back
        assert sent["context send"] > 0


def test_a_message_gives_its_tensors_back():
    tensors = {
        "weights.0": torch.randn(2, 3, 4, dtype=torch.float64),
        "real": torch.tensor([[True, False, True]]),
        "nothing": torch.empty(2, 0, 5),
        "tail": torch.randn(3, 2).to(torch.bfloat16).t(),  # not contiguous
    }
    layout = _Layout.read(_Layout.of(tensors).header())
    message = layout.pack(list(tensors.values()))
    assert message.numel() == layout.bytes() == 2 * 3 * 4 * 8 + 3 + 6 * 2
    assert layout.names == list(tensors)
    for found, given in zip(layout.unpack(message), tensors.values(), strict=True):
        assert found.dtype == given.dtype
        assert torch.equal(found, given)
    assert layout.differentiable().names == ["weights.0", "nothing", "tail"]


def test_a_header_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"describing 2000 tensors takes \d+ bytes; a message's header has 8192"):
        _Layout.of({f"weights.{index}": torch.empty(1) for index in range(2000)}).header()
