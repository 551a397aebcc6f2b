"""Trains a model: `python -m pretrain.train --config NAME --run-dir DIR`, alone or under launch/torchrun.sh."""

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.checkpoint.carried import CarriedState
from pretrain.checkpoint.format import FailedOnRank0, RunProgress, checkpoint_folder, on_rank_0
from pretrain.checkpoint.resume import begin_with, certificate, check_loss, find_resume_point, restore
from pretrain.checkpoint.retention import check_room
from pretrain.checkpoint.save import Saver, sweep
from pretrain.config.command_line import parse
from pretrain.config.files import write_run_config
from pretrain.config.run_config import RunConfig
from pretrain.data.batches import Batches
from pretrain.data.folders import check_shards, keep_tokenizer, open_data, open_samples
from pretrain.engine import build_engine, build_model, megatron_config, resolve_precision
from pretrain.evaluate.evaluations import Evaluations
from pretrain.launch.preflight import compare_hosts
from pretrain.launch.status import follow_launcher, record_success
from pretrain.recovery.ending import (
    StopRequest,
    TrainingFailed,
    ask_for_requeue,
    end_with,
    mistakes_as_sentences,
    withdraw_requeue,
)
from pretrain.recovery.hangs import is_communication, record_flights, say_stalled, unreached, write_flights
from pretrain.recovery.health import Health
from pretrain.recovery.recover import recover
from pretrain.recovery.rewinds import Rewinds
from pretrain.report.metrics import Metrics
from pretrain.report.sinks import check_sinks
from pretrain.run import Run, lock_run_folder
from pretrain.schedule import tokens_after
from titans_mcore.command_line import try_output
from titans_mcore.config import TitansConfig
from titans_mcore.linear.fla import why_not_fla
from titans_mcore.memory.fused import why_not_fused
from titans_mcore.memory.native import why_not_native
from titans_mcore.memory.rule import Memory, Network, Rule
from titans_mcore.parallel import DeepSpeedGroups, device, memory_split, sample_place, start, stop, tighten_timeouts


def train(arguments: Sequence[str]) -> None:
    """The whole run, from the command line to the last checkpoint.

    Raises:
        SystemExit: 2 with a sentence on stderr for a mistake in what was asked.
        TrainingFailed: The run cannot go on, or its last checkpoint could not be saved.
    """
    began = time.monotonic()
    with mistakes_as_sentences():
        command = parse(arguments)
        try_output(command.run_dir, "--run-dir", folder=True)
        run, done = open_run(command.config, command.run_dir, verify=command.verify_resume)
    if run is None:
        return

    stop_request = StopRequest(began, run.config.train.stop_after_minutes)
    try:
        learn(run, done, stop_request)
    except FailedOnRank0 as error:
        raise TrainingFailed(f"{error}, after step {run.current_step}") from error
    except RuntimeError as error:
        if not is_communication(error):
            raise
        write_flights(run.run_dir)
        raise TrainingFailed(run.roll_call.report(error, run.current_step)) from error
    run.close()


def learn(run: Run, done: int, stop_request: StopRequest) -> None:
    """The steps of a run, and its last checkpoint.

    Args:
        run: Of `open_run`.
        done: Steps done before.
        stop_request: Ends the run after a step.

    Raises:
        TrainingFailed: The run cannot go on, or its last checkpoint could not be saved.
    """
    config, steps = run.config, run.config.train.steps
    began, stopping, first = time.monotonic(), "", run.rewinds.step_after(done)
    while (step := run.rewinds.step_after(done)) <= steps and not stopping:
        following = run.rewinds.step_after(step)
        values, verdict = run.step(step, following)
        stopping, writing = stop_request.exchange(run.saver.busy)
        if run.saver.pending and not writing:
            run.finish_save()

        if verdict.action in ("rewind", "stop"):
            run.metrics.step(step, values)
            done = recover(run, step, verdict)
            continue
        if verdict.action != "go on":
            run.metrics.event(step, "bad_step", f"note: {verdict.reason} at step {step}; {verdict.action}")

        last = following > steps
        if last or not stopping:  # a signal leaves two minutes, perhaps
            values |= run.evaluate(step, following)
        if last or stopping or due(step, config.checkpoint.every_steps):
            values["save_stall_seconds"] = run.begin_save(step, values.get("heldout_loss"))
        run.metrics.step(step, values)
        run.prove(step)
        if step == first:
            tighten_timeouts(config.parallel.step_timeout_seconds)
        done = step

    if run.saver.pending:
        run.finish_save()
    if run.save_error:
        raise TrainingFailed(f"the last checkpoint could not be saved: {run.save_error}; make room and start again")
    if step <= steps:
        on_rank_0(lambda: ask_for_requeue(run.run_dir, stopping, done, steps, run.metrics.attempt))
        say(f"stopped by {stopping} after step {done}, which is saved; the same command goes on from there")
    else:
        say(f"done: {summary(values, done, run)}, {time.monotonic() - began:.0f} s")


