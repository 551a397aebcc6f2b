"""Operations of a step, and how long it takes: shared out evenly, with what is recomputed, and what ranks wait.

    seconds = (operations + recomputed operations) / (GPUs x peak x utilisation) / efficiency of the wavefront

A layer takes its share of the blocks' operations on one rank, twice that in the backward pass and once more where it is
recomputed; the head all of its own. Of C ranks that share a row the last one begins behind C - 1 layers and messages,
in the forward and in the backward pass of all micro-batches in flight; the head of all others fits into that time. So
equal layers have an efficiency of n L / (n L + C - 1). Where every layer's states compose, messages alone are waited
for, once each way; among layers that do not, those that do change nothing. Messages go at the network's speed and are
taken to be shorter than a layer; all collectives are part of the utilisation. Ranks whose layers' states compose do
more than one rank would, evenly over the layers, which counts as waiting. tests/pretrain/wavefront.py says the same
task by task.

Operations are of floating-point numbers; a multiplication and an addition each count one:

dense      2 x the numbers of a matrix for every token that it is applied to: each linear map once to each token, unless
           a mixer says how often, and how often to a persistent token (once for each micro-batch)
attention, memory, scan   what the mixers say of them (titans_mcore/mixers/costs.py, linear.py)

The backward pass counts twice the forward pass; what is computed a second time to save memory is counted apart, as it
takes time and is no work of the model's. Convolutions, norms and gates are left out: less than a per cent at the sizes
of the paper.
"""

from collections import Counter
from dataclasses import dataclass

from pretrain.config.run_config import RunConfig
from pretrain.plan.layout import Layout, workload_of
from pretrain.plan.parameters import Parameter, inside_block
from titans_mcore.config import TitansConfig
from titans_mcore.parallel import padded_vocab_size

