"""The model inside a DeepSpeed engine, under Megatron's groups; and one optimizer step."""

import contextlib
import io
import logging
import math
import os
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pretrain.checkpoint.carried import CarriedState
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import OptimizerConfig
from pretrain.data.batches import MicroBatch
from pretrain.muon import Muon
from pretrain.recovery.health import UpdateGate
from titans_mcore.parallel import (
    DeepSpeedGroups,
    context_place,
    device,
    memory_split,
    reduce_shared_gradients,
    sample_place,
    transformer_config,
)
from titans_mcore.telemetry import MemoryTelemetry
from titans_mcore.weights import model_tensors

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

# DeepSpeed chooses its accelerator when it is imported.
import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules

# DeepSpeed's collectives, which work; torch names successors that older versions lack.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

LARGEST_BUCKET = 500_000_000


class _Processor(CPU_Accelerator):
    """DeepSpeed's, which would look for compilers at start and compile C++ for an all-reduce that gloo has."""

    def create_op_builder(self, op_name: str) -> object:
        return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step found out."""

    loss: float
    """Mean cross-entropy over the tokens of the global batch, nats, before the update."""
    grad_norm: float
    """2-norm of the whole gradient, before clipping; infinite where it was not a number."""
    updated: bool = True
    """Whether the weights changed; not, where the loss was above its limit, or loss or gradient not a number."""


def resolve_precision(config: RunConfig) -> torch.dtype:
    """Type of the weights in forward and backward.

    Raises:
        ValueError: bf16 at a ZeRO stage that keeps no fp32 masters.
    """
    name = config.train.precision
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() else "fp32"
    if name == "bf16" and config.parallel.zero_stage == 0:
        raise ValueError(
            "parallel.zero_stage 0 keeps no fp32 masters of bf16 weights; use stage 1, 2 or 3, or train.precision fp32"
        )
    return torch.bfloat16 if name == "bf16" else torch.float32


def build_model(config: RunConfig, groups: ProcessGroupCollection) -> nn.Module:
    """The model with its initial weights, a function of the seed that `start` set.

    Raises:
        ValueError: It cannot be divided over the tensor-parallel ranks.
    """
    from titans_mcore.model import TitansModel

    parallel = config.parallel
    model = TitansModel(
        config.model,
        megatron_config(config),
        groups,
        memory_parallel=memory_split(config.model, parallel.memory_parallel, parallel.tensor),
        recompute=config.train.recompute,
        loss_chunk=config.train.loss_chunk,
    )
    if parallel.sequence:
        reduce_shared_gradients(model, groups.tp)
    if config.train.compile:
        layers: Any = model.layers
        for layer in layers:
            layer.mixer.compile_functions()
    return model.to(device())


def megatron_config(config: RunConfig) -> TransformerConfig:
    """Megatron's view of the run's model.

    Raises:
        ValueError: It cannot be divided over the tensor-parallel ranks.
    """
    return transformer_config(
        config.model,
        tensor_parallel=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence,
        memory_parallel=config.parallel.memory_parallel,
        dtype=resolve_precision(config),
        draw_on=device() if torch.cuda.is_available() else None,
    )


def build_engine(model: nn.Module, config: RunConfig, data_parallel: int) -> DeepSpeedEngine:
    """DeepSpeed's engine around the model; it owns optimizer, accumulation, clipping and data parallelism."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        set_accelerator(_Processor())
    if config.parallel.zero_stage == 3:
        # How often a mixer calls its parts depends on the documents in its rows, so on the rank. ZeRO 3 gathers in the
        # order of calls, which must be the same everywhere: a mixer's parameters come together.
        set_z3_leaf_modules(model, [mixer.module for mixer in config.model.mixers])
    os.environ.setdefault("LOCAL_RANK", "0")
    with without_chatter():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optimizer),
            config=deepspeed_config(model, config, data_parallel),
            mpu=DeepSpeedGroups(),
            dist_init_required=False,
        )
    engine.update_gate = UpdateGate(engine, device())
    return engine