def open_run(config: RunConfig, run_dir: Path, *, verify: bool) -> tuple[Run | None, int]:
    """Everything that the steps use, as an earlier attempt left it, and the steps done. Collective.

    Returns:
        No run when all its steps are done.

    Raises:
        ValueError: Something that was asked for does not fit.
    """
    megatron_config(config)  # the division over ranks, before anything is started
    record_flights(run_dir)
    groups = join_ranks(config)
    compare_hosts(run_dir)
    data = open_data(config)
    check_sinks(config.logging)
    data_rank, data_parallel = sample_place()
    on_rank_0(lambda: lock_run_folder(run_dir))
    on_rank_0(lambda: withdraw_requeue(run_dir))
    on_rank_0(lambda: sweep(run_dir))
    on_rank_0(lambda: keep_tokenizer(data, run_dir))
    checked = on_rank_0(lambda: check_shards(config, data, run_dir))
    point = find_resume_point(config, data.fingerprint, run_dir)
    progress = point.progress if point else RunProgress()
    rewinds = on_rank_0(lambda: Rewinds.read(run_dir))
    if rewinds.step_after(progress.step) > config.train.steps:
        say(f"{run_dir} is finished: step {progress.step} of {config.train.steps}; raise --train.steps to go on")
        return None, progress.step
    samples, heldout = open_samples(config, data, run_dir)
    evaluations = Evaluations(config, data, run_dir, heldout)
    batches = Batches(samples, config, data_rank, data_parallel, say_stalled)
    model = build_model(config, groups)
    parameters = describe(model, config, data_parallel)
    on_rank_0(lambda: check_room(config, run_dir, parameters))
    say(checked)
    if config.train.weights_from and not point:
        say(f"beginning with the weights of {begin_with(model, config)}")
    engine = build_engine(model, config, data_parallel)
    carried = CarriedState(config.model) if config.data.carry_state else None
    health, saver = Health(config.health), Saver(engine, config, data.fingerprint, run_dir)
    if point:
        restore(engine, config, point, carried)
        health.load_state_dict(point.record.get("health", {"updates": progress.step}))
    metrics = Metrics(
        config, run_dir, resumed_step=progress.step, rank=dist.get_rank(), layout=layout(config, data_parallel)
    )
    run = Run(config, run_dir, data, samples, batches, engine, carried, evaluations, metrics, saver, health, rewinds)
    if point:
        for sentence in certificate(config, point):
            say(sentence)
        if verify:
            say(check_loss(point, run.check_loss(progress.step), config))
    elif verify:
        raise ValueError(f"--verify-resume has nothing to verify: {run_dir} has no checkpoint")
    on_rank_0(lambda: write_run_config(config, run_dir))
    return run, progress.step


def join_ranks(config: RunConfig) -> ProcessGroupCollection:
    """Joins this process to those of the other hosts.

    Raises:
        TrainingFailed: They do not reach each other.
    """
    parallel = config.parallel
    seed, timeout = config.train.seed, parallel.timeout_seconds
    try:
        return start(parallel.tensor, parallel.context, seed=seed, timeout_seconds=timeout)
    except RuntimeError as error:
        if not is_communication(error):
            raise
        raise TrainingFailed(unreached(error)) from error


def due(step: int, every_steps: int) -> bool:
    """Whether something happens after this step; every 0 steps is never."""
    return every_steps > 0 and step % every_steps == 0


