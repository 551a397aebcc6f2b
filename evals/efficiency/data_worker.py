"""One start of a training run's data, in a process of its own: `python -m evals.efficiency.data_worker REQUEST`.

REQUEST is a Start as JSON, the answer a Started as a line of JSON.
"""

import json
import os
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from evals.measure import PeakMemory
from pretrain.config import RunConfig
from pretrain.data import Batches, Samples
from pretrain.settings import TrainConfig
from titans_mcore.parallel import start
from tokenization.manifest import Manifest

_WAITED_STEPS = 10


@dataclass(frozen=True)
class Start:
    """Opens shards as a run does and reads on from a step.

    Attributes:
        folder: Of the shards.
        index: Of the index; what is there is used.
        sequence_length: Tokens of a sample.
        global_batch: Samples of a step; this process reads all of them.
        epochs: The first step begins after so many epochs; 0.5 is the middle of the first.
        steps: Steps that are read as fast as it goes.
        cold: Whether the token files leave the page cache before.
        asked: When the process was asked for, seconds since 1970.
    """

    folder: str
    index: str
    sequence_length: int
    global_batch: int
    epochs: float
    steps: int
    cold: bool
    asked: float


@dataclass(frozen=True)
class Started:
    """What a start found out.

    Attributes:
        import_seconds: Until Python, torch and Megatron-core are loaded.
        open_seconds: Checking the manifest and opening the samples; builds the index where there is none.
        open_cpu_seconds: Of the processor, for that; does not grow when others use the machine.
        open_peak_bytes: Most resident memory meanwhile, over that of the imports; mapped pages count.
        first_batch_seconds: Until the batch of the first step is there.
        anonymous_bytes: Memory of its own after all steps, over that of the imports: cannot be given back.
        mapped_bytes: Pages of mapped files after all steps: the system takes them back when it needs them.
        tokens_per_second: Read as fast as it goes.
        tokens_per_cpu_second: Likewise, by the processor's time.
        step_read_seconds: Reading a step's batch as fast as it goes.
        wait_share: Median share of a step that waits, where a step computes twice as long as its batch takes to read.
        samples: Of an epoch.
    """

    import_seconds: float
    open_seconds: float
    open_cpu_seconds: float
    open_peak_bytes: int
    first_batch_seconds: float
    anonymous_bytes: int
    mapped_bytes: int
    tokens_per_second: float
    tokens_per_cpu_second: float
    step_read_seconds: float
    wait_share: float
    samples: int


def run_start(request: Start) -> Started:
    """Opens, reads, measures."""
    torch.set_num_threads(1)
    start(1, seed=0)
    import_seconds = time.time() - request.asked
    folder = Path(request.folder)
    if request.cold:
        _forget_files(folder)
    own, mapped = _resident("RssAnon"), _resident("RssFile")
    peak = PeakMemory(torch.device("cpu"))
    baseline = peak.bytes()

    began, began_cpu = time.perf_counter(), time.process_time()
    manifest = Manifest.load(folder)
    manifest.check_quick(folder)
    samples = Samples(
        manifest.train_prefixes(folder),
        Path(request.index),
        vocab_size=manifest.tokenizer.vocab_size,
        sequence_length=request.sequence_length,
        seed=0,
        start_token=manifest.tokenizer.bos_id,
    )
    opened, opened_cpu = time.perf_counter(), time.process_time()
    open_peak_bytes = peak.bytes() - baseline
    train = TrainConfig(
        steps=10**9,
        sequence_length=request.sequence_length,
        global_batch=request.global_batch,
        micro_batch=1,
    )
    batches = Batches(samples, RunConfig(train=train), 0, 1)
    first = int(request.epochs * samples.per_epoch) // request.global_batch
    batches.fetch(first)
    read, read_cpu = time.perf_counter(), time.process_time()

    waiting = first + 1 + request.steps
    for step in range(first + 1, waiting):
        batches.fetch(step)
    step_seconds = (time.perf_counter() - read) / request.steps
    step_cpu_seconds = (time.process_time() - read_cpu) / request.steps
    waits = []
    for step in range(waiting, waiting + _WAITED_STEPS):
        time.sleep(2 * step_seconds)
        batches.fetch(step)
        waits.append(batches.waited_seconds / (2 * step_seconds + batches.waited_seconds))
    batches.close()
    return Started(
        import_seconds=import_seconds,
        open_seconds=opened - began,
        open_cpu_seconds=opened_cpu - began_cpu,
        open_peak_bytes=open_peak_bytes,
        first_batch_seconds=read - opened,
        anonymous_bytes=_resident("RssAnon") - own,
        mapped_bytes=_resident("RssFile") - mapped,
        tokens_per_second=train.tokens_per_step / step_seconds,
        tokens_per_cpu_second=train.tokens_per_step / step_cpu_seconds,
        step_read_seconds=step_seconds,
        wait_share=statistics.median(waits),
        samples=samples.per_epoch,
    )


def _resident(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def _forget_files(folder: Path) -> None:
    for file in [*folder.glob("*.bin"), *folder.glob("*.idx")]:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Runs the process."""
    # What libraries print must not stand before the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write(json.dumps(asdict(run_start(Start(**json.loads(sys.argv[1]))))) + "\n")
    answers.close()


if __name__ == "__main__":
    main()