def without_chatter() -> contextlib.AbstractContextManager[object]:
    """Drops what DeepSpeed prints on stdout while it builds; warnings, errors and stderr stay."""
    return contextlib.redirect_stdout(io.StringIO())


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with two groups: matrices, which are decayed, and vectors and marked parameters, which are not.

    Muon has a third one, the matrices of the blocks; embedding and output matrix stay AdamW's.
    """
    blocks: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        free = parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False)
        muon = config.name == "muon" and name.startswith("layers.") and parameter.ndim == 2
        (others if free else blocks if muon else decayed).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.name == "muon":
        groups = [group | {"matrices": False} for group in groups]
        muons = {"weight_decay": config.weight_decay, "matrices": True, "momentum": config.momentum}
        groups.insert(0, {"params": blocks, **muons})
    return (Muon if config.name == "muon" else torch.optim.AdamW)(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,  # the form that can leave an update out without asking the host: UpdateGate
    )


def deepspeed_config(model: nn.Module, config: RunConfig, data_parallel: int) -> dict[str, object]:
    """DeepSpeed's settings, all derived from ours."""
    bf16 = resolve_precision(config) == torch.bfloat16
    # Buckets are allocated at full size whatever the model; a small one needs no gigabytes.
    held = sum(p.numel() for p in model.parameters())
    bucket = held + held % 2  # DeepSpeed takes an even number
    if config.parallel.context == 1:
        # Context ranks may not wait for each other's gradients before the last state's gradient has come: one bucket.
        bucket = min(LARGEST_BUCKET, bucket)
    zero: dict[str, object] = {
        "stage": config.parallel.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # Reducing in the backward pass makes ranks wait for one another, which a wavefront must not.
        "overlap_comm": torch.cuda.is_available() and config.parallel.context == 1,
    }
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, object] = {
        # DeepSpeed's data ranks are data x context: those that share a row count as if each had one of its own.
        "train_batch_size": config.train.global_batch * config.parallel.context,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.accumulation(data_parallel),
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**31,
    }
    if bf16:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: list[MicroBatch],
    lr: float,
    carried: CarriedState | None = None,
    loss_limit: float = math.inf,
    telemetry: MemoryTelemetry | None = None,
    in_flight: int = 1,
) -> StepResult:
    """Forward, backward and update on this rank's micro-batches of one step.

    Every micro-batch, and every rank's part of one, has the same number of tokens, so the mean of the means is the mean
    over all tokens, however the global batch is shared out. The host learns how it went when the update is under way.

    Args:
        engine: Its model trains.
        micro_batches: All have the same shape; their number may change from step to step, alike on every rank.
        lr: Learning rate of this step.
        carried: What the rows of the step before left, and then those of this one; None where rows begin anew. Where
            the update is left out, it stays what it was.
        loss_limit: With a higher loss the update is left out.
        telemetry: Looks into the memories of the first micro-batch.
        in_flight: Forward passes before the first backward pass. Sums of gradients are the same, bit for bit.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    # DeepSpeed divides the loss by the number of micro-batches, and counts them from the start of the run to know the
    # last of a step, which is wrong as soon as their number changes: it is told.
    engine.set_train_batch_size(len(micro_batches) * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
    gate: UpdateGate = engine.update_gate
    before = dict(carried.states) if carried else {}
    loss_sum = torch.zeros((), device=device())
    losses: deque[Tensor] = deque()
    for begin in range(0, len(micro_batches), in_flight):
        for place, micro_batch in enumerate(micro_batches[begin : begin + in_flight], begin + 1):
            with telemetry.watching() if telemetry and place == 1 else contextlib.nullcontext():
                losses.append(token_losses(engine, micro_batch, place, carried).mean())
        for place in range(begin + 1, begin + len(losses) + 1):
            loss, last = losses.popleft(), place == len(micro_batches)
            engine.set_gradient_accumulation_boundary(last)
            engine.backward(loss)
            loss_sum += loss.detach()
            if last:
                mean_loss = _mean_over_data_ranks(loss_sum / len(micro_batches))
                gate.judge_loss(mean_loss, loss_limit)
                if engine.zero_optimization_stage() == 0:
                    gate.set_norm(_gradient_norm(engine.module))
            engine.step()
    norm, left_out = gate.result()
    found_loss, found_norm, skipped = torch.stack([mean_loss, norm, left_out.float()]).tolist()
    if carried and skipped:
        carried.states = before
    return StepResult(found_loss, found_norm, not skipped)


def token_losses(engine: DeepSpeedEngine, micro_batch: MicroBatch, place: int, carried: CarriedState | None) -> Tensor:
    """Cross-entropy of each token, (B, T), of the step's micro-batch at a place."""
    if carried is None:
        return engine(**own(micro_batch))
    # Where the very first step was left out there is nothing to go on from.
    before = [] if micro_batch.begins else carried.states.get(place, [])
    losses, carried.states[place] = engine(**own(micro_batch), states=before)
    return losses


def first_rank_loss(engine: DeepSpeedEngine, micro_batch: MicroBatch) -> float:
    """Mean cross-entropy of the rows of the first data rank, nats, in rows that begin anew. Nothing is learned.

    Collective: the other ranks compute theirs, because weights may have to be gathered.
    """
    engine.eval()
    with torch.no_grad():
        loss = engine(**own(micro_batch)).mean() * (sample_place().rank == 0)
    engine.train()
    dist.all_reduce(loss, group=DeepSpeedGroups().get_data_parallel_group())
    return float(loss) / context_place().ranks


def own(micro_batch: MicroBatch) -> dict[str, Tensor | None]:
    """This rank's tokens of it, where it computes, as the model takes them."""
    return micro_batch.part(*context_place()).arguments(device())


def full_precision_values(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """This tensor-parallel rank's weights in fp32, whole over the data ranks, one after the other.

    Collective: every rank takes them to the end.
    """
    module, parameters = engine.module, dict(engine.module.named_parameters())
    gathered = engine.zero_optimization_stage() == 3 or engine.bfloat16_enabled()
    for name, tensor in model_tensors(module).items():
        yield name, safe_get_full_fp32_param(parameters[name]) if gathered and name in parameters else tensor


def _mean_over_data_ranks(value: Tensor) -> Tensor:
    groups = DeepSpeedGroups()
    dist.all_reduce(value, group=groups.get_data_parallel_group())
    return value / groups.get_data_parallel_world_size()


def _gradient_norm(model: nn.Module) -> Tensor:
    """DeepSpeed keeps no norm at stage 0. What every tensor-parallel rank holds is counted once."""
    groups = DeepSpeedGroups()
    first = groups.get_tensor_model_parallel_rank() == 0
    counted = [
        p.grad
        for p in model.parameters()
        if p.grad is not None and (first or getattr(p, "tensor_model_parallel", False))
    ]
    squares = torch.stack([grad.float().square().sum() for grad in counted] or [torch.zeros((), device=device())])
    total = squares.sum()
    dist.all_reduce(total, group=groups.get_tensor_model_parallel_group())
    return total.sqrt()
