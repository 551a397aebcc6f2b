"""A run that is under way: what it holds, and what is done between its steps."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from pretrain.autopsy import CHECKPOINT, autopsy_folder, first_nonfinite, write_autopsy
from pretrain.batch_documents import documents_of
from pretrain.carried import CarriedState
from pretrain.checkpoint import on_rank_0, read_record
from pretrain.config import RunConfig
from pretrain.data import Batches, MicroBatch, NumberedSamples
from pretrain.ending import TrainingFailed
from pretrain.engine import first_rank_loss, own, train_step
from pretrain.folders import RunData
from pretrain.hangs import RollCall, straggler
from pretrain.health import Health, Verdict
from pretrain.inloop.evaluations import Evaluations
from pretrain.metrics import Metrics
from pretrain.resume import ResumePoint, restore
from pretrain.retention import Probation, delete, delete_others, whole_checkpoints
from pretrain.rewinds import Rewind, Rewinds
from pretrain.saving import Saved, Saver
from pretrain.schedule import Portion, portion_of, rate_of, tokens_after
from pretrain.throughput import MfuMeter, memory_bytes
from titans_mcore.parallel.waiting import Waiting
from titans_mcore.telemetry import MemoryTelemetry
from titans_mcore.weights import checkpoints_newest_first
from tokenization.errors import TokenizationError


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
    waiting: Waiting = field(init=False, default_factory=Waiting)
    busy_seconds: float = field(init=False, default=0.0)
    telemetry: MemoryTelemetry = field(init=False)
    micro_batches: list[MicroBatch] = field(init=False, default_factory=list)
    save_error: str = field(init=False, default="")
    current_step: int = field(init=False, default=0)
    mfu_meter: MfuMeter = field(init=False)

    def __post_init__(self) -> None:
        self.roll_call = RollCall()
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
        with self.waiting.measured():
            result = train_step(self.engine, self.micro_batches, lr, self.carried, limit, telemetry)
        if telemetry:
            self.metrics.record("memory", step, telemetry.collect())
        seconds, train = time.perf_counter() - began, self.config.train
        self._compare_ranks(step, seconds)
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

    def recover(self, step: int, verdict: Verdict) -> int:
        """Does what follows from a bad step that the run cannot go on from.

        Returns:
            The step that the run is at now.

        Raises:
            TrainingFailed: It stops.
        """
        if verdict.action == "stop":
            self.fail(step, verdict.reason)
        return self.go_back(step, verdict)

    def go_back(self, step: int, verdict: Verdict) -> int:
        """Goes back to the newest healthy checkpoint from before a bad step, and passes over the bad ones from then on.

        Returns:
            The step of the checkpoint.

        Raises:
            TrainingFailed: There is no healthy checkpoint, or the run has gone back to it often enough.
        """
        if self.saver.pending:
            self.finish_save()
        first_bad, allowed = self.health.first_bad, self.config.health.rewinds
        healthy = on_rank_0(lambda: self._newest_healthy(first_bad))
        if healthy is None:
            self.fail(step, f"{verdict.reason}; there is no healthy checkpoint to go back to")
        point = ResumePoint(*healthy)
        to_step = point.progress.step
        if self.rewinds.to(to_step) >= allowed:
            self.fail(step, f"{verdict.reason}; the run went back to step {to_step} {allowed} times already")
        self.rewinds = self.rewinds.with_another(Rewind(to_step, first_bad, step, verdict.reason))
        on_rank_0(lambda: self._write_rewinds(to_step))
        restore(self.engine, self.config, point, self.carried)
        self.health.load_state_dict(point.record["health"])
        passed = f"step {step}" if first_bad == step else f"steps {first_bad} to {step}"
        message = f"{verdict.reason} at step {step}: going back to {point.folder.name}, and passing over {passed}"
        self.metrics.event(step, "rewind", message, resumed_step=to_step, first=first_bad, last=step)
        return to_step

    def fail(self, step: int, reason: str) -> NoReturn:
        """Leaves an autopsy and ends the run.

        Raises:
            TrainingFailed: Always.
        """
        folder = autopsy_folder(self.run_dir, step)
        if self.saver.pending:
            self.finish_save()
        self.saver.begin(step - 1, self.carried, folder=folder / CHECKPOINT, health=self.health.state_dict())
        saved = self.saver.finish()
        places = first_nonfinite(self.engine, self._losses_again(step))
        portion = portion_of(step, self.config.train)
        facts: dict[str, Any] = {
            "step": step,
            "reason": reason,
            "samples": [portion.first, portion.first + portion.samples - 1],
            "first_nonfinite": places,
            "health": self.health.state_dict(),
            "documents": self._documents(portion) if dist.get_rank() == 0 else [],
            "command": f"python -m pretrain.replay {folder}",
        }
        if saved.error:
            facts["no_checkpoint"] = saved.error
        on_rank_0(lambda: write_autopsy(folder, facts))
        newest = next((f"; the newest checkpoint is {one}" for one in checkpoints_newest_first(self.run_dir)), "")
        where = places.get("forward") or places.get("backward")
        raise TrainingFailed(
            f"{reason}, at step {step}{newest}. "
            + (f"Not finite first in {where}. " if where else "")
            + f"{folder} has the batch and the weights before it: {facts['command']} does the step again"
        )

    def close(self) -> None:
        """Ends threads and closes files."""
        self.batches.close()
        self.saver.close()
        self.metrics.close()

    def _compare_ranks(self, step: int, seconds: float) -> None:
        """Names the slowest rank every so many steps."""
        self.busy_seconds += seconds - self.waiting.take()
        every = self.config.logging.stragglers_every_steps
        if not every or step % every or dist.get_world_size() == 1:
            return
        own = torch.tensor([self.busy_seconds / every], dtype=torch.float64)
        self.busy_seconds = 0.0
        all_ranks = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, own)
        if slow := straggler([float(one) for one in all_ranks]):
            message = (
                f"note: {self.roll_call.place(slow.rank)} is slow: {slow.seconds:.2f} s of its own work a step, "
                f"{slow.seconds / slow.median:.2f} times the median of all ranks"
            )
            facts = {"rank": slow.rank, "host": self.roll_call.hosts[slow.rank]}
            self.metrics.event(step, "straggler", message, seconds=slow.seconds, median=slow.median, **facts)

    def _losses_again(self, step: int) -> Iterator[torch.Tensor]:
        micro_batches: list[MicroBatch] = self.batches.fetch(step - 1, ahead=0)
        for micro_batch in micro_batches:
            yield self.engine(**own(micro_batch)).mean()

    def _documents(self, portion: Portion) -> list[str]:
        try:
            return documents_of(self.samples, self.data, portion)
        except (TokenizationError, ValueError, OSError) as error:  # shards of elsewhere may say nothing of documents
            return [f"not known: {error}"]

    def _newest_healthy(self, before: int) -> tuple[Path, dict[str, Any]] | None:
        for one in whole_checkpoints(self.run_dir):
            if one.healthy and one.step < before:
                return one.folder, read_record(one.folder)
        return None

    def _write_rewinds(self, to_step: int) -> None:
        self.rewinds.write(self.run_dir)
        # What was saved since may hold what the bad batches did, and a run started again would go on from there.
        for one in whole_checkpoints(self.run_dir):
            if one.step > to_step:
                delete(one.folder)

    def _tell_lost(self, saved: Saved) -> None:
        newest = next((str(folder) for folder in checkpoints_newest_first(self.run_dir)), "none")
        message = (
            f"error: the checkpoint after step {saved.record['step']} could not be saved: {saved.error}; "
            f"the run goes on, its newest checkpoint is {newest}; make room below {self.run_dir}"
        )
        self.metrics.event(saved.record["step"], "save_failed", message)