def describe(model: torch.nn.Module, config: RunConfig, data_parallel: int) -> int:
    """Says what is about to be trained, and on what; how many parameters it has.

    Raises:
        ValueError: The kernels that the settings ask for cannot take it.
    """
    parameters = torch.tensor(sum(p.numel() for p in model.parameters() if is_counted(p)))
    dist.all_reduce(parameters, group=DeepSpeedGroups().get_tensor_model_parallel_group())
    say(
        f"{config.model.variant}, {int(parameters):,} parameters, {resolve_precision(config)} on {device().type} | "
        f"{layout(config, data_parallel)}, "
        f"{torch.get_num_threads()} threads | {config.train.tokens_per_step:,} tokens a step"
    )
    if any(mixer.memory for mixer in config.model.mixers):
        say(f"memory: {memory_form(config, device())}")
    if config.model.linear_backend == "fla":
        if reason := why_not_fla(resolve_precision(config), device()):
            raise ValueError(f"model.{reason}")
        say("linear recurrences: the kernels of flash-linear-attention")
    if config.schedule.warmup_steps >= config.train.steps:
        say(f"note: the warm-up of {config.schedule.warmup_steps} steps is as long as the run")
    tokens = tokens_after(config.train.steps - 1, config.train)
    for name in ("batch_warmup_tokens", "sequence_warmup_tokens"):
        if tokens < (needed := getattr(config.train, name)):
            say(f"note: train.{name} is {needed:,}, but the last step begins after {tokens:,} tokens")
    return int(parameters)


def memory_form(config: RunConfig, where: torch.device) -> str:
    """How the memory is computed, and why not faster. Compiles the native operation where that was never done."""
    model, tensor = config.model, config.parallel.tensor
    if model.memory_backend != "auto":
        return model.memory_backend
    channelwise = model.memory_alpha == "channel"
    sharded = tensor > 1 and memory_split(model, config.parallel.memory_parallel, tensor) == "hidden"
    if where.type == "cpu":
        name, reason = "native", why_not_native(where, channelwise=channelwise, sharded=sharded)
    else:
        memory, queries = memory_of(model, resolve_precision(config), where)
        name, reason = "fused", why_not_fused(memory, queries, channelwise=channelwise, sharded=sharded)
    return f"chunked, which is slower; {reason}" if reason else name


def memory_of(model: TitansConfig, dtype: torch.dtype, where: torch.device) -> tuple[Memory, torch.Tensor]:
    """A memory of the model's, its weights without numbers, and a token's queries (1, 1, H, D)."""
    residual, (heads, width) = model.memory_network == "residual_norm", model.memory_shape
    rule = Rule.of(model.memory_rule, model.chunk_size, residual_norm=residual, forgets=model.memory_forgetting)
    weights = [torch.empty(heads, *pair, device="meta") for pair in pairwise(model.memory_widths)]
    return Memory(Network(residual), rule, weights), torch.empty(1, 1, heads, width, dtype=dtype, device=where)


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
    if parallel.tensor > 1 and any(mixer.memory for mixer in config.model.mixers):
        extras.append(f"memory by {memory_split(config.model, parallel.memory_parallel, parallel.tensor)}")
    if parallel.sequence:
        extras.append("sequence parallel")
    if config.train.recompute != "none":
        extras.append(f"recomputing {config.train.recompute.replace('_', ' ')}")
    if config.train.compile:
        extras.append("compiled")
    return ", ".join([" x ".join(words), *extras])


def is_counted(parameter: torch.Tensor) -> bool:
    """Whether this rank counts a parameter: its part of a divided one, rank 0 those that all hold."""
    first = DeepSpeedGroups().get_tensor_model_parallel_rank() == 0
    return first or getattr(parameter, "tensor_model_parallel", False)


def summary(values: dict[str, Any], done: int, run: Run) -> str:
    """What the run ended with."""
    loss = f"held-out loss {values['heldout_loss']:.4f} nats a token, " if "heldout_loss" in values else ""
    skipped = f"{run.health.left_out} updates left out, " if run.health.left_out else ""
    return f"{loss}loss {values['loss']:.4f}, {skipped}{checkpoint_folder(run.run_dir, done)}"


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
        end_with(error, error.status)
    stop()
    record_success()


if __name__ == "__main__":
    main()
