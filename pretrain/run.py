"""A run that is under way: what it holds, and what is done between its steps."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from pretrain.checkpoint.carried import CarriedState
from pretrain.checkpoint.retention import Probation, delete_others
from pretrain.checkpoint.save import Saved, Saver
from pretrain.config.run_config import RunConfig
from pretrain.data.batches import Batches, MicroBatch
from pretrain.data.folders import NumberedSamples, RunData
from pretrain.engine import first_rank_loss, train_step
from pretrain.evaluate.evaluations import Evaluations
from pretrain.recovery.hangs import RankComparison, RollCall
from pretrain.recovery.health import Health, Verdict
from pretrain.recovery.rewinds import Rewinds
from pretrain.report.metrics import Metrics
from pretrain.report.throughput import MfuMeter, memory_bytes
from pretrain.schedule import portion_of, rate_of, tokens_after
from titans_mcore.io import try_lock
from titans_mcore.telemetry import MemoryTelemetry
from titans_mcore.weights import checkpoints_newest_first


@dataclass
class Run:
    """All that the steps of a run use. Every method is collective."""

    config: RunConfig
    run_dir: Path
    data: RunData
    samples: NumberedSamples
    batches: Batches
    engine: DeepSpeedEngine
    carried: CarriedState | None
    evaluations: Evaluations
    metrics: Metrics
    saver: Saver
    health: Health
    rewinds: Rewinds
    probation: Probation = field(init=False)
    roll_call: RollCall = field(init=False)
    ranks: RankComparison = field(init=False)
    telemetry: MemoryTelemetry = field(init=False)
    micro_batches: list[MicroBatch] = field(init=False, default_factory=list)
    save_error: str = field(init=False, default="")
    current_step: int = field(init=False, default=0)
    mfu_meter: MfuMeter = field(init=False)

    def __post_init__(self) -> None:
        self.roll_call = RollCall()
        self.ranks = RankComparison(self.config.logging.stragglers_every_steps)
        self.telemetry = MemoryTelemetry(self.engine.module)
        self.mfu_meter = MfuMeter.here(self.config, dist.get_world_size())
        self.probation = Probation(self.run_dir if dist.get_rank() == 0 else Path(os.devnull))

    def step(self, step: int, following: int) -> tuple[dict[str, Any], Verdict]:
        """Learns from a batch: fetches it, computes, updates, and judges what came of it.

        Args:
            step: Counted from 1.
            following: The step after it, whose batch is read meanwhile.

        Returns:
            The numbers of the step, under their names in metrics.jsonl, and the verdict.
        """
        began, lr, self.current_step = time.perf_counter(), rate_of(self.health.updates + 1, self.config), step
        self.micro_batches = self.batches.fetch(step - 1, ahead=following - 1)
        every = self.config.logging.memory_every_steps
        telemetry = self.telemetry if every and step % every == 0 else None
        limit = self.health.update_limit()
        with self.ranks.waiting.measured():
            in_flight = self.config.parallel.in_flight
            result = train_step(self.engine, self.micro_batches, lr, self.carried, limit, telemetry, in_flight)
        seconds, train = time.perf_counter() - began, self.config.train
        if telemetry:
            self.metrics.record("memory", step, telemetry.collect())
        self._name_straggler(step, seconds)
        values = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "updated": result.updated,
            "tokens": tokens_after(step, train),
            "tokens_per_second": portion_of(step, train).samples * train.sequence_length / seconds,
            "seconds": seconds,
            "data_wait_seconds": self.batches.waited_seconds,
            "memory_bytes": memory_bytes(),
        }
        if (mfu := self.mfu_meter.mfu(step, seconds)) is not None:
            values["mfu"] = mfu
        return values, self.health.judge(step, result.loss, result.grad_norm, result.updated)

    def evaluate(self, step: int, following: int) -> dict[str, float]:
        """Evaluates where it is due and reports it; returns what belongs into the step's own line."""
        belongs: dict[str, float] = {}
        for kind, values in self.evaluations.after(self.engine, step, following):
            if kind == "heldout":
                belongs["heldout_loss"] = values["loss"]
            else:
                self.metrics.record(kind, step, values)
        return belongs

    def begin_save(self, step: int, heldout_loss: float | None = None) -> float:
        """Begins to write a checkpoint, when the one before is there.

        Args:
            step: The step that was just done.
            heldout_loss: After it, where it was evaluated.

        Returns:
            Seconds that training waited.
        """
        began = time.perf_counter()
        if self.saver.pending:
            self.finish_save()
        batch = self.micro_batches[0]
        sample = batch.first_rows(self.config.train.sequence_length // batch.tokens.shape[1])
        check_loss = first_rank_loss(self.engine, sample)
        facts: dict[str, Any] = {"health": self.health.state_dict(), "check_loss": check_loss}
        if heldout_loss is not None:
            facts["heldout_loss"] = heldout_loss
        self.saver.begin(step, self.carried, **facts)
        if not self.config.checkpoint.asynchronous:
            self.finish_save()
        return time.perf_counter() - began

    def finish_save(self) -> None:
        """Publishes the checkpoint that is being written, and deletes those that are no longer kept."""
        saved = self.saver.finish()
        self.save_error = saved.error
        if saved.error:
            self._tell_lost(saved)
            return
        if dist.get_rank() == 0:
            self.probation.add(saved.folder, saved.record)
            delete_others(self.run_dir, self.config.checkpoint)
        size = sum(file["bytes"] for file in saved.record["files"].values())
        values = {"name": "saved", "folder": saved.folder.name, "seconds": saved.seconds, "bytes": size}
        self.metrics.record("event", saved.record["step"], values)
        dist.barrier()  # nobody looks for checkpoints while rank 0 deletes some

    def prove(self, step: int) -> None:
        """Marks the checkpoints that have become healthy with this step."""
        try:
            for folder in self.probation.check(self.health):
                self.metrics.record("event", step, {"name": "healthy", "folder": folder.name})
        except OSError as error:
            self.metrics.event(step, "mark_failed", f"note: a healthy checkpoint could not be marked: {error}")

    def check_loss(self, step: int) -> float:
        """Loss of the first sample of a step with the weights as they are: what was noted when they were saved."""
        first, _, row_length = portion_of(step, self.config.train)
        self.samples.prepare(first, first)
        return first_rank_loss(self.engine, self.samples.micro_batch([first]).cut(row_length))

    def close(self) -> None:
        """Ends threads and closes files."""
        self.batches.close()
        self.saver.close()
        self.metrics.close()

    def _name_straggler(self, step: int, seconds: float) -> None:
        if slow := self.ranks.after(step, seconds):
            message = (
                f"note: {self.roll_call.place(slow.rank)} is slow: {slow.seconds:.2f} s of its own work a step, "
                f"{slow.seconds / slow.median:.2f} times the median of all ranks"
            )
            facts = {"rank": slow.rank, "host": self.roll_call.hosts[slow.rank]}
            self.metrics.event(step, "straggler", message, seconds=slow.seconds, median=slow.median, **facts)

    def _tell_lost(self, saved: Saved) -> None:
        newest = next((str(folder) for folder in checkpoints_newest_first(self.run_dir)), "none")
        message = (
            f"error: the checkpoint after step {saved.record['step']} could not be saved: {saved.error}; "
            f"the run goes on, its newest checkpoint is {newest}; make room below {self.run_dir}"
        )
        self.metrics.event(saved.record["step"], "save_failed", message)


def lock_run_folder(run_dir: Path) -> int:
    """Makes the folder and holds its lock until this process ends, however it ends.

    Returns:
        The descriptor of the lock file, which stays open.

    Raises:
        ValueError: Another process holds it: two runs would write over each other's checkpoints.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if not try_lock(descriptor):
        os.close(descriptor)
        raise ValueError(f"another process is training in {run_dir}; wait for it or use another --run-dir")
    return descriptor
