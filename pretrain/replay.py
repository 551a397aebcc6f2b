"""A step done again in one process: `python -m pretrain.replay RUN/autopsy/step-00000041`.

The model is built without DeepSpeed and at no layout but one process's, gets the weights from before the step, and
computes loss and gradient of each sample of the batch, one after the other.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import nn

from pretrain.checkpoint.format import read_record
from pretrain.config.files import load_run_config
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import ParallelConfig
from pretrain.data.batches import MicroBatch, NumberedSamples
from pretrain.data.folders import open_data, open_samples
from pretrain.engine import build_model
from pretrain.recovery.autopsy import AUTOPSY_FILE, CHECKPOINT, NonfiniteWatch
from pretrain.recovery.ending import mistakes_as_sentences
from pretrain.schedule import portion_of
from titans_mcore.parallel import device, start, stop
from titans_mcore.telemetry import MemoryTelemetry
from titans_mcore.weights import damage, load_full, load_into


@dataclass(frozen=True)
class ReplaySettings:
    """Computes each sample of a step's batch again, and names the first module with a number that is not finite."""

    folder: tyro.conf.Positional[Path]
    """Folder of an autopsy, RUN/autopsy/step-N, or a checkpoint, RUN/checkpoints/step-N, whose next step is done."""


@dataclass(frozen=True)
class SampleResult:
    """What a sample gave."""

    sample: int
    """Its number."""
    loss: float
    """Mean over its tokens, nats."""
    grad_norm: float
    """2-norm of its gradient."""
    first_nonfinite: str
    """The module, in the order of the forward pass and else of the backward pass; empty when all was finite."""
    memory: dict[str, list[float | None]]
    """What its memories did, by block (titans_mcore.telemetry)."""


def replay(settings: ReplaySettings) -> list[SampleResult]:
    """Does the step behind a folder's checkpoint again.

    Raises:
        ValueError: The folder is none of those that can be replayed, or its data is not there.
    """
    checkpoint = settings.folder / CHECKPOINT if (settings.folder / AUTOPSY_FILE).is_file() else settings.folder
    if reason := damage(checkpoint):
        raise ValueError(f"{settings.folder} has no whole checkpoint to replay from: {reason}")
    run_dir = checkpoint.resolve().parents[2 if checkpoint.name == CHECKPOINT else 1]
    config = replace(load_run_config(run_dir), parallel=ParallelConfig(zero_stage=1))
    config = replace(config, train=replace(config.train, recompute="none"))
    model, samples = _open(config, run_dir, checkpoint)
    first, count, row_length = portion_of(read_record(checkpoint)["step"] + 1, config.train)
    samples.prepare(first, first + count - 1)
    return [_one(model, i, samples.micro_batch([i]).cut(row_length)) for i in range(first, first + count)]


def _open(config: RunConfig, run_dir: Path, checkpoint: Path) -> tuple[nn.Module, NumberedSamples]:
    data = open_data(config)
    model = build_model(config, start(seed=config.train.seed))
    load_into(model, load_full(checkpoint)[1])
    return model, open_samples(config, data, run_dir)[0]


def _one(model: nn.Module, sample: int, rows: MicroBatch) -> SampleResult:
    watch, telemetry = NonfiniteWatch(), MemoryTelemetry(model)
    model.zero_grad(set_to_none=True)
    with watch.watching(model):
        with telemetry.watching():
            loss = model(**rows.arguments(device())).mean()
        loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(squares).sum().sqrt()
    return SampleResult(sample, float(loss.detach()), float(norm), watch.forward or watch.backward, telemetry.collect())


def _documents(folder: Path, sample: int) -> list[str]:
    """What the autopsy says about a sample."""
    file = folder / AUTOPSY_FILE
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [line for line in facts.get("documents", []) if line.startswith(f"sample {sample}:")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    settings = tyro.cli(ReplaySettings, args=arguments, prog="python -m pretrain.replay")
    with mistakes_as_sentences():
        try:
            results = replay(settings)
        finally:
            if dist.is_initialized():
                stop()
        for one in results:
            print(f"sample {one.sample} | loss {one.loss:.6f} | grad norm {one.grad_norm:.4g}")
            if one.first_nonfinite:
                print(f"  not finite first in {one.first_nonfinite}")
                memory = (f"{name} {[x and float(f'{x:.3g}') for x in blocks]}" for name, blocks in one.memory.items())
                for line in (*_documents(settings.folder, one.sample), *memory):
                    print(f"  {line}")
        bad = sum(bool(one.first_nonfinite) for one in results)
        print(f"{bad} of {len(results)} samples are not finite")


if __name__ == "__main__":
    main()
