"""Going on from a checkpoint: which one, whether it fits, its state put back, and a certificate of what was found."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from pretrain.checkpoint.carried import CarriedState
from pretrain.checkpoint.format import (
    CARRIED_FOLDER,
    LAYOUT_WORDS,
    OPTIMIZER_FOLDER,
    RANDOM_FOLDER,
    Layout,
    RunProgress,
    identity_of,
    layout_of,
    on_rank_0,
    read_record,
)
from pretrain.checkpoint.optimizer import HOLDING, file_of_this_rank, restore_parameters, saved_moments
from pretrain.checkpoint.retention import HEALTHY_FILE, whole_checkpoints
from pretrain.checkpoint.save import RANDOM_STREAM
from pretrain.config.run_config import RunConfig
from pretrain.engine import DeepSpeedEngine
from pretrain.recovery.rewinds import Rewinds
from titans_mcore.parallel import DeepSpeedGroups, device
from titans_mcore.tensor_files import Division, SavedTensors, Wanted, read_tensors, shape_on_rank, split_of
from titans_mcore.weights import (
    BEGINS,
    MARKER,
    check_same_model,
    checkpoints_newest_first,
    damage,
    find_checkpoint,
    load_config,
    load_full,
    load_into,
    model_tensors,
    saved_weights,
)

_OTHER_LAYOUT = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative difference of a loss that another order of sums can make; at the same layout there is none."""


class ResumePoint(NamedTuple):
    """A whole checkpoint that the run can go on from.

    Attributes:
        folder: The checkpoint.
        record: What it says about itself.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def progress(self) -> RunProgress:
        """Where the run stands."""
        return RunProgress(self.record["step"], self.record["samples"], self.record["tokens"])


def find_resume_point(config: RunConfig, fingerprint: str, run_dir: Path) -> ResumePoint | None:
    """The checkpoint that the run goes on from, its own or that of train.continue_from; None when there is none yet.

    Collective. A run that begins with another's checkpoint passes over the batches that the other passes over.

    Damaged checkpoints are named on stderr and the one before is taken. Weights of an imported model begin a run.

    Raises:
        ValueError: Every checkpoint is damaged, or the newest whole one is of another model, precision, data or order
            of samples. Every rank raises it.
    """
    return on_rank_0(lambda: _find_resume_point(config, fingerprint, run_dir))


def restore(
    engine: DeepSpeedEngine, config: RunConfig, point: ResumePoint, carried: CarriedState | None = None
) -> None:
    """Puts weights, optimizer and random states back as they were, at whatever layout they were saved. Collective.

    Args:
        engine: A new one with any values, or one that goes back.
        config: Of the run as it goes on.
        point: From `find_resume_point`.
        carried: Gets what this rank's rows left; None where rows begin anew.

    Raises:
        ValueError: Its files do not hold this model. Every rank raises it, and the engine is as it was.
    """
    checkpoint, record = point
    masters, (moments, optimizer_steps) = on_rank_0(
        lambda: (
            saved_weights(checkpoint, verify=False),  # _find_resume_point has read every file
            (None, 0) if BEGINS in record else saved_moments(checkpoint / OPTIMIZER_FOLDER),
        )
    )
    saved_optimizer = None if moments is None else SavedTensors(checkpoint / OPTIMIZER_FOLDER, moments, HOLDING)
    parameters, tensors = dict(engine.module.named_parameters()), model_tensors(engine.module)
    shapes = {name: _whole_shape(parameters.get(name, tensor)) for name, tensor in tensors.items()}
    masters.check_same(shapes)
    if saved_optimizer is not None:
        saved_optimizer.check_same({name: shapes[name] for name in parameters})
    restore_parameters(engine, masters, saved_optimizer, optimizer_steps)
    for name in tensors.keys() - parameters.keys():
        buffer = tensors[name]
        whole = Wanted(Division.of(None, buffer.shape, 1), 0, 0, buffer.numel())
        buffer.copy_(masters.read(name, whole).view_as(buffer))
    if BEGINS in record:
        return
    engine.global_steps, engine.global_samples = record["step"], record["samples"]
    if _same_ranks(record["layout"], layout_of(config)):
        _restore_random_state(checkpoint / RANDOM_FOLDER)
    if carried is not None:
        carried.restore(checkpoint / CARRIED_FOLDER / file_of_this_rank(), device())


def begin_with(model: torch.nn.Module, config: RunConfig) -> str:
    """Gives a new run the weights that train.weights_from names. Every rank takes its own part.

    Returns:
        The checkpoint they come from.

    Raises:
        ValueError: There is no whole checkpoint, or it is of another model.
    """
    checkpoint = find_checkpoint(Path(config.train.weights_from))
    saved, weights = load_full(checkpoint)
    check_same_model(saved, config.model, checkpoint)
    load_into(model, weights)
    return str(checkpoint)


def certificate(config: RunConfig, point: ResumePoint) -> list[str]:
    """What is the same and what is not between the run that was saved and the run that goes on, in sentences."""
    record = point.record
    if BEGINS in record:
        return [f"beginning with the weights in {point.folder}, made of {record[BEGINS]}, and a new optimizer"]
    then, now = record["layout"], layout_of(config)
    changes = list(changed_settings(record.get("settings", {}), json.loads(json.dumps(asdict(config)))))
    words = [f"{word} {then[name]} -> {now[name]}" for name, word in LAYOUT_WORDS.items() if then[name] != now[name]]
    layout = ", ".join(words) or ", ".join(f"{word} {now[name]}" for name, word in LAYOUT_WORDS.items()) + ", as then"
    same = "put back" if _same_ranks(then, now) else "begun anew from the seed, because the ranks are others"
    return [
        f"going on from {point.folder}, after step {record['step']}",
        f"settings: {'; '.join(changes) or 'none has changed'}",
        f"data: fingerprint {record['data_fingerprint'][:16]}, the same; the next sample is number "
        f"{record['samples']:,}, after {record['tokens']:,} tokens",
        f"layout: {layout}",
        f"random states: {same}",
    ]


def changed_settings(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Every setting with another value, as "section.name then -> now"; sections that only one of them has are new."""
    for section, values in now.items():
        for name, value in values.items():
            before = then.get(section, {}).get(name, value)
            if before != value:
                yield f"{section}.{name} {before!r} -> {value!r}"


