"""A step done again in one process: `python -m pretrain.replay RUN/autopsy/step-00000041`.

The model is built without DeepSpeed and at no layout but one process's, gets the weights from before the step, and
computes loss and gradient of each sample of the batch, one after the other.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

from pretrain.checkpoint.format import read_record
from pretrain.config.files import load_run_config
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import ParallelConfig
from pretrain.data.batches import MicroBatch
from pretrain.data.folders import NumberedSamples, open_data, open_samples
from pretrain.engine import build_model
from pretrain.recovery.ending import mistakes_as_sentences
from pretrain.recovery.recover import AUTOPSY_FILE, CHECKPOINT
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
class ReplayedSample:
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


def replay(settings: ReplaySettings) -> list[ReplayedSample]:
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


def _one(model: nn.Module, sample: int, rows: MicroBatch) -> ReplayedSample:
    watch, telemetry = NonfiniteWatch(), MemoryTelemetry(model)
    model.zero_grad(set_to_none=True)
    with watch.watching(model):
        with telemetry.watching():
            loss = model(**rows.arguments(device())).mean()
        loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(squares).sum().sqrt()
    return ReplayedSample(
        sample, float(loss.detach()), float(norm), watch.forward or watch.backward, telemetry.collect()
    )


def _documents(folder: Path, sample: int) -> list[str]:
    """What the autopsy says about a sample."""
    file = folder / AUTOPSY_FILE
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [line for line in facts.get("documents", []) if line.startswith(f"sample {sample}:")]


class NonfiniteWatch:
    """Notes the first modules whose output, or the gradient of it, is not finite."""

    def __init__(self) -> None:
        self.forward = ""
        """The first one in the order of the forward pass, and what was not finite."""
        self.backward = ""
        """The first one in the order of the backward pass."""

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator["NonfiniteWatch"]:
        """Looks at all that passes inside the `with`; it waits for the device at every module."""
        names = {module: name or "the model" for name, module in model.named_modules()}
        handles = [module.register_forward_hook(self._look(name)) for module, name in names.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not self.forward and (words := nonfinite(tensor)):
                    self.forward = f"{name} ({type(module).__name__}): {words} of its output"
                if tensor.requires_grad:
                    tensor.register_hook(gradient_hook(type(module).__name__))

        def gradient_hook(kind: str) -> Any:
            def look(gradient: Tensor) -> None:
                if not self.backward and (words := nonfinite(gradient)):
                    self.backward = f"{name} ({kind}): {words} of the gradient of its output"

            return look

        return hook


def nonfinite(tensor: Tensor) -> str:
    """How many numbers are not finite, in words; empty when all are."""
    count = int((~torch.isfinite(tensor)).sum())
    return f"{count:,} of {tensor.numel():,} numbers" if count else ""


def _tensors(output: Any) -> Sequence[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


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
