"""What a run reports: records for programs, a line a step for people, wandb and TensorBoard. Rank 0 alone writes."""

import os
import re
import secrets
import socket
from pathlib import Path
from typing import Any

import torch

from evals.measure import source_commit
from pretrain.config.run_config import RunConfig
from pretrain.report.history import seconds_left, step_line
from pretrain.report.records import count_attempts, make_record
from pretrain.report.sinks import Sink, open_sinks
from titans_mcore.io import write_file_atomically


class Metrics:
    """The reports of one process; every method does nothing on ranks other than 0.

    A sink that fails is named once, and asked again with the next record: a disk may be emptied, a network come back.

    Attributes:
        attempt: How often the run was started, from 1; 0 on other ranks.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, resumed_step: int, rank: int, layout: str = "") -> None:
        """Begins an attempt. Nothing is rewritten: readers leave out what the attempt will do again.

        Args:
            config: Of the run.
            run_dir: Of the run.
            resumed_step: Steps done before this process.
            rank: Global rank.
            layout: How the run is laid out, in words.
        """
        self._config, self._active = config, rank == 0
        self._sinks: list[Sink] = []
        self._failed: set[str] = set()
        self._run, self.attempt = "", 0
        if not self._active:
            return
        self._run, self.attempt = run_id(run_dir), count_attempts(run_dir) + 1
        for sink in open_sinks(config, run_dir, self._run, resumed_step):
            if isinstance(sink, Exception):
                self.say(f"note: a report cannot be opened and is left out: {_told(sink)}")
            else:
                self._sinks.append(sink)
                if sink.address:
                    self.say(f"{sink.name}: {sink.address}")
        head = {
            "resumed_step": resumed_step,
            "steps": config.train.steps,
            "variant": config.model.variant,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "layout": layout,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "commit": source_commit(),
        }
        self.record("attempt", resumed_step, head)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Hands a record to all sinks.

        Args:
            kind: One of records.KINDS, which says what its values are.
            step: Done when this was found.
            values: Numbers, texts, lists of them; nothing is recorded without any, as of a model without memories.
        """
        if not self._active or not values:
            return
        record = make_record(kind, self._run, self.attempt, step, values)
        for sink in self._sinks:
            try:
                sink.write(record)
            except Exception as error:  # what a library raises is its own; none of it may end a run
                self._report_once(sink.name, error)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Records a step, and prints it when its turn has come.

        Args:
            step: Counted from 1.
            values: loss, grad_norm, lr, tokens, tokens_per_second, seconds, data_wait_seconds; mfu and memory_bytes
                where they are known; heldout_loss where the step was followed by an evaluation, which becomes a record
                of its own.
        """
        if not self._active:
            return
        of_step = {name: value for name, value in values.items() if name != "heldout_loss"}
        self.record("step", step, of_step)
        steps, heldout = self._config.train.steps, values.get("heldout_loss")
        line = step_line(step, steps, of_step, seconds_left(step, values["seconds"], self._config.train))
        if heldout is not None:
            self.record("heldout", step, {"loss": heldout})
            line += f" | held-out loss {heldout:.4f}"
        if step % self._config.logging.every_steps == 0 or step == steps or heldout is not None:
            self.say(line)

    def event(self, step: int, name: str, message: str, **values: Any) -> None:
        """Records that something happened, and prints the message.

        Args:
            step: Done when it happened.
            name: What, in a word: "spike", "rewind", "save_failed".
            message: A sentence.
            values: What belongs to it; `resumed_step` where the run goes back to an earlier step.
        """
        self.record("event", step, {"name": name, "message": message, **values})
        self.say(message)

    def say(self, sentence: str) -> None:
        """Prints a line."""
        if self._active:
            print(sentence, flush=True)

    def close(self) -> None:
        """Closes the sinks."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._report_once(sink.name, error)

    def _report_once(self, name: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            self.say(f"note: {name} does not take reports, the run goes on without: {_told(error)}")


def _told(error: Exception) -> str:
    """An error in one line, without anything secret."""
    return without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))


RUN_ID_FILE = "run_id"


def run_id(run_dir: Path) -> str:
    """The id in RUN/run_id, made when there is none: the key of the run's records, and the run's id at wandb.

    Raises:
        ValueError: The file holds something else.
    """
    file = run_dir / RUN_ID_FILE
    if not file.exists():
        write_file_atomically(file, f"{secrets.token_hex(4)}\n".encode())
    found = file.read_text().strip()
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", found):
        raise ValueError(f"{file} holds {found!r}, which is no id of a run; remove it to begin a new one")
    return found


_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password@host
_SHORTEST = 8  # a shorter value is a word, not a secret


def without_secrets(text: str) -> str:
    """The text with *** for the values of variables like WANDB_API_KEY or HF_TOKEN, and for passwords in addresses."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _IN_ADDRESS.sub("***", text)
