"""Folders that appear whole or not at all, and what may be replaced."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titans_mcore.command_line import EXIT_FAILED, CommandError
from titans_mcore.io import sync


class ExportError(CommandError):
    """Of a run, an exported folder or what is asked of both."""


class ProofFailed(CommandError):
    """The exported model does not compute what the trained one computes; nothing was written."""

    status = EXIT_FAILED


def check_output(output: Path, *, overwrite: bool, inputs: list[Path]) -> None:
    """Whether a folder may be written at `output`.

    Args:
        output: The folder to be.
        overwrite: Replace whatever folder is there.
        inputs: Files and folders that are read, and must not be replaced.

    Raises:
        ExportError: Something is there that is no earlier export, or the folder would replace what is read.
    """
    if os.path.lexists(output) and not output.is_dir():
        raise ExportError(f"--output {output} is a file; name a folder")
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            raise ExportError(f"--output {output} holds {path}, which is being exported; name another folder")
    if overwrite or not output.is_dir() or not any(output.iterdir()) or is_export(output):
        return
    raise ExportError(f"--output {output} exists and is not an earlier export; name another, or add --overwrite")


def is_export(folder: Path) -> bool:
    """Whether a folder was written by an export."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["model_type"] in ("titans", "titans_time_series") and "AutoConfig" in config["auto_map"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Gives a folder that takes the target's place when the block ends well, and is removed otherwise."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        staging = scratch / target.name  # the final name already: transformers names loaded code after the folder
        staging.mkdir()
        yield staging
        for file in staging.iterdir():
            sync(file)
        sync(staging)
        _replace(staging, target, scratch / "old")
        sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(staging: Path, target: Path, old: Path) -> None:
    """The two renames of a replacement; what was there comes back when the second fails."""
    was_there = target.exists()
    if was_there:
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if was_there:
            old.rename(target)
        raise
