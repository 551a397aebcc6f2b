"""Settings of the efficiency measurements. Imports nothing heavy: `--help` must be quick."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from evals.command_line import EvaluationError

SECTIONS = ("side-by-side", "growth", "gpu")


def available_cores() -> int:
    """Cores this process may use; OMP_NUM_THREADS, where it is set, says how many it should."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class MemorySettings:
    """Measures the neural memory against titans-pytorch (extra `bench`) and, on a GPU, against other chunked operators.

    Writes OUTPUT/memory.json and OUTPUT/memory.md. Every case runs in a process of its own; one that fails, is too
    large or takes too long is reported as such.
    """

    output: Path
    """Folder for memory.json and memory.md."""
    lengths: tuple[int, ...] = (256, 4_096)
    """Tokens of a sequence, side by side."""
    growth_lengths: tuple[int, ...] = (4_096, 16_384, 65_536)
    """Tokens of a sequence for this project's growth in time and memory."""
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
    """Only cases whose name contains one of these words, as in memory.json; or a section: side-by-side, growth, gpu."""
    quick: bool = False
    """Tiny shapes and two repeats: shows that everything runs, its numbers mean nothing."""

    def __post_init__(self) -> None:
        for name in ("lengths", "growth_lengths"):
            if not getattr(self, name):
                raise EvaluationError(f"--{name.replace('_', '-')} is empty; give at least one length")
            if min(getattr(self, name)) < 1:
                raise EvaluationError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1")
        for name in ("batch", "heads", "width", "depth", "expansion", "chunk_size", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"--{name.replace('_', '-')} is {value}; give at least 1")
        for name in ("limit_seconds", "limit_gigabytes"):
            if not getattr(self, name) > 0:
                raise EvaluationError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give more than 0")
        if self.depth > 4:
            raise EvaluationError(f"--depth is {self.depth}; a memory has 1 to 4 matrices")
        if self.width % 2:
            raise EvaluationError(f"--width is {self.width}; give an even number")


@dataclass(frozen=True)
class TokenizationSettings:
    """Measures `tokenization.encode` against sentencepiece alone, on the same text and cores.

    Writes OUTPUT/tokenization.json. The text is held in memory; some hundred MB make the seconds that starting takes
    weigh as little as they do in real work.
    """

    output: Path
    """Folder for tokenization.json."""
    input: tuple[str, ...]
    """Text, as for tokenization.encode: files or folders."""
    tokenizer: Path
    """Sentencepiece model."""
    threads: int = field(default_factory=available_cores)
    """Processes of encode, threads of sentencepiece."""
    repeats: int = 3
    """Rounds of both, in turn; the fastest of each counts."""

    def __post_init__(self) -> None:
        for name in ("threads", "repeats"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"--{name} is {getattr(self, name)}; give at least 1")


@dataclass(frozen=True)
class LayoutsSettings:
    """Counts what the ways to divide a model over processes send and hold, in real steps on gloo.

    Writes OUTPUT/layouts.json and OUTPUT/layouts.md.
    """

    output: Path
    """Folder for layouts.json and layouts.md."""
    context_lengths: tuple[int, ...] = (4096, 65536)
    """Tokens of the rows that context-parallel ranks share, multiples of 1,024."""
    threads: int = field(default_factory=available_cores)
    """Threads of all processes together."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise EvaluationError(f"--threads is {self.threads}; give at least 1")
        for length in self.context_lengths:
            if length < 1 or length % 1024:
                raise EvaluationError(f"--context-lengths has {length}; give multiples of 1,024")


@dataclass(frozen=True)
class DataSettings:
    """Measures the data of a run: index, start, resume, memory, reading; and the index of much larger sets.

    Writes OUTPUT/data.json. Synthetic shards lie in OUTPUT while it measures, two to five bytes a token.
    """

    output: Path
    """Folder for data.json."""
    shards: Path | None = None
    """Folder of shards to measure; by default synthetic ones are written, and deleted at the end."""
    tokens: float = 1e9
    """Tokens of the synthetic set."""
    shard_tokens: float = 1e8
    """Tokens of a synthetic shard."""
    sequence_length: int = 4_096
    """Tokens of a sample."""
    global_batch: int = 128
    """Samples of a step; one process reads all of them."""
    steps: int = 20
    """Steps that are read for the speed of reading."""
    builds: int = 3
    """Times that an index is built; the fastest counts, since other work on the machine slows single ones."""
    sparse: tuple[float, ...] = (3e10, 1e11)
    """Tokens of larger sets, in shards of a billion, whose token files are empty but of the right size."""
    threads: int = field(default_factory=available_cores)
    """Processes that write the shards."""

    def __post_init__(self) -> None:
        for name in ("tokens", "shard_tokens", "sequence_length", "global_batch", "steps", "builds", "threads"):
            if not getattr(self, name) >= 1:
                raise EvaluationError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1")
        if any(not tokens >= 2e6 for tokens in self.sparse):
            raise EvaluationError(f"--sparse is {self.sparse}; give sets of at least two million tokens each")


@dataclass(frozen=True)
class WavefrontSettings:
    """Simulates context parallelism over many ranks from times of one layer that are measured here.

    Writes OUTPUT/wavefront.json, OUTPUT/wavefront.md and OUTPUT/wavefront.png.
    """

    output: Path
    """Folder for the report."""
    config: str = "mag_760m"
    """The run that is planned, a preset or a TOML file; rows, batch and layout come from the options below."""
    tokens: int = 2_097_152
    """Tokens of the row that the ranks share."""
    ranks: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256, 512)
    """Numbers of ranks C."""
    piece: int = 512
    """Tokens over which a layer is timed; whole chunks."""
    repeats: int = 5
    """Timed repeats after one that warms up; the median counts."""
    threads: int = field(default_factory=available_cores)
    """Threads."""

    def __post_init__(self) -> None:
        if not self.ranks:
            raise EvaluationError("--ranks is empty; give at least one number")
        for name, value in (("ranks", min(self.ranks)), ("tokens", self.tokens), ("piece", self.piece)):
            if value < 1:
                raise EvaluationError(f"--{name} is {getattr(self, name)}; give at least 1")
        for name in ("repeats", "threads"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"--{name} is {getattr(self, name)}; give at least 1")


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
    limit_minutes: float = 60.0
    """Reading that takes longer ends a row."""
    threads: int = field(default_factory=available_cores)
    """Threads on a CPU."""

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise EvaluationError("--checkpoint is empty; name at least one run folder")
        if not self.lengths:
            raise EvaluationError("--lengths is empty; give at least one number of tokens")
        for name in ("decode_tokens", "piece", "threads"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1")
        if min(self.lengths) < 1:
            raise EvaluationError(f"--lengths has {min(self.lengths)}; give at least 1")
        for name in ("limit_gigabytes", "limit_minutes"):
            if not getattr(self, name) > 0:
                raise EvaluationError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
