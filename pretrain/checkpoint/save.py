"""Writing checkpoints, while training goes on.

What is saved is copied to the host's memory between two steps; a thread writes the copy, has it on the disk and takes
its checksums, and talks to no other rank. When the threads of all ranks have ended, which the main threads find out
together, rank 0 writes the record and renames the folder. A copy that cannot be written is given up: the run goes on,
and earlier checkpoints are as they were.
"""

import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import save as to_safetensors
from torch import Tensor

from pretrain.checkpoint.carried import CarriedState
from pretrain.checkpoint.format import (
    CARRIED_FOLDER,
    OPTIMIZER_FOLDER,
    RANDOM_FOLDER,
    FailedOnRank0,
    checkpoint_folder,
    make_record,
    on_rank_0,
    partial_folder,
    partial_folders,
    write_record,
)
from pretrain.checkpoint.optimizer import file_of_this_rank, moments_of
from pretrain.checkpoint.retention import delete
from pretrain.config.run_config import RunConfig
from pretrain.engine import DeepSpeedEngine, full_precision_values
from titans_mcore.io import sha256_of, sync
from titans_mcore.parallel import DeepSpeedGroups
from titans_mcore.weights import (
    DESCRIPTION,
    WEIGHTS_FOLDER,
    ShardHeader,
    shard_name,
    write_description,
    write_shard,
)

RANDOM_STREAM = "stream."
"""What the names of Megatron's random streams begin with in a file of random states."""
Job = Callable[[Path], object]
FileFacts = dict[str, dict[str, Any]]


class Saved(NamedTuple):
    """How a checkpoint came out.

    Attributes:
        folder: Where it lies, or would.
        record: As it was written.
        seconds: From the first copy to the last file.
        error: Why it is not there; empty when it is.
    """

    folder: Path
    record: dict[str, Any]
    seconds: float
    error: str


class Saver:
    """Writes one checkpoint at a time. All ranks call the same methods after the same steps."""

    def __init__(self, engine: DeepSpeedEngine, config: RunConfig, fingerprint: str, run_dir: Path) -> None:
        """Nothing is written yet.

        Args:
            engine: Holds weights and optimizer.
            config: Of the run.
            fingerprint: Of the data.
            run_dir: Of the run.
        """
        self._engine, self._config, self._fingerprint, self._run_dir = engine, config, fingerprint, run_dir
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[FileFacts] | None = None
        self._next = Saved(run_dir, {}, 0.0, "")
        self._began = 0.0

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and not finished; the same on all ranks."""
        return self._writing is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._writing is not None and not self._writing.done()

    def begin(
        self, step: int, carried: CarriedState | None = None, *, folder: Path | None = None, **facts: Any
    ) -> None:
        """Copies what is to be saved and begins to write it. Collective; none may be pending.

        Args:
            step: Steps done.
            carried: What this rank's rows left; None where rows begin anew.
            folder: Where it is to lie; by default among the run's checkpoints.
            facts: More for the record.
        """
        assert self._writing is None
        self._began = time.perf_counter()
        final = folder or checkpoint_folder(self._run_dir, step)
        record = {**make_record(self._config, self._fingerprint, step), **facts}
        self._next = Saved(final, record, 0.0, "")
        partial = partial_folder(final)
        try:
            on_rank_0(lambda: _make_empty(partial))
        except FailedOnRank0 as error:
            self._writing = Future()
            self._writing.set_exception(OSError(str(error)))
            return
        jobs = self._copies(record, carried)
        self._writing = self._thread.submit(_write, partial, jobs)

    def finish(self) -> Saved:
        """Waits for the pending checkpoint and publishes it. Collective."""
        assert self._writing is not None
        mine: tuple[FileFacts, str] = ({}, "")
        try:
            mine = (self._writing.result(), "")
        except OSError as fault:
            mine = ({}, f"{fault.strerror or fault} on {socket.gethostname()}")
        self._writing = None
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
        error = next((error for _, error in shares if error), "")
        files = {name: share[name] for share, _ in shares for name in share}
        record = {**self._next.record, "files": dict(sorted(files.items()))}
        try:
            on_rank_0(lambda: self._publish(record, error))
        except FailedOnRank0 as fault:  # the disk is full at the last moment, perhaps
            error = str(fault)
        return Saved(self._next.folder, record, time.perf_counter() - self._began, error)

    def _publish(self, record: dict[str, Any], error: str) -> None:
        """Gives the written files their name, or takes them away where some are not there."""
        final, partial = self._next.folder, partial_folder(self._next.folder)
        if error:
            shutil.rmtree(partial, ignore_errors=True)
            return
        for path in (write_record(partial, record), partial):
            sync(path)
        if final.exists():
            delete(final)  # a damaged one, or one that the run went back behind
        partial.rename(final)
        sync(final.parent)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def _copies(self, record: dict[str, Any], carried: CarriedState | None) -> dict[str, Job]:
        """What this rank writes, by the file's name; collective, because weights are gathered."""
        groups, name = DeepSpeedGroups(), file_of_this_rank()
        jobs: dict[str, Job] = {}
        holds_weights = groups.get_data_parallel_rank() == 0
        weights = []
        for item in full_precision_values(self._engine):  # every data rank has its share in gathering each
            if holds_weights:
                weights.append((item[0], _copy(item[1])))
        if holds_weights:
            header, rank = ShardHeader.of(self._engine.module), groups.get_tensor_model_parallel_rank()
            size, config = groups.get_tensor_model_parallel_world_size(), self._config.model
            jobs[f"{WEIGHTS_FOLDER}/{shard_name(rank, size)}"] = lambda file: write_shard(file, header, weights)
            if rank == 0:
                facts = {"size": size, "step": record["step"], "tokens": record["tokens"]}
                jobs[f"{WEIGHTS_FOLDER}/{DESCRIPTION}"] = lambda file: write_description(file, config, **facts)
        if moments := moments_of(self._engine):
            copied = moments._replace(values=[(key, _copy(value)) for key, value in moments.values])
            jobs[f"{OPTIMIZER_FOLDER}/{name}"] = copied.write
        random = to_safetensors(_random_states())
        jobs[f"{RANDOM_FOLDER}/{name}"] = lambda file: file.write_bytes(random)
        if carried is not None:
            # The next step makes new states and leaves these as they are: nothing has to be copied.
            jobs[f"{CARRIED_FOLDER}/{name}"] = carried.frozen().save
        return jobs


def _write(partial: Path, jobs: dict[str, Job]) -> FileFacts:
    """Writes a rank's files and returns size and checksum of each, when it is on the disk."""
    facts: FileFacts = {}
    for name, write in jobs.items():
        file = partial / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file)
        sync(file)
        facts[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    return facts


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _random_states() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    state |= {RANDOM_STREAM + name: stream for name, stream in get_cuda_rng_tracker().get_states().items()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def sweep(run_dir: Path) -> None:
    """Deletes what earlier processes did not finish."""
    for partial in partial_folders(run_dir):
        shutil.rmtree(partial)
