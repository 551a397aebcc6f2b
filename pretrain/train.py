"""Trains a model: `python -m pretrain.train --config FILE --run-dir DIR`, alone or under launch/torchrun.sh."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.blend import Blend
from pretrain.carried import CarriedState
from pretrain.checkpoint import Progress, checkpoint_folder, find_resume_point, on_rank_0, restore, save
from pretrain.command_line import parse
from pretrain.config import RunConfig
from pretrain.config_files import write_run_config
from pretrain.data import Batches, NumberedSamples, Samples
from pretrain.ending import EXIT_FAILED, StopRequest, TrainingFailed, end_with, mistakes_as_sentences
from pretrain.engine import (
    StepResult,
    build_engine,
    build_model,
    megatron_config,
    resolve_precision,
    train_step,
)
from pretrain.folders import RunData, keep_tokenizer, open_data
from pretrain.inloop.evaluations import Evaluations
from pretrain.launcher import follow_launcher, record_success
from pretrain.lock import lock_run_folder
from pretrain.metrics import Metrics
from pretrain.schedule import learning_rate, portion_of, tokens_after
from titans_mcore.parallel import DeepSpeedGroups, device, memory_split, sample_place, start, stop
from titans_mcore.weights import find_checkpoint


def train(arguments: Sequence[str]) -> None:
    """The whole run, from the command line to the last checkpoint.

    Raises:
        SystemExit: 2 with a sentence on stderr for a mistake in what was asked.
        TrainingFailed: The loss or the gradient is no longer a number.
    """
    with mistakes_as_sentences():
        command = parse(arguments)
        config, run_dir = command.config, command.run_dir
        data = open_data(config)
        # The division over ranks, before anything is started.
        megatron_config(config)
        parallel = config.parallel
        groups = start(
            parallel.tensor, parallel.context, seed=config.train.seed, timeout_seconds=parallel.timeout_seconds
        )
        data_rank, data_parallel = sample_place()
        on_rank_0(lambda: lock_run_folder(run_dir))
        on_rank_0(lambda: keep_tokenizer(data, run_dir))
        resume = find_resume_point(config, data.fingerprint, run_dir)
        progress = resume[1] if resume else Progress()
        if progress.step >= config.train.steps:
            say(f"{run_dir} is finished: step {progress.step} of {config.train.steps}; raise --train.steps to go on")
            return
        samples, heldout = open_samples(config, data, run_dir)
        evaluations = Evaluations(config, data, run_dir, heldout)
        batches = Batches(samples, config, data_rank, data_parallel)
        model = build_model(config, groups)
        describe(model, config, data_parallel)
        engine = build_engine(model, config, data_parallel)
        carried = CarriedState(config.model.variant) if config.data.carry_state else None
        if resume:
            restore(engine, config, resume[0], carried)
            say(f"going on from {resume[0]}, after step {progress.step}")
        if dist.get_rank() == 0:
            write_run_config(config, run_dir)

    metrics = Metrics(config, run_dir, resumed_step=progress.step, rank=dist.get_rank())
    stop_request = StopRequest()
    began = time.perf_counter()
    for step in range(progress.step + 1, config.train.steps + 1):
        started = time.perf_counter()
        micro_batches = batches.fetch(step - 1)
        lr = rate_of(step, config)
        result = train_step(engine, micro_batches, lr, carried)
        values = measured(result, lr, step, config, time.perf_counter() - started, batches.waited_seconds)
        check_finite(result, step, run_dir)
        stopping = stop_request.seen_by_any_rank()
        last = step == config.train.steps
        for kind, found in evaluations.after(engine, step):
            values |= {"heldout_loss": found["loss"]} if kind == "heldout" else {f"{kind}_{found['name']}": found}
        metrics.step(step, values)
        if last or stopping or due(step, config.checkpoint.every_steps):
            save(engine, config, data.fingerprint, run_dir, step, carried)
        if stopping and not last:
            say(f"stopped by {stopping} after step {step}, which is saved; the same command goes on from there")
            break
    else:
        say(f"done: {summary(values, config, run_dir)}, {time.perf_counter() - began:.0f} s")
    batches.close()
    metrics.close()


def open_samples(config: RunConfig, data: RunData, run_dir: Path) -> tuple[NumberedSamples, NumberedSamples | None]:
    """Training samples, and held-out ones unless none are asked for; both in the shares of the folders."""
    start_token = data.tokenizer.bos_id if config.data.reset_documents else None

    def of_folder(prefixes: list[str], strands: int = 0) -> Samples:
        return Samples(
            prefixes,
            run_dir / "index",
            vocab_size=config.model.vocab_size,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            start_token=start_token,
            strands=strands,
        )

    def blended(prefixes: list[list[str]], strands: int = 0) -> NumberedSamples:
        parts = [of_folder(one, strands) for one in prefixes]
        return Blend(parts, [folder.share for folder in data.folders]) if len(parts) > 1 else parts[0]

    strands = config.train.global_batch if config.data.carry_state else 0
    samples = blended([folder.manifest.train_prefixes(folder.path) for folder in data.folders], strands)
    if not config.evaluate.heldout_sequences:
        return samples, None
    return samples, blended([[folder.manifest.heldout_prefix(folder.path)] for folder in data.folders])


def rate_of(step: int, config: RunConfig) -> float:
    """Learning rate of a step counted from 1."""
    return learning_rate(
        step,
        peak=config.optimizer.lr,
        warmup_steps=config.schedule.warmup_steps,
        total_steps=config.train.steps,
        min_fraction=config.schedule.min_lr_fraction,
    )


def measured(
    result: StepResult, lr: float, step: int, config: RunConfig, seconds: float, wait_seconds: float
) -> dict[str, Any]:
    """The numbers of a step, under their names in metrics.jsonl."""
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": tokens_after(step, config.train),
        "tokens_per_second": portion_of(step, config.train).samples * config.train.sequence_length / seconds,
        "seconds": seconds,
        "data_wait_seconds": wait_seconds,
    }


def check_finite(result: StepResult, step: int, run_dir: Path) -> None:
    """Raises TrainingFailed when loss or gradient is not finite; all ranks have the same numbers."""
    for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
        if not abs(value) < float("inf"):
            try:
                saved = f"the newest checkpoint is {find_checkpoint(run_dir)}"
            except ValueError:
                saved = "no checkpoint is there yet"
            raise TrainingFailed(
                f"the {name} is {value} at step {step}; nothing of this step was saved, {saved}; "
                "a smaller optimizer.lr or a longer schedule.warmup_steps is the usual remedy"
            )


def due(step: int, every_steps: int) -> bool:
    """Whether something happens after this step; every 0 steps is never."""
    return every_steps > 0 and step % every_steps == 0


def describe(model: torch.nn.Module, config: RunConfig, data_parallel: int) -> None:
    """Says what is about to be trained, and on what."""
    parameters = torch.tensor(sum(p.numel() for p in model.parameters() if is_counted(p)))
    dist.all_reduce(parameters, group=DeepSpeedGroups().get_tensor_model_parallel_group())
    say(
        f"{config.model.variant}, {int(parameters):,} parameters, {resolve_precision(config)} on {device().type} | "
        f"{layout(config, data_parallel)}, "
        f"{torch.get_num_threads()} threads | {config.train.tokens_per_step:,} tokens a step"
    )
    if config.schedule.warmup_steps >= config.train.steps:
        say(f"note: the warm-up of {config.schedule.warmup_steps} steps is as long as the run")
    tokens = tokens_after(config.train.steps - 1, config.train)
    for name in ("batch_warmup_tokens", "sequence_warmup_tokens"):
        if tokens < (needed := getattr(config.train, name)):
            say(f"note: train.{name} is {needed:,}, but the last step begins after {tokens:,} tokens")


def layout(config: RunConfig, data_parallel: int) -> str:
    """How the run is laid out, in a few words."""
    parallel = config.parallel
    words = [f"tensor {parallel.tensor}"]
    if parallel.context > 1:
        words.append(f"context {parallel.context}")
    words.append(f"data {data_parallel}")
    extras = [f"ZeRO {parallel.zero_stage}"]
    if parallel.offload_optimizer:
        extras.append("optimizer on the host")
    if parallel.tensor > 1 and config.model.variant != "transformer":
        extras.append(f"memory by {memory_split(config.model, parallel.memory_parallel, parallel.tensor)}")
    if parallel.sequence:
        extras.append("sequence parallel")
    if config.train.recompute != "none":
        extras.append(f"recomputing {config.train.recompute.replace('_', ' ')}")
    return ", ".join([" x ".join(words), *extras])


def is_counted(parameter: torch.Tensor) -> bool:
    """Whether this rank counts a parameter: its part of a divided one, rank 0 those that all hold."""
    first = DeepSpeedGroups().get_tensor_model_parallel_rank() == 0
    return first or getattr(parameter, "tensor_model_parallel", False)


def summary(values: dict[str, Any], config: RunConfig, run_dir: Path) -> str:
    """What the run ended with."""
    loss = f"held-out loss {values['heldout_loss']:.4f} nats a token, " if "heldout_loss" in values else ""
    return f"{loss}loss {values['loss']:.4f}, {checkpoint_folder(run_dir, config.train.steps)}"


def say(sentence: str) -> None:
    """Prints a line, once for all ranks."""
    if dist.get_rank() == 0:
        print(sentence, flush=True)


def main() -> None:
    """Runs the command line."""
    follow_launcher()
    try:
        train(sys.argv[1:])
    except TrainingFailed as error:
        end_with(error, EXIT_FAILED)
    stop()
    record_success()


if __name__ == "__main__":
    main()
