"""Which checkpoints are kept, and which have proven healthy.

A checkpoint is healthy when enough good steps came after it (recovery/health.py): that its weights are finite and its
loss was low says little about the next hundred steps. The newest healthy one is never deleted.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint.format import read_record
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import CheckpointConfig
from pretrain.recovery.health import Health
from titans_mcore.io import bytes_text, write_file_atomically
from titans_mcore.weights import MARKER, checkpoints_newest_first

HEALTHY_FILE = "healthy.json"
_BYTES_A_PARAMETER = 12  # fp32: the weight and two moments


class Kept(NamedTuple):
    """A checkpoint as the rules see it.

    Attributes:
        folder: Where it lies.
        step: Steps done.
        tokens: Tokens trained on.
        heldout_loss: Where the step was evaluated.
        healthy: Whether it has proven so.
    """

    folder: Path
    step: int
    tokens: int
    heldout_loss: float | None
    healthy: bool


def to_keep(checkpoints: Sequence[Kept], rules: CheckpointConfig) -> set[Path]:
    """The checkpoints that the rules keep.

    Args:
        checkpoints: All of a run, newest first.
        rules: The latest, those at fixed numbers of tokens, the best, and in any case the newest healthy one.
    """
    kept = [one.folder for one in checkpoints[: rules.keep]]
    kept += [one.folder for one in checkpoints if one.healthy][:1]
    evaluated = sorted((one.heldout_loss, one.step, one.folder) for one in checkpoints if one.heldout_loss is not None)
    kept += [folder for *_, folder in evaluated[: rules.keep_best]]
    if rules.keep_every_tokens:
        firsts: dict[int, Path] = {one.tokens // rules.keep_every_tokens: one.folder for one in checkpoints}
        kept += [folder for multiple, folder in firsts.items() if multiple]
    return set(kept)


def delete_others(run_dir: Path, rules: CheckpointConfig) -> None:
    """Deletes what the rules do not keep; a damaged checkpoint counts as none and goes."""
    checkpoints = whole_checkpoints(run_dir)
    kept = to_keep(checkpoints, rules)
    for folder in list(checkpoints_newest_first(run_dir)):
        if folder not in kept:
            delete(folder)


def whole_checkpoints(run_dir: Path) -> list[Kept]:
    """The checkpoints of a run that were finished, newest first."""
    found = []
    for folder in checkpoints_newest_first(run_dir):
        try:
            record = read_record(folder)
            tokens = record["tokens"]
        except (OSError, ValueError, KeyError):
            continue
        healthy = (folder / HEALTHY_FILE).is_file()
        found.append(Kept(folder, record["step"], tokens, record.get("heldout_loss"), healthy))
    return found


class Probation:
    """The checkpoints that have not proven healthy yet. One rank looks after them, and writes only when one has."""

    def __init__(self, run_dir: Path) -> None:
        """Finds those that an earlier process left behind."""
        self._waiting: list[tuple[Path, int, int]] = []
        for one in whole_checkpoints(run_dir):
            if one.healthy:
                break  # what is older had its chance
            self.add(one.folder, read_record(one.folder))

    def add(self, folder: Path, record: dict[str, Any]) -> None:
        """A new checkpoint, and its record."""
        if "health" in record:
            self._waiting.append((folder, record["step"], record["health"]["updates"]))

    def check(self, health: Health) -> list[Path]:
        """Marks those that have proven healthy after this step, and returns them.

        Raises:
            OSError: A mark cannot be written.
        """
        proven = [one for one in self._waiting if health.has_proven(*one[1:])]
        self._waiting = [one for one in self._waiting if one not in proven and one[1] >= health.last_bad]
        marked = []
        for folder, _, updates in proven:
            if folder.is_dir():
                facts = {"good_updates_after_it": health.updates - updates}
                write_file_atomically(folder / HEALTHY_FILE, (json.dumps(facts) + "\n").encode())
                marked.append(folder)
        return marked


def delete(folder: Path) -> None:
    """Deletes a checkpoint."""
    (folder / MARKER).unlink(missing_ok=True)  # first, so that a half-deleted checkpoint is not taken for one
    shutil.rmtree(folder)


def check_room(config: RunConfig, run_dir: Path, parameters: int) -> None:
    """Whether the disk takes the checkpoints that a run keeps, and the one that is being written.

    Args:
        config: Of the run.
        run_dir: Its folder.
        parameters: Of its model.

    Raises:
        ValueError: It does not.
    """
    every, size = config.checkpoint.every_steps, _BYTES_A_PARAMETER * parameters
    # The newest, the best, the newest healthy one, and the one that is being written.
    wanted = config.checkpoint.keep + config.checkpoint.keep_best + 2
    there = len(list(checkpoints_newest_first(run_dir)))
    missing = max(1, min(wanted, -(-config.train.steps // every) if every else 1) - there)
    if (free := shutil.disk_usage(run_dir).free) < missing * size:
        raise ValueError(
            f"{run_dir} has {bytes_text(free)} free, and {missing} more checkpoint{'s' if missing > 1 else ''} of "
            f"{bytes_text(size)} are to be written there; make room, lower checkpoint.keep, or use another --run-dir"
        )
