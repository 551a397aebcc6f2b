"""Who reports: the id that a run keeps for good, and what the head of an attempt says."""

import os
import re
import secrets
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

from pretrain.config import RunConfig

RUN_ID_FILE = "run_id"


def run_id(run_dir: Path) -> str:
    """The id in RUN/run_id, made when there is none: the key of the run's records, and the run's id at wandb.

    Raises:
        ValueError: The file holds something else.
    """
    file = run_dir / RUN_ID_FILE
    if not file.exists():
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(secrets.token_hex(4) + "\n")
        partial.replace(file)
    found = file.read_text().strip()
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", found):
        raise ValueError(f"{file} holds {found!r}, which is no id of a run; remove it to begin a new one")
    return found


def attempt_values(config: RunConfig, resumed_step: int, layout: str) -> dict[str, Any]:
    """What an attempt's record says.

    Args:
        config: Of the run.
        resumed_step: Steps done before it.
        layout: How the run is laid out, in words.
    """
    return {
        "resumed_step": resumed_step,
        "steps": config.train.steps,
        "variant": config.model.variant,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "layout": layout,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this source, with a mark when files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
