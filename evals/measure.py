"""What stands beside a measurement: memory and its peak, when, where, with what, and the command that repeats it."""

import ctypes
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from evals.report import settings_of

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory held since `reset`: of the GPU on a GPU, resident memory of the process elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Begins a new stretch. Where the system cannot reset its own record, the peak is that of the whole process."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(OSError):
            _CLEAR.write_text("5")  # Linux: the record of the peak starts again at the present size

    def bytes(self) -> int:
        """The peak since `reset`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        except OSError:
            found = None
        return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class Watch:
    """Time and memory of one batch."""

    def __init__(self, peak: PeakMemory, show: Callable[[int], None]) -> None:
        peak.reset()
        self._peak, self._show = peak, show
        self._started = self._mark = time.perf_counter()
        self._read_tokens, self._read_seconds, self._steps = 0, 0.0, list[float]()

    def on_piece(self, tokens: int) -> None:
        """So many tokens, all rows together, have been read."""
        self._read_tokens += tokens
        self._read_seconds += self.mark()
        self._show(tokens)

    def on_step(self) -> None:
        """A token of each answer has been decoded."""
        self._steps.append(self.mark())

    def mark(self) -> float:
        """Seconds since the last mark."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def seconds(self) -> float:
        """Seconds since the batch began."""
        return time.perf_counter() - self._started

    def costs(self) -> dict[str, Any]:
        """What a record holds of it."""
        return {
            "prefill_tokens": self._read_tokens,
            "prefill_seconds": self._read_seconds,
            "decode_ms_per_token": 1000 * sum(self._steps) / max(len(self._steps), 1),
            "seconds": self.seconds(),
            "peak_bytes": self._peak.bytes(),
        }


def state_bytes(states: Any) -> int:
    """Bytes of the states that `stream` returns, one TensorTree a block; 0 for a model that keeps none."""
    return sum(state.bytes() for state in states if hasattr(state, "bytes")) if isinstance(states, list) else 0


_M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK_BYTES = 4 * 2**20


def return_large_blocks() -> None:
    """Has large tensors mapped each on its own and given back when they are freed; without glibc nothing happens.

    By default glibc raises the size from which it maps blocks, up to 32 MB, as soon as one of that size is freed.
    Logits of a piece are that large: they then lie in the heap between smaller blocks, which keep their places from
    being joined, and the peak goes on growing by one of them now and then, for tens of thousands of tokens.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def circumstances(settings: Any, device: str) -> dict[str, Any]:
    """What a measurement ran on and how it was asked for.

    Args:
        settings: Its settings, a dataclass with a field `threads`.
        device: "cpu" or "cuda".
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "evals.efficiency", *sys.argv[1:]]),
        "commit": source_commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "device_kind": device,
        "threads": settings.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "settings": settings_of(settings),
    }


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
