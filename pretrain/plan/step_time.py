"""How long a step takes, from its operations: shared out evenly, with what is recomputed, and what ranks wait.

    seconds = (operations + recomputed operations) / (GPUs x peak x utilisation) / efficiency of the wavefront

A layer takes its share of the blocks' operations on one rank, twice that in the backward pass and once more where it is
recomputed; the head all of its own. Messages go at the network's speed; other collectives are part of the utilisation.
"""

from dataclasses import dataclass

from pretrain.config.run_config import RunConfig
from pretrain.plan.flops import head_flops, recomputed_flops, step_flops
from pretrain.plan.hardware import Gpu
from pretrain.plan.layout import Layout, workload_of
from pretrain.plan.parameters import Parameter
from pretrain.plan.wavefront import Link, Work, simulate

_LATENCY_SECONDS = 1e-5  # of a message between two hosts


@dataclass(frozen=True)
class StepTime:
    """A step's time and what makes it.

    Attributes:
        seconds: Of the step.
        recomputed_flops: Operations done a second time, all ranks.
        wavefront_efficiency: Share of the time that context-parallel ranks compute, at most 1; 1 without them.
    """

    seconds: float
    recomputed_flops: int
    wavefront_efficiency: float


def step_time(config: RunConfig, layout: Layout, parameters: list[Parameter], gpu: Gpu, utilisation: float) -> StepTime:
    """The time of a step.

    Args:
        config: The run.
        layout: Its processes.
        parameters: Its parameters.
        gpu: What each process computes on.
        utilisation: Share of the peak that is reached while a rank does not wait for its neighbour.
    """
    total, again = step_flops(config, parameters)["total"], recomputed_flops(config, parameters)
    head = 3 * head_flops(config.model, config.train.tokens_per_step)
    # Of one micro-batch on one rank; all have the same.
    rate = gpu.flops * utilisation * layout.gpus * layout.micro_batches
    layers = config.model.num_layers
    forward, backward = (total - head) / 3 / layers / rate, (2 * (total - head) / 3 + again) / layers / rate
    work = Work([forward] * layers, [backward] * layers, head=head / rate)
    efficiency = 1.0
    if layout.context > 1:
        # Of a layer, on average.
        size = sum(mixer.message(workload_of(config, layout)) for mixer in config.model.blocks) // layers
        link = Link(size, size, gpu.network_bytes, _LATENCY_SECONDS)
        efficiency = simulate([[work] * layout.context], link).efficiency
    return StepTime(layout.micro_batches * work.seconds / efficiency, again, efficiency)
