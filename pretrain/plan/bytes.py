"""Bytes on each rank while a step's last gradients are there, by part, and bytes of a checkpoint.

All ranks hold equally much. With N numbers on a tensor-parallel rank, w bytes of a weight, d data x context ranks, n
micro-batches, c the numbers of a bucket:

                 weights        gradients                  optimizer              communication
    ZeRO 0       w N            4 N                        8 N                    4 c
    ZeRO 1 fp32  4 N            4 N (n > 1) or 4 N / d     (4 + 8) N / d          4 c k
    ZeRO 1 bf16  2 N            2 N + 4 N                  (4 + 8) N / d          2 c
    ZeRO 2       w N            4 N / d                    (4 + 8) N / d          w c k
    ZeRO 3       w N / d        4 N / d                    (4 + 8) N / d          w c + w (gathered weights)

4 are the fp32 masters and 8 the two moments. k is 2 on a GPU, where reducing overlaps with the backward pass. These are
what DeepSpeed 0.19 allocates, found in its source and by walking the tensors of running engines. DeepSpeed pads the
decayed and the undecayed parameters each to a multiple of 2 d.

An offloaded optimizer is on the host: masters and moments 12 N / d, fp32 gradients 4 N / d, and beside them, at ZeRO 1
and 2, w N / d for the new weights and w for each number of the largest parameter, which the device has a copy of; at
ZeRO 2, where n > 1, and at ZeRO 3 gradients take 4 N / d more. On the device gradients stay at ZeRO 1 alone, where they
are whole until the last micro-batch.

Activations are what the forward pass keeps for the backward pass, and the largest working set behind it. They are an
estimate: it counts the tensors that autograd and the memory's own backward pass keep, as the modules' code makes them.
For one token of the T / CP that a rank has of a row, E the width, f = F / TP what it owns of the feed-forward, w bytes
of an activation, 4 of what is computed in float32, t the ranks of sequence parallelism:

    two norms        3 w E / t + w E                   input, scaled; what all read is whole
    feed-forward     4 w f                             gate and value, SiLU of the gate, product
    mixer            what each mixer says of its own   titans_mcore/mixers/costs.py, and beside it in a mixer's file
    head             2 w E / t and       4 V / TP + w V / TP   final norm; float32 probabilities, logits,
                                                       of train.loss_chunk tokens where it is set

A mixer's largest working set is there in one block at a time. Rows are taken to hold two documents where documents are
kept apart; segments are those of rows of one document.

With train.recompute every block keeps its input, w E / t, and the block with most of it at a time has all of the above;
states are those of one block, and one of every block that has received one. except_memory keeps every block's scan: its
states and one more, and queries, keys, values and reads.

A checkpoint, all ranks' files together, has with t tensor-parallel ranks, whatever the data ranks, the ZeRO stage and
the precision:

    weights/       4 t N       float32
    optimizer/     8 t N       two moments in float32

Names, shapes and random states come on top, a few hundred bytes for each parameter in a file and some 15 KB for each
rank: nothing at the sizes of the paper.
"""

from typing import Any, NamedTuple

from pretrain.config.run_config import RunConfig
from pretrain.engine import LARGEST_BUCKET
from pretrain.plan.layout import Layout, workload_of
from pretrain.plan.parameters import Parameter
from titans_mcore.mixers.costs import FLOAT32
from titans_mcore.parallel import padded_vocab_size

ZERO3_REUSE_NUMBERS = 1_000_000_000
_ZERO3_KEPT_WHOLE = 100_000
_MASTER, _MOMENTS = 4, 8
_OVERLAPPED_BUCKETS = 2


