"""What stands beside every measurement: when, where, with what, and the command that repeats it."""

import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def circumstances(settings: Any, device: str) -> dict[str, Any]:
    """What a measurement ran on and how it was asked for.

    Args:
        settings: Its settings, a dataclass with a field `threads`.
        device: "cpu" or "cuda".
    """
    chosen = {name: _shown(value) for name, value in asdict(settings).items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "evals.efficiency", *sys.argv[1:]]),
        "commit": source_commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "device_kind": device,
        "threads": settings.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "settings": chosen,
    }


def _shown(value: Any) -> Any:
    """A setting for JSON; a path of the project's as it is there, whatever folder the project lies in."""
    if isinstance(value, tuple):
        return [_shown(one) for one in value]
    if not isinstance(value, Path):
        return value
    root = Path(__file__).parents[2]
    return str(value.relative_to(root) if value.is_relative_to(root) else value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def source_commit() -> str | None:
    """The commit of this source, with a mark when files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