def check_loss(point: ResumePoint, found: float, config: RunConfig) -> str:
    """Compares the loss that the checkpoint's last step would have now with the one that was noted when it was saved.

    Returns:
        The sentence for the certificate.

    Raises:
        ValueError: They differ, or there is none in the checkpoint.
    """
    if "check_loss" not in point.record:
        raise ValueError(f"{point.folder} was saved without a loss to compare with; go on without --verify-resume")
    noted, step = point.record["check_loss"], point.record["step"]
    same_layout = point.record["layout"] == layout_of(config)
    tolerance = 0.0 if same_layout else _OTHER_LAYOUT[point.record["precision"]]
    if not math.isclose(found, noted, rel_tol=tolerance, abs_tol=0.0):
        raise ValueError(
            f"{point.folder} does not give the loss it was saved with: the first sample of step {step} had {noted!r} "
            f"and has {found!r}; do not go on from it before you know why (another version, another machine?)"
        )
    exactly = "bit for bit" if found == noted else f"within {tolerance:g}"
    return f"verified: the first sample of step {step} has the loss {found:.6f} that it had, {exactly}"


def _find_resume_point(config: RunConfig, fingerprint: str, run_dir: Path) -> ResumePoint | None:
    reason = None
    for folder in checkpoints_newest_first(run_dir):
        if reason := damage(folder, read_files=True):
            print(f"{folder} is damaged: {reason}; looking for the checkpoint before it", file=sys.stderr)
            continue
        point = ResumePoint(folder, read_record(folder))
        _check_fits(point, config, fingerprint)
        return point
    if reason:
        raise ValueError(f"every checkpoint in {run_dir} is damaged; start again with another --run-dir")
    if not config.train.continue_from:
        return None
    folder = _branching_point(Path(config.train.continue_from))
    point = ResumePoint(folder, read_record(folder))
    _check_fits(point, config, fingerprint)
    if point.progress.step >= config.train.steps:
        raise ValueError(
            f"train.continue_from {folder} is after step {point.progress.step} and train.steps is "
            f"{config.train.steps}, which counts from the beginning of the first run; raise it"
        )
    Rewinds.read(folder.parent.parent).write(run_dir)
    return point


def _branching_point(path: Path) -> Path:
    """The checkpoint itself, or the newest healthy one of a run folder, whole in either case."""
    if (path / MARKER).is_file():
        if reason := damage(path, read_files=True):
            raise ValueError(f"train.continue_from {path} is damaged: {reason}; give another checkpoint")
        if not (path / HEALTHY_FILE).is_file():
            print(f"note: {path} has not proven healthy: too few good steps came after it", file=sys.stderr)
        return path
    for one in whole_checkpoints(path):
        if one.healthy and damage(one.folder, read_files=True) is None:
            return one.folder
    raise ValueError(f"train.continue_from {path} has no whole checkpoint that has proven healthy; name a checkpoint")


def _check_fits(point: ResumePoint, config: RunConfig, fingerprint: str) -> None:
    folder, record = point
    check_same_model(load_config(folder), config.model, folder)
    if BEGINS in record:  # weights without a run: any run of their model may begin with them
        return
    wanted = identity_of(config, fingerprint)
    # A setting that an earlier version did not have was off.
    then = {name: record.get(name, False) for name in wanted}
    differing = [f"{name} was {then[name]} and is {now}" for name, now in wanted.items() if then[name] != now]
    if differing:
        raise ValueError(
            f"cannot go on from {folder}: {'; '.join(differing)}; start with what it was saved with, "
            "or use another --run-dir"
        )


def _same_ranks(then: Layout, now: Layout) -> bool:
    """Whether every rank is what it was, so that it may have its random states back."""
    return {**then, "zero_stage": 0} == {**now, "zero_stage": 0}


def _restore_random_state(folder: Path) -> None:
    mapped, _ = read_tensors(folder / file_of_this_rank(), "random states")
    state = {name: tensor.clone() for name, tensor in mapped.items()}
    torch.set_rng_state(state["cpu"])
    streams = {
        name.removeprefix(RANDOM_STREAM): tensor for name, tensor in state.items() if name.startswith(RANDOM_STREAM)
    }
    get_cuda_rng_tracker().set_states(streams)
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _whole_shape(tensor: Tensor) -> list[int]:
    rule, shape = split_of(tensor), shape_on_rank(tensor)
    return rule.whole_shape(shape, DeepSpeedGroups().get_tensor_model_parallel_world_size()) if rule else list(shape)