class Held(NamedTuple):
    """What a rank holds that does not depend on the batch; `activation_bytes` does."""

    layout: Layout
    parameters: list[Parameter]

    @property
    def numbers(self) -> int:
        """N."""
        return sum(p.on_rank for p in self.parameters)

    @property
    def whole(self) -> int:
        """N, with ZeRO each of the optimizer's groups padded to what the data x context ranks share evenly."""
        if self.layout.zero_stage == 0:
            return self.numbers
        counts = (sum(p.on_rank for p in self.parameters if p.decayed is kind) for kind in (True, False))
        multiple = 2 * self.layout.sharing
        return sum(-(-count // multiple) * multiple for count in counts)

    @property
    def share(self) -> int:
        """N / d."""
        return self.whole // self.layout.sharing

    @property
    def bucket(self) -> int:
        """Numbers in a bucket, as engine.deepspeed_config sets it."""
        even = self.numbers + self.numbers % 2
        return even if self.layout.context > 1 else min(LARGEST_BUCKET, even)

    @property
    def passing(self) -> int:
        """Bytes of the buffer through which offloaded gradients go, on the host and on the device."""
        if not self.layout.offload_optimizer or self.layout.zero_stage == 3:
            return 0
        return self.layout.bytes_per_weight * max(p.on_rank for p in self.parameters)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes on the device."""
        layout, weights = self.layout, self.share if self.layout.zero_stage == 3 else self.whole
        optimizer = _MOMENTS * self.whole if layout.zero_stage == 0 else (_MASTER + _MOMENTS) * self.share
        return {
            "weights": layout.bytes_per_weight * weights,
            "gradients": self._gradients(),
            "optimizer": 0 if layout.offload_optimizer else optimizer,
            "communication": self._communication(),
        }

    @property
    def host_parts(self) -> dict[str, int]:
        """Bytes of an offloaded optimizer on the host."""
        layout, w = self.layout, self.layout.bytes_per_weight
        accumulated = layout.zero_stage == 3 or (layout.zero_stage == 2 and layout.micro_batches > 1)
        beside = (0 if layout.zero_stage == 3 else w) + (FLOAT32 if accumulated else 0)
        size = (_MASTER + _MOMENTS + FLOAT32 + beside) * self.share + self.passing
        return {"optimizer": size if layout.offload_optimizer else 0}

    def _gradients(self) -> int:
        stage, w = self.layout.zero_stage, self.layout.bytes_per_weight
        if stage == 1 and self.layout.precision == "bf16":
            return (w + FLOAT32) * self.whole + self.passing
        if stage == 0 or (stage == 1 and self.layout.micro_batches > 1):
            return w * self.whole + self.passing
        return self.passing if self.layout.offload_optimizer else FLOAT32 * self.share

    def _communication(self) -> int:
        layout, w = self.layout, self.layout.bytes_per_weight
        if layout.sharing == 1 and layout.zero_stage == 0:
            return 0
        if layout.zero_stage == 3:
            # Parameters too small for DeepSpeed to divide stay whole between two uses.
            kept = sum(p.on_rank for p in self.parameters if p.on_rank <= _ZERO3_KEPT_WHOLE)
            return w * (self.bucket + kept + min(self.numbers - kept, ZERO3_REUSE_NUMBERS))
        own_buckets = layout.zero_stage == 2 or (layout.zero_stage == 1 and layout.precision == "fp32")
        return w * self.bucket * (_OVERLAPPED_BUCKETS if own_buckets else 1)


def rank_bytes(config: RunConfig, layout: Layout, parameters: list[Parameter]) -> dict[str, Any]:
    """What each rank holds: `bytes` and `host_bytes`, and `parts` and `host_parts` of them, by name."""
    held = Held(layout, parameters)
    parts, host = {**held.parts, **activation_bytes(config, layout)}, held.host_parts
    return {"parts": parts, "host_parts": host, "bytes": sum(parts.values()), "host_bytes": sum(host.values())}


def activation_bytes(config: RunConfig, layout: Layout) -> dict[str, int]:
    """Bytes on a rank, by part."""
    work, model, w = workload_of(config, layout), config.model, layout.bytes_per_weight
    norms = (3 * w / layout.token_ranks + w) * model.dim
    around = norms + 4 * w * model.ffn_dim / layout.tensor
    blocks, states = _kept_by_blocks(config, layout, around)
    together = min(config.parallel.in_flight, layout.micro_batches)  # forward passes that wait for their backward pass
    with_logits = min(together * work.tokens, config.train.loss_chunk or together * work.tokens)
    final_norm = 2 * w * model.dim / layout.token_ranks
    parts = {
        "activations": together * work.tokens * (blocks + final_norm),
        "memory_states": together * states,
        "memory_group_at_work": max(mixer.at_work(work) for mixer in model.mixers),
        "logits": with_logits * padded_vocab_size(model.vocab_size) / layout.tensor * (FLOAT32 + w),
    }
    return {name: int(size) for name, size in parts.items()}


def _kept_by_blocks(config: RunConfig, layout: Layout, around: float) -> tuple[float, float]:
    """Bytes of all blocks: of a token, `around` in each beside its mixer; of the states."""
    work, mixers, recompute = workload_of(config, layout), config.model.blocks, layout.recompute
    by_token = [around + mixer.kept(work) for mixer in mixers]
    states = [mixer.states_kept(work) for mixer in mixers]
    one_more = sum(mixer.state_bytes(work) for mixer in mixers)
    if recompute == "none":
        return sum(by_token), sum(states)
    inputs = len(mixers) * (layout.bytes_per_weight * config.model.dim / layout.token_ranks)
    if recompute == "block":
        return max(by_token) + inputs, max(states) + (one_more if layout.context > 1 else 0.0)
    return max(by_token) + inputs + sum(mixer.scan_kept(work) for mixer in mixers), sum(states) + one_more


def checkpoint_bytes(layout: Layout, parameters: list[Parameter]) -> dict[str, int]:
    """Bytes of the files of one checkpoint: `total` and by kind."""
    numbers = layout.tensor * Held(layout, parameters).numbers
    parts = {"weights": FLOAT32 * numbers, "optimizer": _MOMENTS * numbers}
    return {"total": sum(parts.values()), **parts}
