"""Saving a run so that it goes on exactly, and finding where it stopped.

    RUN/checkpoints/step-00000100/
        weights/          the model (titans_mcore.weights)
        optimizer/        AdamW's moments, a file for each rank that holds some (pretrain.optimizer_state)
        random/           random states, a file for each rank
        carried/          with data.carry_state, what rows go on from, a file for each rank (pretrain.carried)
        checkpoint.json   where the run stood, at which layout, every file's size and checksum; written last

A checkpoint is written under a hidden name and renamed when it is on the disk: a folder with the final name is whole
unless something damaged it later, which sizes and checksums show before anything is loaded. Nothing in it is a pickle,
and a run goes on from it at any number of tensor-parallel and data-parallel ranks and at any ZeRO stage; one that
carries states, at any ZeRO stage.
"""

import json
import shutil
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import save as to_safetensors
from torch import Tensor

from pretrain.carried import CarriedState
from pretrain.config import RunConfig
from pretrain.engine import DeepSpeedEngine, full_precision_values, resolve_precision
from pretrain.optimizer_state import HOLDING, file_of_this_rank, restore_parameters, save_moments, saved_moments
from pretrain.reshape import Division, Fragment, Part, SavedTensors, Wanted
from pretrain.schedule import portion_of, tokens_after
from titans_mcore.parallel import DeepSpeedGroups, device, memory_split, sample_place
from titans_mcore.tensor_files import read_tensors
from titans_mcore.weights import (
    MARKER,
    WEIGHTS_FOLDER,
    check_same_model,
    checkpoints_newest_first,
    damage,
    file_sha256,
    load_config,
    model_tensors,
    read_shards,
    save_shard,
    shape_on_rank,
    split_of,
)
from tokenization.files import sync

