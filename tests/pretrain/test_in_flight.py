"""Forward passes before the first backward pass: another order, the same numbers bit for bit."""

import json
import sys

import pytest
import torch

from pretrain.config.command_line import parse
from pretrain.data.batches import MicroBatch
from pretrain.engine import build_engine, build_model, train_step

from .jobs import ROOT, Job

VARIANTS = {"mac": "", "mamba2+transformer": "--model.num-layers 2"}  # a wavefront, and blocks that compose beside one
STAGES = {"mac": (1, 2), "mamba2+transformer": (0,)}


def test_forward_passes_come_first_and_nothing_else_changes(tiny_toml, one_process):
    """Five micro-batches, two in flight: pairs, and a last one alone."""
    config = parse(["--config", str(tiny_toml), "--run-dir", "unused"]).config
    found = {}
    for in_flight in (1, 2):
        torch.manual_seed(0)
        engine, order = build_engine(build_model(config, one_process), config, 1), ""
        norm = engine.module.final_norm

        def forward(*_: object) -> None:
            nonlocal order
            order += "F"

        def backward(*_: object) -> None:
            nonlocal order
            order += "B"

        norm.register_forward_hook(forward)
        norm.register_full_backward_hook(backward)
        rows = torch.randint(3, 96, (5, 2, 32), generator=torch.Generator().manual_seed(1))
        result = train_step(engine, [MicroBatch(x, x.roll(-1, 1), None) for x in rows], 1e-2, in_flight=in_flight)
        found[in_flight] = order, result, [p.detach().clone() for p in engine.module.parameters()]
    assert found[1][0] == "FBFBFBFBFB"
    assert found[2][0] == "FFBBFFBBFB"
    assert found[1][1] == found[2][1]
    assert all(map(torch.equal, found[1][2], found[2][2]))


def test_context_ranks_learn_the_same_bit_for_bit(tiny_toml, tmp_path):
    output = tmp_path / "curves.json"
    runs = [
        f"{variant} {stage} {in_flight}: --variant {variant} {own} --parallel.context 2 --train.micro-batch 1 "
        f"--train.steps 4 --schedule.warmup-steps 1 --parallel.zero-stage {stage} --parallel.in-flight {in_flight}"
        for variant, own in VARIANTS.items()
        for stage in STAGES[variant]
        for in_flight in (1, 3)
    ]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    worker = ["--rdzv-endpoint", "localhost:0", "-m", "tests.pretrain.curves_worker", str(tiny_toml), str(output)]
    status, out, err = Job([sys.executable, *torchrun, *worker, *runs], ROOT).wait(timeout_seconds=300)
    assert status == 0, out + err
    curves = json.loads(output.read_text())
    for variant, stages in STAGES.items():
        for stage in stages:
            assert curves[f"{variant} {stage} 3"] == curves[f"{variant} {stage} 1"]
            assert len(set(curves[f"{variant} {stage} 3"]["loss"])) == 4


def test_without_context_ranks_it_is_refused(tiny_toml):
    with pytest.raises(ValueError, match=r"parallel.in_flight 2 fills the time that context ranks wait for each other"):
        parse(["--config", str(tiny_toml), "--run-dir", "unused", "--parallel.in-flight", "2"])
