"""Measures one case in a process of its own: `python -m evals.efficiency.worker CASE`, CASE a Case as JSON.

It answers in lines of JSON: one when it has started, and then one for each line that comes in, the first with what
warming up has found, the others with the seconds of one repeat. A fault is a line too, and its last.
"""

import ctypes
import gc
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from evals.efficiency.cases import FORWARD, Case
from evals.efficiency.implementations import Subject, build
from evals.measure import PeakMemory
from evals.report import bytes_text

_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_WARM_CHUNKS, _WARM_RUNS = 2, 2  # a compiler of traces, as titans-pytorch uses one, has settled after two
_REMEDIES = {
    "titans-pytorch": "install this project's extra `bench`",
    "flash-attn": "install this project's extra `gpu`",
    "flash-linear-attention": "pip install flash-linear-attention",
}


def main() -> None:
    """Runs the process; the arguments are the case, its threads and its memory in bytes."""
    # What libraries print must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case, threads, limit = Case(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    try:
        # A measurement that nobody waits for would only disturb others; Linux kills it then.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # as in training
        torch.manual_seed(0)
        subject = build(case)
        answer(started=True)
        sys.stdin.readline()
        once, found = _prepare(case, subject, limit)
        answer(**found)
        for _ in sys.stdin:
            answer(seconds=once())
    except BaseException as fault:
        answer(fault=_kind(fault), reason=_reason(case, fault))
        raise


def _prepare(case: Case, subject: Subject, limit: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """A timed repeat, and what the first full-size runs found; tiny ones before them load what is loaded lazily."""
    device = torch.device(case.device)
    tiny = subject.inputs(min(case.length, _WARM_CHUNKS * max(case.chunk, 16)))
    for _ in range(_WARM_RUNS):
        _is_finite(run(case, subject, tiny, torch.randn_like(tiny[0])))
    if device.type == "cpu":
        _limit_memory(limit)
    inputs = subject.inputs(case.length)
    gradient = torch.randn_like(inputs[0])
    if device.type == "cpu":  # what was freed so far leaves the process: reused silently, it is missing from the peak
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    synchronize(device)
    peak = PeakMemory(device)
    baseline = peak.bytes()
    for _ in range(_WARM_RUNS):
        gc.collect()
        finite = _is_finite(run(case, subject, inputs, gradient))
    found = {"baseline_bytes": baseline, "peak_bytes": peak.bytes() - baseline, "finite": finite}

    version = metadata.version(case.implementation) if case.implementation in _REMEDIES else None

    def once() -> float:
        gc.collect()  # what one run left in cycles is not the next one's memory
        started = time.perf_counter()
        run(case, subject, inputs, gradient)
        synchronize(device)
        return time.perf_counter() - started

    return once, {**found, "version": version}


def run(case: Case, subject: Subject, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """One forward pass, or one forward and backward pass: the output and the gradients that arrived."""
    if case.direction == FORWARD:
        with torch.no_grad():
            return [subject.call(inputs)]
    output = subject.call(inputs)
    found = torch.autograd.grad(output, [*inputs, *subject.parameters], gradient, allow_unused=True)
    return [output, *(x for x in found if x is not None)]


def _is_finite(results: list[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in results)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _limit_memory(more: int) -> None:
    """A request beyond so many bytes more than now fails here, instead of taking memory from others."""
    with open("/proc/self/statm") as file:
        data_pages = int(file.read().split()[5])
    soft = data_pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_DATA, (soft, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _kind(fault: BaseException) -> str:
    if isinstance(fault, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(fault):
        return "out of memory"
    return "not run" if isinstance(fault, ModuleNotFoundError) else "failed"


def _reason(case: Case, fault: BaseException) -> str:
    if isinstance(fault, ModuleNotFoundError):
        return f"{fault.name} is not installed; {_REMEDIES.get(case.implementation, 'install it')}"
    if refused := re.search(r"tried to allocate (\d+) bytes", str(fault)):
        return f"another {bytes_text(int(refused[1]))} would pass --limit-gigabytes"
    return " ".join(f"{type(fault).__name__}: {fault}".split())[:300]


if __name__ == "__main__":
    main()