OPTIMIZER_FOLDER = "optimizer"
RANDOM_FOLDER = "random"
CARRIED_FOLDER = "carried"
_STREAM = "stream."
_LAYOUT_WORDS = {
    "tensor": "tensor",
    "memory": "memory by",
    "context": "context",
    "data": "data",
    "zero_stage": "ZeRO",
    "device": "device",
}
T = TypeVar("T")
Layout = dict[str, int | str]


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Samples trained on; the next one has this number."""
    tokens: int = 0
    """Tokens trained on."""

    @classmethod
    def at(cls, step: int, config: RunConfig) -> "Progress":
        """After `step` steps."""
        return cls(step, portion_of(step + 1, config.train).first, tokens_after(step, config.train))


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save(
    engine: DeepSpeedEngine,
    config: RunConfig,
    fingerprint: str,
    run_dir: Path,
    step: int,
    carried: CarriedState | None = None,
) -> Path:
    """Writes a checkpoint and deletes those past `checkpoint.keep`. Collective.

    Args:
        engine: Holds weights and optimizer.
        config: Of the run.
        fingerprint: Of the data.
        run_dir: Of the run.
        step: Steps done.
        carried: What this rank's rows left; None where rows begin anew.

    Returns:
        The folder.
    """
    final = checkpoint_folder(run_dir, step)
    partial = final.with_name(f".{final.name}.partial")
    groups, progress = DeepSpeedGroups(), Progress.at(step, config)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    values = full_precision_values(engine)
    if groups.get_data_parallel_rank() == 0:
        save_shard(
            partial / WEIGHTS_FOLDER,
            engine.module,
            config.model,
            rank=groups.get_tensor_model_parallel_rank(),
            size=groups.get_tensor_model_parallel_world_size(),
            step=step,
            tokens=progress.tokens,
            values=values,
        )
    else:
        deque(values, maxlen=0)  # every data rank has its share in gathering each
    save_moments(engine, partial / OPTIMIZER_FOLDER)
    _save_random_state(partial / RANDOM_FOLDER)
    if carried is not None:
        carried.save(partial / CARRIED_FOLDER / file_of_this_rank())
    dist.barrier()
    files = _settle_files(partial)
    if dist.get_rank() == 0:
        record = {**asdict(progress), **_identity(config, fingerprint), "layout": _layout(config), "files": files}
        _publish(partial, final, record)
        _delete_old(run_dir, config.checkpoint.keep)
    dist.barrier()
    return final


def find_resume_point(config: RunConfig, fingerprint: str, run_dir: Path) -> tuple[Path, Progress] | None:
    """The checkpoint that the run goes on from, and where it stands; None when there is none yet. Collective.

    Damaged checkpoints are named on stderr and the one before is taken. A layout that has changed is said.

    Raises:
        ValueError: Every checkpoint is damaged, or the newest whole one is of another model, precision, data or order
            of samples. Every rank raises it.
    """
    return on_rank_0(lambda: _find_resume_point(config, fingerprint, run_dir))


def restore(engine: DeepSpeedEngine, config: RunConfig, checkpoint: Path, carried: CarriedState | None = None) -> None:
    """Puts weights, optimizer and random states back as they were, at whatever layout they were saved. Collective.

    Args:
        engine: A new one, with any values.
        config: Of the run as it goes on.
        checkpoint: A whole one, from `find_resume_point`.
        carried: Gets what this rank's rows left; None where rows begin anew.

    Raises:
        ValueError: Its files do not hold this model. Every rank raises it, and the engine is as it was.
    """
    weights, (moments, optimizer_steps) = on_rank_0(
        lambda: (_saved_weights(checkpoint), saved_moments(checkpoint / OPTIMIZER_FOLDER))
    )
    saved_weights = SavedTensors(checkpoint / WEIGHTS_FOLDER, weights, "weights")
    saved_optimizer = SavedTensors(checkpoint / OPTIMIZER_FOLDER, moments, HOLDING)
    parameters, tensors = dict(engine.module.named_parameters()), model_tensors(engine.module)
    shapes = {name: _whole_shape(parameters.get(name, tensor)) for name, tensor in tensors.items()}
    saved_weights.check_same(shapes)
    saved_optimizer.check_same({name: shapes[name] for name in parameters})
    restore_parameters(engine, saved_weights, saved_optimizer, optimizer_steps)
    for name in tensors.keys() - parameters.keys():
        buffer = tensors[name]
        whole = Wanted(Division.of(None, buffer.shape, 1), 0, 0, buffer.numel())
        buffer.copy_(saved_weights.read(name, whole).view_as(buffer))
    record = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    engine.global_steps, engine.global_samples = record["step"], record["samples"]
    if _same_ranks(record["layout"], _layout(config)):
        _restore_random_state(checkpoint / RANDOM_FOLDER)
    if carried is not None:
        carried.restore(checkpoint / CARRIED_FOLDER / file_of_this_rank(), device())


def on_rank_0(function: Callable[[], T]) -> T:
    """Runs a function on rank 0; its result, or the ValueError it raises, reaches every rank."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def _find_resume_point(config: RunConfig, fingerprint: str, run_dir: Path) -> tuple[Path, Progress] | None:
    reason = None
    for folder in checkpoints_newest_first(run_dir):
        if reason := damage(folder, read_files=True):
            print(f"{folder} is damaged: {reason}; looking for the checkpoint before it", file=sys.stderr)
            continue
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if not any(name.startswith(f"{OPTIMIZER_FOLDER}/") for name in record["files"]):
            raise ValueError(
                f"cannot go on from {folder}: its optimizer state is in DeepSpeed's format of an earlier version; "
                "its weights can still be evaluated and exported, and a new run needs another --run-dir"
            )
        check_same_model(load_config(folder), config.model, folder)
        _check_identity(record, _identity(config, fingerprint), folder)
        if change := _change_of_layout(record["layout"], _layout(config)):
            print(f"going on at another layout: {change}", flush=True)
        return folder, Progress(record["step"], record["samples"], record["tokens"])
    if reason:
        raise ValueError(f"every checkpoint in {run_dir} is damaged; start again with another --run-dir")
    return None


