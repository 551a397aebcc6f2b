"""Collectives of one optimizer step on each rank, by group.

Bytes are those of the whole tensor: what is reduced, what is gathered, what is scattered. A group of one rank sends
nothing and is left out, and so are the few bytes of losses, gradient norms and stop signals.

Tensor group, for each micro-batch. With h the bytes of hidden states (T / CP, B, E) and p those of persistent tokens
(N, E), `Parts.enter` and Megatron's column map cost an all-reduce in the backward pass, `Parts.row` one in the forward
pass:

    embedding       h forward                       head            h backward
    cross-entropy   3 x T B float32 forward         SwiGLU          h forward, h backward
    a mixer         h forward, h backward at its border; p backward where it has persistent tokens; and what its spec
                    says beside (titans_mcore/mixers)

Under sequence parallelism the all-reduces at a block's border become all-gathers (ag) and reduce-scatters (rs); what is
all-reduced inside a mixer stays. Megatron gathers the input of a column map once more for its weight's gradient:

    embedding       rs forward, ag backward         head            ag forward, ag and rs backward
    SwiGLU          ag and rs forward, 2 ag and rs backward
    a mixer         ag and rs forward, ag and rs backward; no rs forward where it leaves by keeping its share
    norms           all-reduce of the gradients, 2 L + 1 of E numbers

Ranks that share the memory's matrices ("hidden") gather the gradient of what its heads answer, as many bytes as h where
they have E channels in all, for each pass over the tokens, and sum inside it.

Context group, for each micro-batch and layer: the state to the next rank behind a header that says what it is, its
gradients to the rank before. States that compose have no header, and convolutions' tails go by themselves. Calls and
bytes are what a rank sends that has both neighbours; bytes are the most, where the window is wider than a rank's
tokens. Documents inside rows add masks and the chunk that a document has opened.

Data group, data x context ranks, with N numbers on a tensor-parallel rank, w bytes each as the backward pass makes
them, n micro-batches:

    ZeRO 0          all-reduce w N
    ZeRO 1          all-reduce w N, all-gather of the new weights w N
    ZeRO 2          all-reduce n w N (every micro-batch; DeepSpeed reduces a bucket for all owners at once),
                    all-gather w N
    ZeRO 3          reduce-scatter n w N, all-gather of the weights that are kept divided, n w N_divided, and once of
                    those that are kept whole between updates, w N_whole (bytes.py)

How many calls DeepSpeed makes of it depends on how parameters fall into its buckets; the number given is the fewest.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.config.run_config import RunConfig
from pretrain.plan.bytes import (
    ZERO3_REUSE_NUMBERS,
    bucket_numbers,
    group_numbers,
    numbers_kept_whole,
    numbers_on_rank,
)
from pretrain.plan.layout import Layout, workload_of
from pretrain.plan.parameters import Parameter
from titans_mcore.mixers.costs import FLOAT32, total_sums

HEADER_BYTES = 8192


@dataclass(frozen=True)
class Collective:
    """One kind of collective in one step.

    Attributes:
        group: The ranks that take part, an axis of the layout; "data" are data x context ranks.
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
    if layout.context > 1:
        found += _context_group(config, layout)
    if layout.sharing > 1:
        found += _data_group(config, layout, parameters)
    return found


class _Operations(NamedTuple):
    """What a part of the model does in one micro-batch: (calls, bytes) by operation."""

    purpose: str
    all_reduce: tuple[int, int] = (0, 0)
    all_gather: tuple[int, int] = (0, 0)
    reduce_scatter: tuple[int, int] = (0, 0)


def _tensor_group(config: RunConfig, layout: Layout) -> list[Collective]:
    model, n, w = config.model, layout.micro_batches, layout.bytes_per_weight
    tokens = config.train.micro_batch * config.train.sequence_length // layout.context
    hidden, layers = tokens * model.dim * w, model.num_layers
    if layout.sequence:
        norms = 2 * layers + 1
        parts = [
            _Operations("feed-forward", (0, 0), (layers * 3, layers * 3 * hidden), (layers * 2, layers * 2 * hidden)),
            _Operations("embedding and head", (0, 0), (3, 3 * hidden), (2, 2 * hidden)),
            _Operations("gradients of the norms", (norms, norms * model.dim * w)),
        ]
    else:
        parts = [
            _Operations("feed-forward", (layers * 2, layers * 2 * hidden)),
            _Operations("embedding and head", (2, 2 * hidden)),
        ]
    parts = [_mixers(config, layout), *parts, _Operations("cross-entropy", (3, 3 * tokens * FLOAT32))]
    if layout.hidden and any(mixer.memory for mixer in model.mixers):
        parts.append(_hidden_memories(config, layout))
    return [
        Collective("tensor", operation, part.purpose, n * calls, n * size)
        for part in parts
        for operation, (calls, size) in zip(part._fields[1:], part[1:], strict=True)
        if calls
    ]


def _mixers(config: RunConfig, layout: Layout) -> _Operations:
    """Of all blocks: at their border and inside."""
    work, mixers = workload_of(config, layout), config.model.blocks
    hidden, crossings = work.activation, sum(mixer.border for mixer in mixers)
    inside = total_sums([mixer.reductions(work) for mixer in mixers])
    border = crossings, crossings * hidden
    if not layout.sequence:
        return _Operations("mixers", total_sums([inside, border]))
    gathers = 2 * (len(mixers) + sum(mixer.front for mixer in mixers))
    return _Operations("mixers", inside, (gathers, gathers * hidden), border)


def _hidden_memories(config: RunConfig, layout: Layout) -> _Operations:
    """Of all blocks: sums inside the memories, and the gradients of their answers, gathered."""
    work, mixers = workload_of(config, layout), [mixer for mixer in config.model.blocks if mixer.memory]
    passes, answers = total_sums([mixer.hidden_answers(work) for mixer in mixers])
    gathered = answers * config.model.memory_shape.channels * layout.bytes_per_weight
    return _Operations("memories", total_sums([mixer.hidden_sums(work) for mixer in mixers]), (passes, gathered))


def _context_group(config: RunConfig, layout: Layout) -> list[Collective]:
    n, work, mixers = layout.micro_batches, workload_of(config, layout), config.model.blocks
    headers = n * sum(not mixer.composes for mixer in mixers)
    calls, size = total_sums([(n * mixer.messages(config.model), n * mixer.message(work)) for mixer in mixers])
    found = [Collective("context", "send", "headers, to the next rank", headers, headers * HEADER_BYTES)]
    return [
        *(found if headers else []),
        Collective("context", "send", "states, to the next rank", calls, size),
        Collective("context", "send", "gradients of states, to the rank before", calls, size),
    ]


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
