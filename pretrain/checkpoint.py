"""Saving a run so that it goes on exactly, and finding where it stopped.

    RUN/checkpoints/step-00000100/
        weights/          the model, readable without pickle (titans_mcore.weights)
        deepspeed/        optimizer and random states, for resuming alone
        checkpoint.json   where the run stood and every file's size and checksum; written last

A checkpoint is written under a hidden name and renamed when it is on the disk: a folder with the final name is whole
unless something damaged it later, which sizes and checksums show before anything is loaded.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from pretrain.config import RunConfig
from pretrain.engine import DeepSpeedEngine, full_precision_values, resolve_precision, without_chatter
from pretrain.schedule import portion_of, tokens_after
from titans_mcore.parallel import DeepSpeedGroups
from titans_mcore.weights import (
    MARKER,
    WEIGHTS_FOLDER,
    check_same_model,
    checkpoints_newest_first,
    damage,
    file_sha256,
    load_config,
    save_shard,
)
from tokenization.files import sync

_DEEPSPEED_FOLDER = "deepspeed"
T = TypeVar("T")


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


def save(engine: DeepSpeedEngine, config: RunConfig, fingerprint: str, run_dir: Path, step: int) -> Path:
    """Writes a checkpoint and deletes those past `checkpoint.keep`. Collective.

    Args:
        engine: Holds weights and optimizer.
        config: Of the run.
        fingerprint: Of the data.
        run_dir: Of the run.
        step: Steps done.

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
    engine.save_checkpoint(partial, _DEEPSPEED_FOLDER, {"random": _random_state()}, save_latest=False)
    dist.barrier()
    files = _settle_files(partial)
    if dist.get_rank() == 0:
        record = {**asdict(progress), **_identity(config, fingerprint), "files": files}
        _publish(partial, final, record)
        _delete_old(run_dir, config.checkpoint.keep)
    dist.barrier()
    return final


def find_resume_point(config: RunConfig, fingerprint: str, run_dir: Path) -> tuple[Path, Progress] | None:
    """The checkpoint that the run goes on from, and where it stands; None when there is none yet. Collective.

    Damaged checkpoints are named on stderr and the one before is taken.

    Raises:
        ValueError: Every checkpoint is damaged, or the newest whole one is of another model, layout, data or order of
            samples. Every rank raises it.
    """
    return on_rank_0(lambda: _find_resume_point(config, fingerprint, run_dir))


def restore(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Puts weights, optimizer and random states back as they were. Collective."""
    with without_chatter():
        path, client = engine.load_checkpoint(checkpoint, _DEEPSPEED_FOLDER, load_lr_scheduler_states=False)
    if path is None:
        raise ValueError(f"DeepSpeed could not load {checkpoint / _DEEPSPEED_FOLDER}; it is of another version?")
    torch.set_rng_state(client["random"]["cpu"])
    get_cuda_rng_tracker().set_states(client["random"]["streams"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(client["random"]["cuda"])


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
        check_same_model(load_config(folder), config.model, folder)
        _check_identity(record, _identity(config, fingerprint), folder)
        return folder, Progress(record["step"], record["samples"], record["tokens"])
    if reason:
        raise ValueError(f"every checkpoint in {run_dir} is damaged; start again with another --run-dir")
    return None


def _identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What must not change for a resumed run to be the same run."""
    return {
        "data_fingerprint": fingerprint,
        "seed": config.train.seed,
        "global_batch": config.train.global_batch,
        "sequence_length": config.train.sequence_length,
        "batch_warmup_from": config.train.batch_warmup_from,
        "batch_warmup_tokens": config.train.batch_warmup_tokens,
        "sequence_warmup_from": config.train.sequence_warmup_from,
        "sequence_warmup_tokens": config.train.sequence_warmup_tokens,
        "layout": {
            "tensor_parallel": config.parallel.tensor,
            "data_parallel": DeepSpeedGroups().get_data_parallel_world_size(),
            "zero_stage": config.parallel.zero_stage,
            "precision": str(resolve_precision(config)).removeprefix("torch."),
        },
    }


def _check_identity(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    def flat(record: dict[str, Any]) -> dict[str, Any]:
        # Checkpoints from before the warm-ups have none.
        return {name: record.get(name, 0) for name in wanted if name != "layout"} | record["layout"]

    then, now = flat(saved), flat(wanted)
    differing = [f"{name} was {then.get(name)} and is {now[name]}" for name in now if then.get(name) != now[name]]
    if differing:
        raise ValueError(
            f"cannot go on from {folder}: {'; '.join(differing)}; start with what it was saved with, "
            "or use another --run-dir"
        )


def _random_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state(), "streams": dict(get_cuda_rng_tracker().get_states())}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _settle_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file, each rank reading its share, once they are on the disk."""
    if dist.get_rank() == 0:
        for script in folder.glob("zero_to_*.py"):
            script.unlink()  # DeepSpeed leaves its recovery scripts; weights/ needs none
    dist.barrier()
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