def _identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What must not change for a resumed run to be the same run."""
    carried: bool | str = config.data.carry_state
    if carried:
        # A rank has the states of its own rows and heads, which are not dealt out anew.
        words = [f"{_LAYOUT_WORDS[name]} {_layout(config)[name]}" for name in ("tensor", "memory", "data")]
        carried = f"true at {', '.join(words)}, micro-batch {config.train.micro_batch}"
    return {
        "data_fingerprint": fingerprint,
        "seed": config.train.seed,
        "global_batch": config.train.global_batch,
        "sequence_length": config.train.sequence_length,
        "precision": str(resolve_precision(config)).removeprefix("torch."),
        "batch_warmup_from": config.train.batch_warmup_from,
        "batch_warmup_tokens": config.train.batch_warmup_tokens,
        "sequence_warmup_from": config.train.sequence_warmup_from,
        "sequence_warmup_tokens": config.train.sequence_warmup_tokens,
        "carry_state": carried,
    }


def _check_identity(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    # A setting that an earlier version did not have was off.
    then = {name: saved.get(name, False) for name in wanted}
    differing = [f"{name} was {then[name]} and is {now}" for name, now in wanted.items() if then[name] != now]
    if differing:
        raise ValueError(
            f"cannot go on from {folder}: {'; '.join(differing)}; start with what it was saved with, "
            "or use another --run-dir"
        )


def _layout(config: RunConfig) -> Layout:
    """How the run is laid out over ranks and where, which may change."""
    return {
        "tensor": config.parallel.tensor,
        "memory": memory_split(config.model, config.parallel.memory_parallel, config.parallel.tensor),
        "context": config.parallel.context,
        "data": sample_place().ranks,
        "zero_stage": config.parallel.zero_stage,
        "device": device().type,
    }


def _change_of_layout(then: Layout, now: Layout) -> str:
    """The difference in words; empty when there is none."""
    words = [f"{word} {then[name]} -> {now[name]}" for name, word in _LAYOUT_WORDS.items() if then[name] != now[name]]
    return ", ".join(words) + ("" if _same_ranks(then, now) else "; random states begin anew from the seed")


def _same_ranks(then: Layout, now: Layout) -> bool:
    """Whether every rank is what it was, so that it may have its random states back."""
    return {**then, "zero_stage": 0} == {**now, "zero_stage": 0}


def _save_random_state(folder: Path) -> None:
    state = {"cpu": torch.get_rng_state()}
    state |= {_STREAM + name: stream for name, stream in get_cuda_rng_tracker().get_states().items()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    folder.mkdir(exist_ok=True)
    (folder / file_of_this_rank()).write_bytes(to_safetensors(state))


def _restore_random_state(folder: Path) -> None:
    mapped, _ = read_tensors(folder / file_of_this_rank(), "random states")
    state = {name: tensor.clone() for name, tensor in mapped.items()}
    torch.set_rng_state(state["cpu"])
    streams = {name.removeprefix(_STREAM): tensor for name, tensor in state.items() if name.startswith(_STREAM)}
    get_cuda_rng_tracker().set_states(streams)
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _saved_weights(checkpoint: Path) -> list[dict[str, Part]]:
    return [
        {
            name: Part(tuple(tensor.shape), shard.rules[name], (Fragment(0, tensor.numel(), shard.file.name),))
            for name, tensor in shard.tensors.items()
        }
        for shard in read_shards(checkpoint)
    ]


def _whole_shape(tensor: Tensor) -> list[int]:
    rule, shape = split_of(tensor), shape_on_rank(tensor)
    return rule.whole_shape(shape, DeepSpeedGroups().get_tensor_model_parallel_world_size()) if rule else list(shape)


def _settle_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file, each rank reading its share, once they are on the disk."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    mine = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        sync(folder / name)
        mine[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return {name: share[name] for share in shares for name in share}


def _publish(partial: Path, final: Path, record: dict[str, Any]) -> None:
    marker = partial / MARKER
    marker.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for path in (marker, partial):
        sync(path)
    if final.exists():
        _delete(final)  # a damaged one: a run resumes from the newest whole checkpoint and comes by here again
    partial.rename(final)
    sync(final.parent)


def _delete_old(run_dir: Path, keep: int) -> None:
    for folder in list(checkpoints_newest_first(run_dir))[keep:]:
        _delete(folder)


def _delete(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)  # first, so that a half-deleted checkpoint is not taken for one
    shutil.rmtree(folder)
