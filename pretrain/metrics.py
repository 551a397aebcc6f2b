"""What a run reports: metrics.jsonl for programs, a line a step for people, wandb when asked. Rank 0 alone writes."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """The reports of one process; every method does nothing on ranks other than 0."""

    def __init__(self, config: RunConfig, run_dir: Path, *, resumed_step: int, rank: int) -> None:
        """Opens the files; lines of steps that will be done again are dropped.

        Args:
            config: Of the run.
            run_dir: Of the run.
            resumed_step: Steps done before this process.
            rank: Global rank.
        """
        self._config = config
        self._active = rank == 0
        self._first_step = resumed_step
        self._seconds = 0.0
        self._wandb: Any = None
        if not self._active:
            return
        file = run_dir / METRICS_FILE
        _keep_steps(file, resumed_step)
        self._stream = file.open("a", encoding="utf-8")
        if config.logging.wandb != "off":
            self._wandb = _start_wandb(config, run_dir)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Reports one step.

        Args:
            step: Counted from 1.
            values: loss, grad_norm, lr, tokens, tokens_per_second, seconds, data_wait_seconds; heldout_loss,
                position_loss_NAME and probe_NAME where the step was followed by an evaluation.
        """
        if not self._active:
            return
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        self._seconds += values["seconds"]
        if step % self._config.logging.every_steps == 0 or step == self._config.train.steps or "heldout_loss" in values:
            self.say(self._line(step, values))

    def say(self, sentence: str) -> None:
        """Prints a line."""
        if self._active:
            print(sentence, flush=True)

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._stream.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _line(self, step: int, values: dict[str, Any]) -> str:
        steps = self._config.train.steps
        left = self._seconds / (step - self._first_step) * (steps - step)
        line = (
            f"step {step:>{len(str(steps))}}/{steps} | loss {values['loss']:.4f} | "
            f"{values['tokens_per_second']:,.0f} tokens/s | lr {values['lr']:.2e} | "
            f"grad norm {values['grad_norm']:.3f} | ETA {clock(left)}"
        )
        if "heldout_loss" in values:
            line += f" | held-out loss {values['heldout_loss']:.4f}"
        return line


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The reported steps of a run folder; a line that was cut off in the middle of writing is left out."""
    file = run_dir / METRICS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [record for line in lines if (record := _parse(line)) is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _keep_steps(file: Path, last: int) -> None:
    """Leaves the steps up to `last`, by writing another file and renaming it."""
    if not file.exists():
        return
    kept = [record for record in read_metrics(file.parent) if record["step"] <= last]
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in kept)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _start_wandb(config: RunConfig, run_dir: Path) -> Any:
    import wandb

    return wandb.init(
        project=config.logging.wandb_project,
        name=config.logging.wandb_name or run_dir.resolve().name,
        mode="online" if config.logging.wandb == "online" else "offline",
        dir=str(run_dir),
        config=asdict(config),
    )
