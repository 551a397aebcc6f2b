"""Run under torchrun by test_wavefront_measured: a step of a small model, with the time of everything a rank does.

python -m tests.pretrain.wavefront_worker CONFIG.toml OUTPUT.json

Writes, for each rank, what TracedRelay has noted of the last step.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config.command_line import parse
from pretrain.data.batches import MicroBatch
from pretrain.engine import build_engine, build_model, train_step
from titans_mcore.parallel import sample_place, start, stop
from titans_mcore.parallel.context import ContextRelay

WARMUP_STEPS = 2


class TracedRelay(ContextRelay):
    """A relay that notes when its rank is free and when it has what it waited for.

    Attributes:
        notes: (what, layer, seconds of the clock, CPU seconds of the process); a layer's are "forward begins",
            "forward leaves" (its state is about to be sent), "forward ends", "backward free" (nothing is left to do but
            this layer), "backward begins" (its gradients are there) and "backward leaves"; the first layer's is also
            "backward ends".
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.notes: list[tuple[str, int, float, float]] = []
        self.layer = -1

    def note(self, what: str, layer: int) -> None:
        self.notes.append((what, layer, time.monotonic(), time.process_time()))

    def receive(self, kind: Any, hidden: Tensor) -> Any:
        self.layer += 1
        return super().receive(kind, hidden)

    def pass_on(self, state: Any, hidden: Tensor) -> Tensor:
        hidden = super().pass_on(state, hidden)
        self.note("forward ends", self.layer)
        return _Noted.apply(hidden, self, self.layer)

    def _send(self, message: Tensor, to: int, group: dist.ProcessGroup | None = None) -> None:
        self.note("forward leaves" if to > self.rank else "backward leaves", self.layer)
        super()._send(message, to, group)

    def _take(self, message: Tensor, source: int) -> Tensor:
        message = super()._take(message, source)
        if source < self.rank:
            self.note("forward begins", self.layer)
        else:
            self.note("backward begins", self.layer)
        return message


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, relay: TracedRelay, layer: int) -> Tensor:
        ctx.relay, ctx.layer = relay, layer
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.relay.layer = ctx.layer
        ctx.relay.note("backward free", ctx.layer)
        if ctx.relay.rank == ctx.relay.ranks - 1:
            ctx.relay.note("backward begins", ctx.layer)
        return gradient, None, None


def traced(model: Any) -> TracedRelay:
    """Puts a traced relay into a model."""
    relay = model.relay = TracedRelay(model.relay.group)

    def embedded(module: Any, arguments: Any, output: Tensor) -> None:
        relay.layer = -1
        output.register_hook(lambda gradient: relay.note("backward ends", 0))

    def begins(*_: Any) -> None:  # the first rank waits for nothing
        relay.layer += 1
        relay.note("forward begins", relay.layer)

    model.embedding.register_forward_hook(embedded)
    for layer in model.layers if relay.rank == 0 else ():
        layer.register_forward_pre_hook(begins)
    return relay


def main() -> None:
    config = parse(["--config", sys.argv[1], "--run-dir", "unused"]).config
    groups = start(1, config.parallel.context, seed=config.train.seed)
    model = build_model(config, groups)
    relay, samples = traced(model), sample_place()
    engine = build_engine(model, config, samples.ranks)
    torch.manual_seed(samples.rank)
    for _ in range(WARMUP_STEPS + 1):
        shape = config.train.micro_batch, config.train.sequence_length
        tokens = [torch.randint(0, config.model.vocab_size, shape) for _ in range(config.accumulation(samples.ranks))]
        dist.barrier()
        relay.notes.clear()
        train_step(engine, [MicroBatch(x, x, None) for x in tokens], 1e-4, in_flight=config.parallel.in_flight)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {"notes": relay.notes})
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
