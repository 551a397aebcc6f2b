"""Who reports: the id that a run keeps for good, and what the head of an attempt says."""

import os
import re
import secrets
import socket
from pathlib import Path
from typing import Any

import torch

from evals.efficiency.circumstances import source_commit
from pretrain.config import RunConfig
from tokenization.io import write_file_atomically

RUN_ID_FILE = "run_id"


def run_id(run_dir: Path) -> str:
    """The id in RUN/run_id, made when there is none: the key of the run's records, and the run's id at wandb.

    Raises:
        ValueError: The file holds something else.
    """
    file = run_dir / RUN_ID_FILE
    if not file.exists():
        write_file_atomically(file, f"{secrets.token_hex(4)}\n".encode())
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
        "commit": source_commit(),
    }
