"""What follows from a bad step that a run cannot go on from: it goes back, or it stops and leaves an autopsy.

RUN/autopsy/step-00000041/
    checkpoint/     the state before the step: bad steps in a row leave no trace in the weights
    autopsy.json    why the run stopped, the documents of the batch, and the command that does the step again in one
                    process, and says where the first number that is not finite comes up (pretrain.replay)
"""

import json
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from pretrain.checkpoint.format import FailedOnRank0, on_rank_0, read_record, step_name
from pretrain.checkpoint.resume import ResumePoint, restore
from pretrain.checkpoint.retention import delete, whole_checkpoints
from pretrain.data.batch_documents import documents_of
from pretrain.recovery.ending import TrainingGivenUp
from pretrain.recovery.health import Verdict
from pretrain.recovery.rewinds import Rewind, Rewinds
from pretrain.run import Run
from pretrain.schedule import portion_of
from titans_mcore.io import write_file_atomically
from titans_mcore.weights import checkpoints_newest_first
from tokenization.command_line import TokenizationError

AUTOPSY_FILE = "autopsy.json"
CHECKPOINT = "checkpoint"


def recover(run: Run, step: int, verdict: Verdict) -> int:
    """Goes back to the newest healthy checkpoint from before the bad step, or stops. Collective.

    Returns:
        The step of the checkpoint; from there on the bad steps are passed over.

    Raises:
        TrainingGivenUp: The verdict is to stop, there is no healthy checkpoint, or the run has gone back to it often
            enough.
    """
    if run.saver.pending:
        run.finish_save()
    if verdict.action == "stop":
        _stop(run, step, verdict.reason)
    first_bad, allowed = run.health.first_bad, run.config.health.rewinds
    found = on_rank_0(lambda: _newest_healthy(run.run_dir, first_bad))
    if found is None:
        _stop(run, step, f"{verdict.reason}; there is no healthy checkpoint to go back to")
    point = ResumePoint(*found)
    to_step = point.progress.step
    if run.rewinds.to(to_step) >= allowed:
        _stop(run, step, f"{verdict.reason}; the run went back to step {to_step} {allowed} times already")
    run.rewinds = run.rewinds.with_another(Rewind(to_step, first_bad, step, verdict.reason))
    on_rank_0(lambda: _note(run.rewinds, run.run_dir, to_step))
    restore(run.engine, run.config, point, run.carried)
    run.health.load_state_dict(point.record["health"])
    passed = f"step {step}" if first_bad == step else f"steps {first_bad} to {step}"
    message = f"{verdict.reason} at step {step}: going back to {point.folder.name}, and passing over {passed}"
    run.metrics.event(step, "rewind", message, resumed_step=to_step, first=first_bad, last=step)
    return to_step


def _stop(run: Run, step: int, reason: str) -> NoReturn:
    folder = run.run_dir / "autopsy" / step_name(step)
    try:
        command = _leave_autopsy(run, step, reason, folder)
        left = f"{folder} has the batch and the weights before it: {command} does the step again"
    except FailedOnRank0 as error:
        left = f"{folder} could not be written: {error}"
    newest = next((f"; the newest checkpoint is {one}" for one in checkpoints_newest_first(run.run_dir)), "")
    message = f"{reason}, at step {step}{newest}. {left}"
    run.metrics.record("event", step, {"name": "stopped", "message": message})
    raise TrainingGivenUp(message)


def _leave_autopsy(run: Run, step: int, reason: str, folder: Path) -> str:
    """The command that replays the step."""
    run.saver.begin(step - 1, run.carried, folder=folder / CHECKPOINT, health=run.health.state_dict())
    saved = run.saver.finish()
    portion = portion_of(step, run.config.train)
    command = f"python -m pretrain.replay {folder}"
    facts: dict[str, Any] = {
        "step": step,
        "reason": reason,
        "samples": [portion.first, portion.first + portion.samples - 1],
        "health": run.health.state_dict(),
        "documents": _documents(run, step) if dist.get_rank() == 0 else [],
        "command": command,
    }
    if saved.error:
        facts["no_checkpoint"] = saved.error
    on_rank_0(lambda: write_file_atomically(folder / AUTOPSY_FILE, (json.dumps(facts, indent=2) + "\n").encode()))
    return command


def _documents(run: Run, step: int) -> list[str]:
    try:
        return documents_of(run.samples, run.data, portion_of(step, run.config.train))
    except (TokenizationError, ValueError, OSError) as error:  # shards of elsewhere may say nothing of documents
        return [f"not known: {error}"]


def _newest_healthy(run_dir: Path, before: int) -> tuple[Path, dict[str, Any]] | None:
    for one in whole_checkpoints(run_dir):
        if one.healthy and one.step < before:
            return one.folder, read_record(one.folder)
    return None


def _note(rewinds: Rewinds, run_dir: Path, to_step: int) -> None:
    rewinds.write(run_dir)
    # What was saved since may hold what the bad batches did, and a run started again would go on from there.
    for one in whole_checkpoints(run_dir):
        if one.step > to_step:
            delete(one.folder)
