"""The measurement of the memory: runs the cases, adds what follows from their numbers, writes the report.

Cases run in groups: one process a case, repeats in turns, and a row for every case whatever becomes of it.
"""

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from evals.command_line import EvaluationError, python_path, say
from evals.efficiency import MemorySettings
from evals.efficiency.cases import OURS, Case, plan
from evals.efficiency.implementations import layer_config
from evals.efficiency.summary import Row, markdown
from evals.measure import circumstances
from evals.report import write_bytes, write_json

_START_SECONDS = 300.0  # beside a case's limit: importing torch takes long on a busy machine
_GIGABYTE = 10**9


def measure(settings: MemorySettings) -> str:
    """Measures and writes memory.json and memory.md.

    Returns:
        What memory.md holds.

    Raises:
        EvaluationError: There is no such device, or --only leaves nothing.
    """
    device = _device(settings.device)
    groups = plan(settings, device)
    if not groups:
        raise EvaluationError(f"--only {' '.join(settings.only)} matches no case; see the names in a memory.json")
    settings.output.mkdir(parents=True, exist_ok=True)
    ceiling = matmul_ceiling(device, settings.threads, size=256 if settings.quick else None)
    report = {**circumstances(settings, device), "matmul_ceiling_flops_per_second": ceiling}
    rows: list[Row] = []
    for group in _run(groups, settings):  # what is finished is written, whatever becomes of the rest
        rows += [_with_flops(row, ceiling) for row in group]
        text = markdown({**report, "rows": rows})
        write_json(settings.output / "memory.json", {**report, "rows": rows})
        write_bytes(settings.output / "memory.md", text.encode())
    return text


def matmul_ceiling(device: str, threads: int, size: int | None = None) -> float:
    """Operations a second of a large matrix product, in the dtype of the cases: what could be reached at best."""
    size = size or (8_192 if device == "cuda" else 2_048)
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[3:])


def flops(row: Row) -> int | None:
    """Operations of one repeat of our rows, recomputation left out; None for others, whose work is another."""
    if row["implementation"] != OURS:
        return None
    from titans_mcore.mixers.costs import memory_flops

    config = layer_config(row["heads"], row["width"], row["depth"], row["expansion"], row["chunk"])
    per_token = memory_flops(config)
    if row["part"] == "layer":  # q, k, v, output gate, gates, output
        per_token += 2 * config.dim * (5 * config.dim + 3 * row["depth"] * row["heads"])
    return row["batch"] * row["length"] * per_token * (3 if "backward" in row["direction"] else 1)


def _run(groups: list[list[Case]], settings: MemorySettings) -> Iterator[list[Row]]:
    repeats = 2 if settings.quick else settings.repeats
    limits = Limits(repeats, settings.threads, settings.limit_seconds, settings.limit_gigabytes)
    total, done = sum(map(len, groups)), 0
    for group in groups:
        say(f"{done} of {total} cases done; {len(group)} at T = {group[-1].length:,}")
        yield run_group(group, limits)
        done += len(group)


def _with_flops(row: Row, ceiling: float) -> Row:
    needed = flops(row)
    if needed is None or row["status"] != "measured":
        return row
    achieved = needed / row["seconds"]
    return {**row, "flops": needed, "flops_per_second": achieved, "share_of_matmul_ceiling": achieved / ceiling}


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("--device cuda, but torch finds no GPU; give --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


@dataclass(frozen=True)
class Limits:
    """What a case may take, and how often it is repeated."""

    repeats: int
    threads: int
    seconds: float
    gigabytes: float


class CaseFault(Exception):
    """A case that gives no number.

    Attributes:
        status: "out of memory", "not run" or "failed".
        reason: Why, in a sentence.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def run_group(cases: Iterable[Case], limits: Limits) -> list[dict[str, Any]]:
    """Measures cases side by side.

    Every case is brought to readiness and then waits; the repeats go round, so that noise hits all alike.

    Returns:
        A row for each case, in order: the case, `status` ("measured", "out of memory", "not run", "failed"), and either
        numbers or a `reason`.
    """
    workers = [_Worker(case, limits) for case in cases]
    try:
        for worker in workers:
            worker.prepare()
        for _ in range(limits.repeats):
            for worker in workers:
                worker.repeat()
        return [worker.row() for worker in workers]
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """The process of one case. Faults end it and are kept for its row."""

    def __init__(self, case: Case, limits: Limits) -> None:
        self._case, self._limits = case, limits
        self._left = _START_SECONDS
        self._begun = False
        self._found: dict[str, Any] = {}
        self._seconds: list[float] = []
        self._fault: CaseFault | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def prepare(self) -> None:
        """Starts the process and waits until it has warmed up and knows its peak of memory."""
        arguments = [json.dumps(self._case.__dict__), str(self._limits.threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evals.efficiency.worker", *arguments, str(int(self._limits.gigabytes * _GIGABYTE))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(self._limits.threads),
        )
        if self._ask(b"") is not None:
            self._begun, self._left = True, self._limits.seconds
            self._found = self._ask(b"\n") or {}

    def repeat(self) -> None:
        """Times one repeat, unless the case has ended or there is no time for one as long as the last."""
        if self._fault is None and self._left > max(self._seconds[-1:], default=0.0):
            answer = self._ask(b"\n")
            if answer is not None:
                self._seconds.append(answer["seconds"])

    def row(self) -> dict[str, Any]:
        """What became of the case."""
        row = {**self._case.to_dict(), **self._found}
        if not self._seconds:
            fault = self._fault or CaseFault("not run", self._over())
            return {**self._case.to_dict(), "status": fault.status, "reason": fault.reason}
        median = statistics.median(self._seconds)
        speed = {"seconds": median, "tokens_per_second": self._case.tokens / median, "all_seconds": self._seconds}
        # That repeats are missing does not undo the others, but it does not stay unsaid either.
        reason = None
        if len(self._seconds) < self._limits.repeats:
            reason = f"{len(self._seconds)} of {self._limits.repeats} repeats: {self._fault or self._over()}"
        return {**row, "status": "measured", "reason": reason, **speed}

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def _ask(self, request: bytes) -> dict[str, Any] | None:
        """The answer to a request; None when there is none, and then the fault is kept."""
        started = time.monotonic()
        try:
            answer = self._receive(request, started + self._left)
            if "fault" in answer:
                raise CaseFault(answer["fault"], answer["reason"])
            return answer
        except CaseFault as fault:
            self._fault = fault
            assert self._process is not None
            self._process.kill()
            return None
        finally:
            self._left -= time.monotonic() - started

    def _receive(self, request: bytes, deadline: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            raise self._crashed() from None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise CaseFault("not run", self._over() if self._begun else f"did not start in {_START_SECONDS:g} s")
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                raise self._crashed()
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def _over(self) -> str:
        return f"takes more than --limit-seconds {self._limits.seconds:g}"

    def _crashed(self) -> CaseFault:
        """Says how the process ended; without a last word it was killed, mostly for memory."""
        assert self._process is not None
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return CaseFault("out of memory", "the system killed the process")
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        last = lines[-1][:200] if lines else "no message"
        return CaseFault("failed", f"the process ended with status {code}: {last}")


def _environment(threads: int) -> dict[str, str]:
    # The processes that wait for their turn must not spin.
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": python_path()}
    return {**os.environ, **own}
