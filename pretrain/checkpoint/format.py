"""What a checkpoint is: its folder, its files, and the record that says where the run stood.

    RUN/checkpoints/step-00000100/
        weights/          the model (titans_mcore.weights)
        optimizer/        AdamW's moments, a file for each rank that holds some (optimizer.py)
        random/           random states, a file for each rank
        carried/          with data.carry_state, what rows go on from, a file for each rank (carried.py)
        checkpoint.json   the record: where the run stood, at which layout and with which settings, every file's size
                          and checksum; written last
        healthy.json      later, when the steps after it were good ones (retention.py)

A checkpoint is written under a hidden name and renamed when it is on the disk (save.py): a folder with the final name
is whole unless something damaged it later, which sizes and checksums show before anything is loaded (resume.py).
Nothing in it is a pickle, and a run goes on from it at any number of tensor-parallel and data-parallel ranks and at any
ZeRO stage; one that carries states, at any ZeRO stage.

This file alone names steps' folders and writes and reads the record. titans_mcore.weights finds the folders by their
names, too, for evaluation and export, which know nothing of pretraining.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from pretrain.config.run_config import RunConfig
from pretrain.engine import resolve_precision
from pretrain.schedule import portion_of, tokens_after
from titans_mcore.command_line import remedy_of
from titans_mcore.parallel import device, memory_split, sample_place
from titans_mcore.weights import MARKER

OPTIMIZER_FOLDER = "optimizer"
RANDOM_FOLDER = "random"
CARRIED_FOLDER = "carried"
LAYOUT_WORDS = {
    "tensor": "tensor",
    "memory": "memory by",
    "context": "context",
    "data": "data",
    "zero_stage": "ZeRO",
    "device": "device",
}
"""What a layout is made of, in the words of a sentence."""
T = TypeVar("T")
Layout = dict[str, int | str]


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands."""

    step: int = 0
    """Steps done."""
    samples: int = 0
    """Samples trained on; the next one has this number."""
    tokens: int = 0
    """Tokens trained on."""

    @classmethod
    def at(cls, step: int, config: RunConfig) -> "RunProgress":
        """After `step` steps."""
        return cls(step, portion_of(step + 1, config.train).first, tokens_after(step, config.train))


def step_name(step: int) -> str:
    """What a folder of a step is called: a checkpoint, or an autopsy."""
    return f"step-{step:08d}"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run_dir / "checkpoints" / step_name(step)


def partial_folder(final: Path) -> Path:
    """Where a checkpoint is written before it has its final name."""
    return final.with_name(f".{final.name}.partial")


def partial_folders(run_dir: Path) -> list[Path]:
    """Those of a run's checkpoints, written now or left behind."""
    return list(run_dir.glob("checkpoints/.step-*.partial"))


def make_record(config: RunConfig, fingerprint: str, step: int) -> dict[str, Any]:
    """What a checkpoint says about its run: where it stands, what must stay the same, and all settings."""
    return {
        **asdict(RunProgress.at(step, config)),
        **identity_of(config, fingerprint),
        "layout": layout_of(config),
        "settings": json.loads(json.dumps(asdict(config))),  # as it will be read back: lists for tuples
    }


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Writes the record, which makes a checkpoint of the folder; returns its file."""
    file = folder / MARKER
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return file


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a whole checkpoint."""
    return json.loads((folder / MARKER).read_text(encoding="utf-8"))


def identity_of(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What must not change for a resumed run to be the same run."""
    carried: bool | str = config.data.carry_state
    if carried:
        # A rank has the states of its own rows and heads, which are not dealt out anew.
        words = [f"{LAYOUT_WORDS[name]} {layout_of(config)[name]}" for name in ("tensor", "memory", "data")]
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
        "muon": config.optimizer.name == "muon",  # what the moments are
    }


def layout_of(config: RunConfig) -> Layout:
    """How the run is laid out over ranks and where, which may change."""
    return {
        "tensor": config.parallel.tensor,
        "memory": memory_split(config.model, config.parallel.memory_parallel, config.parallel.tensor),
        "context": config.parallel.context,
        "data": sample_place().ranks,
        "zero_stage": config.parallel.zero_stage,
        "device": device().type,
    }


class FailedOnRank0(ValueError):
    """What rank 0 could not do, on every rank; the message is the error's."""


def on_rank_0(function: Callable[[], T]) -> T:
    """Runs a function on rank 0; its result reaches every rank, and so does a ValueError or OSError of it."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = (remedy_of(error) if isinstance(error, OSError) else None) or str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise FailedOnRank0(answer[1])
    return answer[0]
