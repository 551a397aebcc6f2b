"""Collectives of one optimizer step on each rank, by group.

Bytes are those of the whole tensor: what is reduced, what is gathered, what is scattered. A group of one rank sends
nothing and is left out, and so are the few bytes of losses, gradient norms and stop signals.

Tensor group, for each micro-batch. With h the bytes of hidden states (T, B, E) and p those of persistent tokens (N, E),
`Parts.enter` and Megatron's column map cost an all-reduce in the backward pass, `Parts.row` one in the forward pass:

    embedding       h forward                       head            h backward
    cross-entropy   3 x T B float32 forward         SwiGLU          h forward, h backward
    transformer     h forward, h backward           lmm, mag        h forward, h backward, p backward
    mal             2 h forward, 2 h backward, p forward, 2 p backward
    mac             h backward for the block, then by segment: 3 forward, 2 backward of the segment's share of h;
                    p backward

Data group, with N numbers on a tensor-parallel rank, w bytes each as the backward pass makes them, n micro-batches:

    ZeRO 0          all-reduce w N
    ZeRO 1          all-reduce w N, all-gather of the new weights w N
    ZeRO 2          all-reduce n w N (every micro-batch; DeepSpeed reduces a bucket for all owners at once),
                    all-gather w N
    ZeRO 3          reduce-scatter n w N, all-gather of the weights that are kept divided, n w N_divided, and once of
                    those that are kept whole between updates, w N_whole (rank_bytes.py)

How many calls DeepSpeed makes of it depends on how parameters fall into its buckets; the number given is the fewest.
"""

import math
from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.planning.layout import Layout
from pretrain.planning.parameters import Parameter
from pretrain.planning.rank_bytes import (
    ZERO3_REUSE_NUMBERS,
    bucket_numbers,
    group_numbers,
    numbers_kept_whole,
    numbers_on_rank,
)

_FLOAT32 = 4


@dataclass(frozen=True)
class Collective:
    """One kind of collective in one step.

    Attributes:
        group: The ranks that take part, an axis of the layout.
        operation: Its name.
        purpose: What it carries.
        calls: How often; the fewest, in the data group.
        bytes: Of the tensors, all calls together.
    """

    group: str
    operation: str
    purpose: str
    calls: int
    bytes: int


def collectives_of(config: RunConfig, layout: Layout, parameters: list[Parameter]) -> list[Collective]:
    """Collectives of a step on each rank, group after group; rows of one document."""
    found: list[Collective] = []
    if layout.tensor > 1:
        found += _tensor_group(config, layout)
    if layout.data > 1:
        found += _data_group(config, layout, parameters)
    return found


def _tensor_group(config: RunConfig, layout: Layout) -> list[Collective]:
    model, n, w = config.model, layout.micro_batches, layout.bytes_per_weight
    tokens = config.train.micro_batch * config.train.sequence_length
    hidden, persistent = tokens * model.dim * w, model.persistent_tokens * model.dim * w
    calls, whole, of_persistent = _mixer(config)

    def row(purpose: str, calls: int, size: int) -> Collective:
        return Collective("tensor", "all_reduce", purpose, n * calls, n * size)

    layers = model.num_layers
    return [
        row("mixers", layers * calls, layers * (whole * hidden + of_persistent * persistent)),
        row("feed-forward", layers * 2, layers * 2 * hidden),
        row("embedding and head", 2, 2 * hidden),
        row("cross-entropy", 3, 3 * tokens * _FLOAT32),
    ]


def _mixer(config: RunConfig) -> tuple[int, int, int]:
    """Of one block and micro-batch: calls, how many times h, how many times p."""
    model = config.model
    some = int(model.persistent_tokens > 0)
    if model.variant == "transformer":
        return 2, 2, 0
    if model.variant == "mac":
        segments = math.ceil(config.train.sequence_length / model.segment_length)
        return 1 + 5 * segments + some, 6, some
    if model.variant == "mal":
        return 4 + 3 * some, 4, 3 * some
    return 2 + some, 2, some


def _data_group(config: RunConfig, layout: Layout, parameters: list[Parameter]) -> list[Collective]:
    n, w, stage = layout.micro_batches, layout.bytes_per_weight, layout.zero_stage
    numbers, bucket = numbers_on_rank(parameters, layout), bucket_numbers(parameters, layout)
    buckets = math.ceil(numbers / bucket)
    updates = len(group_numbers(parameters, layout))
    if stage == 3:
        kept = numbers_kept_whole(parameters, layout)
        divided = numbers - kept
        # Past the distance at which DeepSpeed keeps what it gathered, the backward pass gathers again.
        again = max(0, divided - ZERO3_REUSE_NUMBERS // 2)
        return [
            Collective("data", "reduce_scatter", "gradients", n * buckets, n * w * numbers),
            Collective("data", "all_gather", "weights, by micro-batch", n * min(divided, 1), n * w * (divided + again)),
            Collective("data", "all_gather", "small weights, after the update", min(kept, 1), w * kept),
        ]
    reductions = n if stage == 2 else 1
    found = [Collective("data", "all_reduce", "gradients", reductions * buckets, reductions * w * numbers)]
    if stage:
        found.append(Collective("data", "all_gather", "new weights", updates, w * numbers))
    return found
