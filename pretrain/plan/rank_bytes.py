"""Bytes on each rank while a step's last gradients are there, by part; all ranks hold equally much.

With N numbers on a tensor-parallel rank, w bytes of a weight, d data x context ranks, n micro-batches, c the numbers of
a bucket:

                 weights        gradients                  optimizer              communication
    ZeRO 0       w N            4 N                        8 N                    4 c
    ZeRO 1 fp32  4 N            4 N (n > 1) or 4 N / d     (4 + 8) N / d          4 c k
    ZeRO 1 bf16  2 N            2 N + 4 N                  (4 + 8) N / d          2 c
    ZeRO 2       w N            4 N / d                    (4 + 8) N / d          w c k
    ZeRO 3       w N / d        4 N / d                    (4 + 8) N / d          w c + w (gathered weights)

4 are the fp32 masters and 8 the two moments. k is 2 on a GPU, where reducing overlaps with the backward pass. These are
what DeepSpeed 0.19 allocates, found in its source and by walking the tensors of running engines. DeepSpeed pads the
decayed and the undecayed parameters each to a multiple of 2 d. Activations have a file of their own.

An offloaded optimizer is on the host: masters and moments 12 N / d, fp32 gradients 4 N / d, and beside them, at ZeRO 1
and 2, w N / d for the new weights and w for each number of the largest parameter, which the device has a copy of; at
ZeRO 2, where n > 1, and at ZeRO 3 gradients take 4 N / d more. On the device gradients stay at ZeRO 1 alone, where they
are whole until the last micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.config.run_config import RunConfig
from pretrain.plan.activations import activation_bytes
from pretrain.plan.layout import Layout
from pretrain.plan.parameters import Parameter

LARGEST_BUCKET = 500_000_000
ZERO3_REUSE_NUMBERS = 1_000_000_000
_ZERO3_KEPT_WHOLE = 100_000
_MASTER, _MOMENTS, _FLOAT32 = 4, 8, 4
_OVERLAPPED_BUCKETS = 2


@dataclass(frozen=True)
class RankBytes:
    """What one rank holds.

    Attributes:
        rank: Of all processes.
        tensor_rank: Its place in the tensor group.
        context_rank: Its place among the ranks that share rows.
        data_rank: Its place among the ranks, or groups of ranks, with different rows.
        parts: Bytes by part, where it computes.
        host_parts: Bytes by part, in the host's memory.
    """

    rank: int
    tensor_rank: int
    context_rank: int
    data_rank: int
    parts: dict[str, int]
    host_parts: dict[str, int]

    @property
    def bytes(self) -> int:
        """All parts where it computes."""
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """All parts in the host's memory."""
        return sum(self.host_parts.values())


class Held(NamedTuple):
    """What the formulas of the parts are functions of."""

    layout: Layout
    parameters: list[Parameter]

    @property
    def whole(self) -> int:
        """N with the padding that ZeRO adds."""
        if self.layout.zero_stage == 0:
            return numbers_on_rank(self.parameters, self.layout)
        return sum(group_numbers(self.parameters, self.layout))

    @property
    def share(self) -> int:
        """N / d."""
        return self.whole // self.layout.sharing

    @property
    def passing(self) -> int:
        """Bytes of the buffer through which offloaded gradients go, on the host and on the device."""
        if not self.layout.offload_optimizer or self.layout.zero_stage == 3:
            return 0
        return self.layout.bytes_per_weight * max(p.on_rank for p in self.parameters)


def _weights(held: Held) -> int:
    return held.layout.bytes_per_weight * (held.share if held.layout.zero_stage == 3 else held.whole)


def _gradients(held: Held) -> int:
    stage, w = held.layout.zero_stage, held.layout.bytes_per_weight
    if stage == 1 and held.layout.precision == "bf16":
        return (w + _FLOAT32) * held.whole + held.passing
    if stage == 0 or (stage == 1 and held.layout.micro_batches > 1):
        return w * held.whole + held.passing
    return held.passing if held.layout.offload_optimizer else _FLOAT32 * held.share


def _optimizer(held: Held) -> int:
    if held.layout.offload_optimizer:
        return 0
    return _MOMENTS * held.whole if held.layout.zero_stage == 0 else (_MASTER + _MOMENTS) * held.share


def _communication(held: Held) -> int:
    layout = held.layout
    if layout.sharing == 1 and layout.zero_stage == 0:
        return 0
    bucket = layout.bytes_per_weight * bucket_numbers(held.parameters, layout)
    if layout.zero_stage == 3:
        kept = numbers_kept_whole(held.parameters, layout)
        gathered = min(numbers_on_rank(held.parameters, layout) - kept, ZERO3_REUSE_NUMBERS)
        return bucket + layout.bytes_per_weight * (kept + gathered)
    own_buckets = layout.zero_stage == 2 or (layout.zero_stage == 1 and layout.precision == "fp32")
    return bucket * (_OVERLAPPED_BUCKETS if own_buckets else 1)


def _host_optimizer(held: Held) -> int:
    layout, w = held.layout, held.layout.bytes_per_weight
    if not layout.offload_optimizer:
        return 0
    accumulated = layout.zero_stage == 3 or (layout.zero_stage == 2 and layout.micro_batches > 1)
    beside = (0 if layout.zero_stage == 3 else w) + (_FLOAT32 if accumulated else 0)
    return (_MASTER + _MOMENTS + _FLOAT32 + beside) * held.share + held.passing


# What does not depend on the batch; activations.PARTS is what does.
PARTS: dict[str, Callable[[Held], int]] = {
    "weights": _weights,
    "gradients": _gradients,
    "optimizer": _optimizer,
    "communication": _communication,
}

HOST_PARTS: dict[str, Callable[[Held], int]] = {"optimizer": _host_optimizer}


def ranks_of(config: RunConfig, layout: Layout, parameters: list[Parameter]) -> list[RankBytes]:
    """Every rank, as Megatron orders them: tensor-parallel ranks are neighbours, then come those that share rows."""
    held = Held(layout, parameters)
    parts = {**{name: formula(held) for name, formula in PARTS.items()}, **activation_bytes(config, layout)}
    host = {name: formula(held) for name, formula in HOST_PARTS.items()}
    found = []
    for rank in range(layout.gpus):
        group, tensor_rank = divmod(rank, layout.tensor)
        data_rank, context_rank = divmod(group, layout.context)
        found.append(RankBytes(rank, tensor_rank, context_rank, data_rank, parts, host))
    return found


def numbers_on_rank(parameters: list[Parameter], layout: Layout) -> int:
    """Parameters N of one tensor-parallel rank."""
    return sum(p.on_rank for p in parameters)


def group_numbers(parameters: list[Parameter], layout: Layout) -> list[int]:
    """Numbers in each of the optimizer's groups, padded to what the data x context ranks share evenly."""
    counts = [sum(p.on_rank for p in parameters if p.decayed is kind) for kind in (True, False)]
    multiple = 2 * layout.sharing
    return [-(-count // multiple) * multiple for count in counts if count]


def bucket_numbers(parameters: list[Parameter], layout: Layout) -> int:
    """Numbers in a bucket, as engine.deepspeed_config sets it."""
    held = numbers_on_rank(parameters, layout)
    held += held % 2
    return held if layout.context > 1 else min(LARGEST_BUCKET, held)


def numbers_kept_whole(parameters: list[Parameter], layout: Layout) -> int:
    """ZeRO 3: numbers in parameters too small for DeepSpeed to divide between two uses."""
    return sum(p.on_rank for p in parameters if p.on_rank <= _ZERO3_KEPT_WHOLE)