_LATENCY_SECONDS = 1e-5  # of a message between two hosts


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know of one.

    Attributes:
        flops: Dense bf16 operations a second of its matrix units, from the manufacturer; half of the figure with
            sparsity where only that is printed.
        memory_bytes: Its memory.
        network_bytes: What one of them sends to another host in a second, with one adapter each.
        source: Where these stand.
    """

    flops: float
    memory_bytes: float
    network_bytes: float
    source: str


_HDR, _NDR = 25e9, 50e9  # NVIDIA InfiniBand at 200 and 400 Gb/s: the adapters of a DGX A100, and of H100 to B200

GPUS = {
    "a100": Gpu(312e12, 80e9, _HDR, "NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM: BF16 312 TFLOPS dense"),
    "h100": Gpu(989.5e12, 80e9, _NDR, "NVIDIA H100 Tensor Core GPU data sheet, SXM: BF16 1,979 TFLOPS with sparsity"),
    "h200": Gpu(989.5e12, 141e9, _NDR, "NVIDIA H200 Tensor Core GPU data sheet, SXM: BF16 1,979 TFLOPS with sparsity"),
    "b200": Gpu(2.25e15, 180e9, _NDR, "NVIDIA DGX B200 data sheet: 8 GPUs, BF16 36 PFLOPS with sparsity, 1,440 GB"),
}


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
    head_again = head_flops(config.model, config.train.tokens_per_step) if config.train.loss_chunk else 0
    head = 3 * head_flops(config.model, config.train.tokens_per_step)
    # Of one micro-batch on one rank; all have the same.
    rate = gpu.flops * utilisation * layout.gpus * layout.micro_batches
    layers = config.model.num_layers
    forward = (total - head) / 3 / layers / rate
    backward = 2 * forward + (again - head_again) / layers / rate
    alone = layers * (forward + backward) + (head + head_again) / rate
    efficiency = 1.0
    if layout.context > 1:
        blocks, tokens = config.model.blocks, config.train.tokens_per_step
        size = sum(mixer.message(workload_of(config, layout)) for mixer in blocks) / layers  # of a layer, on average
        more = sum(mixer.composing_flops(config.model, tokens) for mixer in blocks) / layers / rate
        passes = 2 if config.train.recompute == "none" else 3  # of the scans, the first of them forward
        forward, backward = forward + more, backward + passes * more
        waited = 2 * (size / gpu.network_bytes + _LATENCY_SECONDS)
        if not all(mixer.composes for mixer in blocks):
            waited += forward + backward
        shared = min(config.parallel.in_flight, layout.micro_batches)
        found = shared * (alone + layers * (1 + passes) * more) + (layout.context - 1) * waited
        efficiency = shared * alone / found
    return StepTime(layout.micro_batches * alone / efficiency, again, efficiency)


def messages_of(config: RunConfig, layout: Layout) -> dict[str, int]:
    """What a context-parallel rank sends to the next one in a step, rows of one document; nothing where it is alone.

    Returns:
        `states`, messages with the states of all layers, `headers` in front of those that do not compose, and `bytes`
        of the states. Their gradients come back in as many messages of the same size. Bytes are the most, where the
        window is wider than a rank's tokens; documents inside rows add masks and the chunk that one has opened.
    """
    n, work = layout.micro_batches if layout.context > 1 else 0, workload_of(config, layout)
    return {
        "states": n * sum(mixer.messages(config.model) for mixer in config.model.blocks),
        "headers": n * sum(not mixer.composes for mixer in config.model.blocks),
        "bytes": n * sum(mixer.message(work) for mixer in config.model.blocks),
    }


def step_flops(config: RunConfig, parameters: list[Parameter]) -> dict[str, int]:
    """Operations of one optimizer step on all ranks, forward and backward: `total` and by kind."""
    parts = {kind: 3 * flops for kind, flops in _forward(config, parameters).items()}
    return {"total": sum(parts.values()), **parts}


def recomputed_flops(config: RunConfig, parameters: list[Parameter]) -> int:
    """Operations of a step done a second time: the blocks' forward pass, or what train.recompute says of it, and the
    output matrix with train.loss_chunk."""
    head = head_flops(config.model, config.train.tokens_per_step)
    again = head if config.train.loss_chunk else 0
    if config.train.recompute == "none":
        return again
    forward = _forward(config, parameters)
    if config.train.recompute == "except_memory":
        forward.pop("memory")
    return again + sum(forward.values()) - head


def head_flops(model: TitansConfig, tokens: int) -> int:
    """Operations of the output matrix, forward."""
    return 2 * padded_vocab_size(model.vocab_size) * model.dim * tokens


def _forward(config: RunConfig, parameters: list[Parameter]) -> dict[str, int]:
    """Operations of a step's forward passes, by kind."""
    model, tokens = config.model, config.train.tokens_per_step
    persistent = config.train.global_batch // config.train.micro_batch * model.persistent_tokens
    found = Counter(dense=dense_flops(model, parameters, tokens, persistent), attention=0, memory=0)
    for mixer in model.blocks:
        found.update(mixer.flops(model, config.train.sequence_length, tokens, persistent))
    return dict(found)


def dense_flops(model: TitansConfig, parameters: list[Parameter], tokens: int, persistent: int) -> int:
    """Operations of the matrices outside memory and attention, forward.

    Args:
        model: The model.
        parameters: Its parameters.
        tokens: Tokens of the sequences.
        persistent: Persistent tokens, over all micro-batches.
    """
    total, mixers = head_flops(model, tokens), model.blocks
    for parameter in parameters:
        place = inside_block(parameter.name)
        if place is None or len(parameter.shape) != 2 or not parameter.name.endswith(".weight"):
            continue
        block, matrix = place
        name = matrix.removeprefix("mixer.").removesuffix(".weight")
        by_token, by_persistent = mixers[block].uses.get(name, (1, 0))
        total += 2 * parameter.count * (by_token * tokens + by_persistent * persistent)
    return total
