"""Measures one case in a process of its own: `python -m evals.efficiency.worker CASE LIMITS`, both as JSON.

It answers with a line of JSON: what it has found, or the fault. Before every repeat it stops itself and waits for
SIGCONT, so that the repeats of several cases can take turns.

titans-pytorch is called with what comes closest to this project's layer: momentum and forgetting on, a residual
LayerNorm network of the same shape per head, a learning rate per weight matrix (`per_parameter_lr_modulation`), its own
pre-norm and projections. Its `chunk_size` is how many tokens share one gate, momentum step and forgetting step; its
`batch_size` is how many share the weights at which gradients are taken, our chunk b. Left at None, its default, all
gradients of a sequence are taken at the first weights: less work, and another function than a memory that learns.

Letters: B batch, T time, H heads, D head width, L memory layers, b tokens of a chunk.
"""

import ctypes
import gc
import itertools
import json
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evals.measure import PeakMemory
from evals.report import bytes_text
from titans_mcore.config import TitansConfig

OURS, TITANS_PYTORCH = "titans-mcore", "titans-pytorch"
FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        implementation: Whose code.
        part: "layer" is the memory with everything a model needs around it (projections, gates, norms), "scan" the
            memory alone on given queries, keys, values and gates.
        setting: What distinguishes it among cases of the same implementation and part: this project's backend, the
            arguments of titans-pytorch.
        direction: "forward" (no gradients are wanted) or "forward+backward" (of inputs and parameters).
        batch: B.
        length: T.
        heads: H.
        width: D.
        depth: L.
        expansion: Hidden width over D.
        chunk: b, tokens whose gradients are taken at the same weights; 0 means all of the sequence.
        gates: Tokens that share one value of each gate.
        dtype: Of inputs and parameters.
        device: "cpu" or "cuda".
    """

    implementation: str
    part: str
    setting: str
    direction: str
    batch: int
    length: int
    heads: int
    width: int
    depth: int
    expansion: int
    chunk: int
    gates: int
    dtype: str
    device: str

    @property
    def name(self) -> str:
        """How the case is called in reports and in --only."""
        return f"{self.implementation} {self.part} {self.setting} T={self.length} {self.direction}"

    @property
    def tokens(self) -> int:
        """Tokens of one repeat."""
        return self.batch * self.length


@dataclass
class Subject:
    """What is measured.

    Attributes:
        inputs: Tensors for a length T; gradients of all that want them belong to the backward pass.
        call: From inputs to an output of the first input's shape.
        parameters: Differentiated too.
    """

    inputs: Callable[[int], list[Tensor]]
    call: Callable[[list[Tensor]], Tensor]
    parameters: Sequence[Tensor]


def build(case: Case) -> Subject:
    """The subject of a case.

    Raises:
        ModuleNotFoundError: titans-pytorch is not installed.
    """
    if case.implementation == TITANS_PYTORCH:
        return _titans_pytorch(case)
    return _our_layer(case) if case.part == "layer" else _our_scan(case)


def _our_layer(case: Case) -> Subject:
    """Pre-norm, projections, convolution, memory, output norm and gate, output projection; no persistent tokens."""
    from titans_mcore.mixers.lmm import LmmMixer
    from titans_mcore.mixers.parts import Parts

    dim = case.heads * case.width
    config = TitansConfig(
        variant="lmm",
        dim=dim,
        memory_heads=case.heads,
        memory_depth=case.depth,
        memory_expansion=case.expansion,
        chunk_size=case.chunk,
        persistent_tokens=0,
        memory_backend=case.setting,  # type: ignore[arg-type]
    )
    norm, mixer = nn.RMSNorm(dim), LmmMixer(config, Parts(config))
    for module in (norm, mixer):
        module.to(case.device, getattr(torch, case.dtype))
    parameters = [*norm.parameters(), *mixer.parameters()]
    return Subject(lambda length: [_randn(case, length, dim)], lambda x: mixer(norm(x[0]), None)[0], parameters)


def _our_scan(case: Case) -> Subject:
    """memory_scan alone. Its gates spread over tokens about where those of a new layer stand."""
    from titans_mcore.memory import memory_scan

    widths = [case.width, *[case.expansion * case.width] * (case.depth - 1), case.width]
    kind = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    # Standard deviation 1 is where a memory with LayerNorm begins.
    weights = [torch.randn(case.heads, *shape, **kind).requires_grad_() for shape in itertools.pairwise(widths)]
    # Steps of a tenth of the largest, 0.1; momentum of two tokens; forgetting over 30 to 3,000 tokens, by head.
    forget = torch.linspace(-3.5, -8.0, case.heads, device=case.device)
    centres = [torch.full_like(forget, -2.2), torch.zeros_like(forget), forget]

    def inputs(length: int) -> list[Tensor]:
        noise = torch.randn(3, case.batch, length, case.heads, case.depth, device=case.device)
        gates = [torch.sigmoid(x + centre.unsqueeze(-1)) for x, centre in zip(noise, centres, strict=True)]
        gates[0] = 0.1 * gates[0]
        tokens = [_randn(case, length, case.heads, case.width) for _ in range(3)]
        tokens[:2] = [F.normalize(x.detach(), dim=-1).requires_grad_() for x in tokens[:2]]
        return [*tokens, *(gate.requires_grad_() for gate in gates)]

    def call(x: list[Tensor]) -> Tensor:
        queries, keys, values, theta, eta, alpha = x
        tokens = (queries, keys, values, theta, eta, alpha)
        return memory_scan(*tokens, weights, chunk_size=case.chunk, backend=case.setting)[0]

    return Subject(inputs, call, list(weights))


def _titans_pytorch(case: Case) -> Subject:
    from titans_pytorch import MemoryMLP, NeuralMemory

    dim = case.heads * case.width
    memory = NeuralMemory(
        dim=dim,
        heads=case.heads,
        dim_head=case.width,
        chunk_size=case.gates,
        batch_size=case.chunk or None,
        model=MemoryMLP(case.width, depth=case.depth, expansion_factor=case.expansion),
        momentum=True,
        per_parameter_lr_modulation=True,
    ).to(case.device, getattr(torch, case.dtype))
    # The network it was given is a template; what is learned are its copies for each head.
    parameters = [p for name, p in memory.named_parameters() if not name.startswith("memory_model.")]
    return Subject(lambda length: [_randn(case, length, dim)], lambda x: memory(x[0])[0], parameters)


def _randn(case: Case, length: int, *shape: int) -> Tensor:
    dtype = getattr(torch, case.dtype)
    return torch.randn(case.batch, length, *shape, device=case.device, dtype=dtype, requires_grad=True)


@dataclass(frozen=True)
class Limits:
    """What a case may take, and how often it is repeated.

    Attributes:
        repeats: At most so many.
        repeat_seconds: A repeat is as many runs as take so long, or one: the first one behind a stop takes up to twice
            as long as runs that follow each other, which is how a training has them.
        threads: On a CPU.
        seconds: In all.
        gigabytes: On a CPU.
    """

    repeats: int
    repeat_seconds: float
    threads: int
    seconds: float
    gigabytes: float


_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_WARM_CHUNKS, _WARM_RUNS = 2, 2  # a compiler of traces, as titans-pytorch uses one, has settled after two


def main() -> None:
    """Runs the process."""
    answer = os.fdopen(os.dup(1), "w")  # what libraries print must not stand beside it
    os.dup2(2, 1)
    case, limits = Case(**json.loads(sys.argv[1])), Limits(**json.loads(sys.argv[2]))
    try:
        # A measurement that nobody waits for would only disturb others; Linux kills it then.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
        torch.set_num_threads(limits.threads)
        torch.set_flush_denormal(True)  # as in training
        torch.manual_seed(0)
        found = measured(case, build(case), limits)
    except Exception as fault:
        found = {"status": _kind(fault), "reason": _reason(fault)}
    answer.write(json.dumps(found) + "\n")
    answer.close()


def measured(case: Case, subject: Subject, limits: Limits) -> dict[str, Any]:
    """What a case's repeats take, and what the first full-size runs did; tiny ones load what is loaded lazily."""
    began, device = time.monotonic(), torch.device(case.device)
    # The system ends the process where a single run never returns.
    signal.setitimer(signal.ITIMER_REAL, max(limits.seconds, 1e-3))
    tiny = subject.inputs(min(case.length, _WARM_CHUNKS * max(case.chunk, 16)))
    for _ in range(_WARM_RUNS):
        run(case, subject, tiny, torch.randn_like(tiny[0]))
    if device.type == "cpu":
        _limit_memory(int(limits.gigabytes * 1e9))
    inputs = subject.inputs(case.length)
    gradient = torch.randn_like(inputs[0])
    if device.type == "cpu":  # what was freed so far leaves the process: reused silently, it is missing from the peak
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    synchronize(device)
    peak, finite = PeakMemory(device), True
    baseline = peak.bytes()
    for _ in range(_WARM_RUNS):
        gc.collect()
        finite = all(bool(x.isfinite().all()) for x in run(case, subject, inputs, gradient))
    found = {"baseline_bytes": baseline, "peak_bytes": peak.bytes() - baseline, "finite": finite}
    seconds, left, longest = list[float](), limits.seconds - (time.monotonic() - began), 0.0
    while len(seconds) < limits.repeats and longest < left:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.kill(os.getpid(), signal.SIGSTOP)  # until it is this case's turn
        signal.setitimer(signal.ITIMER_REAL, left)
        gc.collect()  # what one run left in cycles is not the next one's memory
        started, runs, took = time.perf_counter(), 0, 0.0
        while not runs or took < limits.repeat_seconds:
            run(case, subject, inputs, gradient)
            synchronize(device)
            runs, took = runs + 1, time.perf_counter() - started
        seconds.append(took / runs)
        left, longest = left - took, max(longest, took)
    signal.setitimer(signal.ITIMER_REAL, 0)
    few = f"{len(seconds)} of {limits.repeats} repeats in --limit-seconds {limits.seconds:g}"
    if not seconds:
        return {"status": "not run", "reason": few}
    median = statistics.median(seconds)
    version = metadata.version(case.implementation) if case.implementation == TITANS_PYTORCH else None
    speed = {"seconds": median, "tokens_per_second": case.tokens / median, "all_seconds": seconds, "version": version}
    return {"status": "measured", "reason": few if len(seconds) < limits.repeats else None, **found, **speed}


def run(case: Case, subject: Subject, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """One forward pass, or one forward and backward pass: the output and the gradients that arrived."""
    if case.direction == FORWARD:
        with torch.no_grad():
            return [subject.call(inputs)]
    output = subject.call(inputs)
    found = torch.autograd.grad(output, [*inputs, *subject.parameters], gradient, allow_unused=True)
    return [output, *(x for x in found if x is not None)]


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


def _kind(fault: Exception) -> str:
    if isinstance(fault, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(fault):
        return "out of memory"
    return "not run" if isinstance(fault, ModuleNotFoundError) else "failed"


def _reason(fault: Exception) -> str:
    if isinstance(fault, ModuleNotFoundError):
        return f"{fault.name} is not installed; install this project's extra `bench`"
    if refused := re.search(r"tried to allocate (\d+) bytes", str(fault)):
        return f"another {bytes_text(int(refused[1]))} would pass --limit-gigabytes"
    return " ".join(f"{type(fault).__name__}: {fault}".split())[:300]


if __name__ == "__main__":
    main()
