"""How fast and how large: `python -m evals.efficiency memory`.

Its settings are here and import nothing heavy: `--help` must be quick.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from evals.command_line import EvaluationError, check_at_least


def available_cores() -> int:
    """Cores this process may use; OMP_NUM_THREADS, where it is set, says how many it should."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class MemorySettings:
    """Measures the neural memory against titans-pytorch (extra `bench`).

    Writes OUTPUT/memory.json and OUTPUT/memory.md. Every case runs in a process of its own; one that fails, is too
    large or takes too long is reported as such.
    """

    output: Path
    """Folder for memory.json and memory.md."""
    lengths: tuple[int, ...] = (256, 4_096)
    """Tokens of a sequence."""
    batch: int | None = None
    """Sequences B; by default 1 on a CPU, 4 on a GPU."""
    heads: int | None = None
    """Heads H; by default 4 on a CPU, 24 on a GPU. The layers' width is heads times width."""
    width: int = 64
    """Width D of a head."""
    depth: int = 2
    """Weight matrices L_M of the memory."""
    expansion: int | None = None
    """Hidden width of the memory over D; by default 2 on a CPU, 4 on a GPU."""
    chunk_size: int = 16
    """Tokens b of a chunk."""
    repeats: int = 5
    """Timed repeats of each case, after warm-up; the median is reported."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU when there is one. A CPU computes in float32, a GPU in bfloat16."""
    threads: int = field(default_factory=available_cores)
    """Threads of every case on a CPU."""
    limit_seconds: float = 240.0
    """Most seconds for one case, warm-up and repeats together; the start of its process is not counted."""
    limit_gigabytes: float = 8.0
    """Most memory that one case may take on a CPU; beyond, it is out of memory."""
    only: tuple[str, ...] = ()
    """Only cases whose name contains one of these words, as in memory.json."""
    quick: bool = False
    """Tiny shapes and two repeats: shows that everything runs, its numbers mean nothing."""

    def __post_init__(self) -> None:
        if not self.lengths:
            raise EvaluationError("--lengths is empty; give at least one length")
        check_at_least(1, self, "lengths", "batch", "heads", "width", "depth", "expansion", "chunk_size")
        check_at_least(1, self, "repeats", "threads")
        for name in ("limit_seconds", "limit_gigabytes"):
            if not getattr(self, name) > 0:
                raise EvaluationError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give more than 0")
        if self.depth > 4:
            raise EvaluationError(f"--depth is {self.depth}; a memory has 1 to 4 matrices")
        if self.width % 2:
            raise EvaluationError(f"--width is {self.width}; give an even number")


@dataclass(frozen=True)
class ContextSettings:
    """Measures what a longer past costs trained models: tokens read a second, milliseconds a decoded token, memory.

    Models of constant state cost the same at every length. One that keeps all its keys (window 0) is measured until it
    does not fit; what is beyond is reported as not run.
    """

    checkpoint: tuple[Path, ...]
    """Run folders, checkpoint folders or exported Hugging Face folders."""
    json: Path
    """File for the report."""
    lengths: tuple[int, ...] = (2_048, 16_384, 131_072, 1_048_576, 2_097_152)
    """Tokens that are read before decoding."""
    decode_tokens: int = 64
    """Decoded tokens that are timed; the median counts."""
    piece: int = 2_048
    """Tokens read at a time."""
    limit_gigabytes: float = 8.0
    """A state that grows beyond ends a row."""
    threads: int = field(default_factory=available_cores)
    """Threads on a CPU."""

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise EvaluationError("--checkpoint is empty; name at least one run folder")
        if not self.lengths:
            raise EvaluationError("--lengths is empty; give at least one number of tokens")
        check_at_least(1, self, "lengths", "decode_tokens", "piece", "threads")
        if not self.limit_gigabytes > 0:
            raise EvaluationError(f"--limit-gigabytes is {self.limit_gigabytes}; it must be above 0")
