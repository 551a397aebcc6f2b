"""Where records go: a file of lines, Weights & Biases, TensorBoard. One may fail at any record; its owner goes on."""

import errno
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import LoggingConfig
from pretrain.report.records import METRICS_FILE, Record, line_of

TENSORBOARD_FOLDER = "tensorboard"


def check_sinks(logging: LoggingConfig) -> None:
    """Raises ValueError when a sink is asked for that is not installed."""
    if logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "logging.tensorboard is true, but tensorboard is not installed; "
            "run pip install 'titans-mcore[tensorboard]', or set it to false"
        )


class Lines:
    """RUN/metrics.jsonl, a line at a time and a write a line."""

    address = ""

    def __init__(self, run_dir: Path) -> None:
        self.name = str(run_dir / METRICS_FILE)
        self._stream = open(self.name, "ab", buffering=0)  # noqa: SIM115 - open for the length of the run
        self._torn = _is_torn(Path(self.name))

    def write(self, record: Record) -> None:
        """Appends a line, behind an end for one that was cut off: by a kill, or by a disk that was full."""
        data = (b"\n" if self._torn else b"") + line_of(record)
        self._torn = True
        if self._stream.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class Wandb:
    """One run at Weights & Biases, gone on with at every start; nothing but records and settings is handed to it."""

    name = "wandb"

    def __init__(self, config: RunConfig, run_dir: Path, run: str) -> None:
        import wandb

        # Before init, which would else ask for a key at a terminal, with all other ranks waiting.
        wandb.setup(settings=wandb.Settings(silent=True))
        self._run = wandb.init(
            id=run,
            resume="allow",
            project=config.logging.wandb_project,
            name=config.logging.wandb_name or run_dir.resolve().name,
            mode="online" if config.logging.wandb == "online" else "offline",
            dir=str(run_dir),
            config=asdict(config),
            # What it would gather by itself may hold passwords: a repository's address, the command line, the output.
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True
            ),
        )
        self.address = self._run.url or ""
        # Our steps, not its own: those refuse to go back, and a run may have to do steps again.
        self._run.define_metric("train_step")
        self._run.define_metric("*", step_metric="train_step")

    def write(self, record: Record) -> None:
        """Logs the numbers; those of a step under their own names, the others under their kind's."""
        if numbers := dict(_numbers(record)):
            self._run.log({"train_step": record["step"], **numbers})

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class TensorBoard:
    """RUN/tensorboard; steps that are done again replace what was there."""

    name, address = "TensorBoard", ""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=resumed_step + 1)

    def write(self, record: Record) -> None:
        """Adds every number as a scalar, and shows them."""
        for name, value in _numbers(record):
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


Sink = Lines | Wandb | TensorBoard
"""Takes records one by one: `name` is what a failure names, `address` where others see them, empty for files."""


def open_sinks(config: RunConfig, run_dir: Path, run: str, resumed_step: int) -> Iterator[Sink | Exception]:
    """The sinks that a run asks for, or what kept one from opening."""
    makers: list[tuple[bool, Any]] = [
        (True, lambda: Lines(run_dir)),
        (config.logging.wandb != "off", lambda: Wandb(config, run_dir, run)),
        (config.logging.tensorboard, lambda: TensorBoard(run_dir, resumed_step)),
    ]
    for wanted, make in makers:
        if wanted:
            try:
                yield make()
            except Exception as error:  # what a library raises is its own; none of it may end a run
                yield error


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    """A record's numbers by name; a list's by their places, or by the lengths that the record gives for them."""
    kind = record["kind"]
    if kind in ("attempt", "event"):
        return
    prefix = "" if kind == "step" else f"{kind}/{record['name']}/" if "name" in record else f"{kind}/"
    places = record.get("tokens") if kind == "position_loss" else record.get("lengths")
    for name, value in record.items():
        if name in ("kind", "run", "attempt", "time", "step", "lengths") or value is places:
            continue
        if isinstance(value, list):
            at = places if places is not None else [f"layer_{index:02d}" for index in range(len(value))]
            yield from ((f"{prefix}{name}/{where}", x) for where, x in zip(at, value, strict=False) if _is_number(x))
        elif _is_number(value):
            yield f"{prefix}{name}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_torn(file: Path) -> bool:
    """Whether a file's last line has no end."""
    if not file.stat().st_size:
        return False
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"
