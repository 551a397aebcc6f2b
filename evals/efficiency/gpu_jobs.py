"""What a GPU check measures in a process of its own: `python -m evals.efficiency.gpu_jobs KIND [--tiny] NAME ...`.

For each name, which says what is measured, a line of JSON as soon as it is there. KIND is
  facts      of the device and what is installed; the name is any
  gradients  the fused kernels in bfloat16 against the chunked form in float32: B1-T4096-H24-D64-L2-F256-b16, where
             -plain at the end leaves LayerNorm out and -keeping forgetting
  timings    the memory's scan alone, forward and with its gradient, and its kernels apart: likewise
  training   tokens a second of a preset's model, vocabulary 32,000, rows a step: mag_340m-B4
  steps      of a run that was trained: its folder
  reading    a preset's model of so many blocks that reads so many tokens in pieces: mag_340m-L4-T2097152
--tiny makes models tiny, which shows that everything runs; their numbers mean nothing.

Letters: B batch, T time, H heads, D head width, L memory layers (in reading: blocks), F hidden width, b chunk's tokens.
"""

import gc
import hashlib
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evals.efficiency import ContextSettings
from evals.efficiency.worker import BOTH, FORWARD, OURS, Case, build, run, synchronize

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from pretrain.config.run_config import RunConfig
    from pretrain.report.throughput import MfuMeter

Found = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT16_ERROR = 0.1
"""Of a tensor's norm. Rounding of products leaves up to 0.04, most at alpha; wrong code was off by half (fla #984)."""
_FAR_OFF = 1e9
_WARM_UP, _REPEATS = 2, 5
_VOCABULARY = 32_000
_PIECE, _DECODED = 2_048, 16
_PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "deepspeed",
    "transformers",
    "titans-pytorch",
    "fla-core",
    "flash-attn",
)
_TINY = (
    *("--model.num-layers", "2", "--model.dim", "64", "--model.num-heads", "4", "--model.ffn-dim", "64"),
    *("--model.persistent-tokens", "4", "--model.segment-length", "32", "--train.sequence-length", "64"),
    *("--train.precision", "bf16"),  # as on a GPU
)


def facts(name: str) -> Found:
    """Of the device and the packages, and whether kernels that were compiled elsewhere would be found."""
    found: Found = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    if DEVICE == "cuda":
        device = torch.cuda.get_device_properties(0)
        found |= {"device": device.name, "capability": [device.major, device.minor], "bytes": device.total_memory}
    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        return found
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    key = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    return {**found, "triton_key_sha256": key, "kernels_in_cache": len(list(cache.rglob("*.cubin")))}


def gradients(name: str) -> Found:
    """Differences of reads, end state and all gradients, each relative to its norm; right if none is large."""
    case = scan_case(name, setting="fused", dtype="bfloat16")
    torch.manual_seed(0)
    subject = build(case)
    leaves = [x.detach() for x in (*subject.inputs(case.length), *subject.parameters)]
    if "-plain" not in name:  # LayerNorm's scale and shift
        leaves += [about + 0.1 * torch.randn_like(leaves[0][0, 0]) for about in (1.0, 0.0)]
    ours = scanned(name, case, leaves, "fused")
    theirs = scanned(name, case, [x.float() for x in leaves], "chunked")
    errors = {name: _difference(ours[name], theirs[name]) for name in ours}
    largest = max(errors.values())
    return {"right": largest <= BFLOAT16_ERROR, "largest": largest, "errors": errors}


def timings(name: str) -> Found:
    """Milliseconds, medians over repeats, and of each kernel in one forward and backward pass."""
    case = scan_case(name, setting="auto", dtype="bfloat16" if DEVICE == "cuda" else "float32")
    torch.manual_seed(0)
    subject = build(case)
    inputs = subject.inputs(case.length)
    gradient = torch.randn_like(inputs[0])
    found: Found = {"tokens": case.tokens}
    for direction in (FORWARD, BOTH):
        once = partial(run, replace(case, direction=direction), subject, inputs, gradient)
        milliseconds = timed(once)
        found[f"{direction} ms"] = milliseconds
        found[f"{direction} tokens/s"] = 1000 * case.tokens / milliseconds
    return {**found, "kernels": _kernels(once)}


def training(names: Sequence[str]) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Steps as pretraining takes them: bfloat16 weights, float32 masters in DeepSpeed's ZeRO 1, fused AdamW."""
    from pretrain.engine import build_engine, build_model
    from pretrain.report.throughput import MfuMeter
    from titans_mcore.parallel import start

    groups = start(1, 1, seed=0)
    built: dict[str, tuple[DeepSpeedEngine, MfuMeter]] = {}

    def measured(name: str) -> Found:
        preset, rows = name.rsplit("-B", 1)
        if preset not in built:
            for engine, _ in built.values():
                engine.destroy()
            built.clear()
            _free()
            config = run_config(preset)
            built[preset] = build_engine(build_model(config, groups), config, 1), MfuMeter.here(config, 1)
        return _steps(*built[preset], run_config(preset), int(rows))

    for name in names:
        yield name, partial(measured, name)


def _steps(engine: "DeepSpeedEngine", meter: "MfuMeter", config: "RunConfig", rows: int) -> Found:
    """Steps of so many rows; the meter and the configuration are of one."""
    from pretrain.data.batches import MicroBatch
    from pretrain.engine import train_step

    length = config.train.sequence_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, (rows, length + 1), generator=generator)
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)
    _free()
    losses, seconds = [], []
    for _ in range(_WARM_UP + _REPEATS):
        began = time.perf_counter()
        losses.append(train_step(engine, [batch], lr=1e-4).loss)  # asks the device, and so waits for it
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[_WARM_UP:])
    share = meter.mfu(1, median)
    return {
        "tokens_per_second": rows * length / median,
        "step_seconds": median,
        "first_step_seconds": seconds[0],
        "mfu": None if share is None else rows * share,
        "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
        "losses": losses,
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
    }


def reading(names: Sequence[str]) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Random tokens, read by a model with random weights: time and memory do not depend on which they are."""
    from evals.efficiency.context import read_row
    from evals.models import EvalModel, Tokenizer
    from pretrain.engine import build_model
    from titans_mcore.parallel import device, start

    groups = start(1, 1, seed=0)

    def measured(name: str) -> Found:
        preset, blocks, length = re.fullmatch(r"(.+)-L(\d+)-T(\d+)", name).groups()  # type: ignore[union-attr]
        config = run_config(preset, "--model.num-layers", blocks)
        network: Any = build_model(config, groups).eval()
        model = EvalModel(network, config.model, Tokenizer(None, ""), "random weights", "", device=device())
        settings = ContextSettings((Path(),), Path(), piece=_PIECE, decode_tokens=_DECODED)
        _free()
        return read_row(model, name, int(length), settings)

    for name in names:
        yield name, partial(measured, name)


def _each(measured: Callable[[str], Found]) -> Callable[[Sequence[str]], Iterator[tuple[str, Callable[[], Found]]]]:
    return lambda names: ((name, partial(measured, name)) for name in names)


def steps(name: str) -> Found:
    """Of every step the speed and the loss, as the run's own records have them."""
    rows = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "tokens_per_second" in row]
    speeds = [row["tokens_per_second"] for row in rows[_WARM_UP:]]
    return {
        "steps": [row["step"] for row in rows],
        "tokens_per_second": statistics.median(speeds),
        "losses": [row["loss"] for row in rows],
        "peak_bytes": max(row["memory_bytes"] for row in rows),
    }


KINDS: dict[str, Callable[[Sequence[str]], Iterator[tuple[str, Callable[[], Found]]]]] = {
    "facts": _each(facts),
    "gradients": _each(gradients),
    "timings": _each(timings),
    "steps": _each(steps),
    "training": training,
    "reading": reading,
}


def main() -> None:
    """Runs the process; see the top of this file."""
    # What libraries print must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    kind, *names = sys.argv[1:]
    for name, measured in KINDS[kind]([name for name in names if name != "--tiny"]):
        try:
            found = {"status": "measured", **measured()}
        except torch.OutOfMemoryError as error:
            found = {"status": "out of memory", "reason": str(error).splitlines()[0]}
            _free()
        answers.write(json.dumps({"name": f"{kind} {name}", **found, **circumstances()}) + "\n")


def circumstances() -> Found:
    """Stands beside every result."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    chosen = {name: os.environ[name] for name in ("DISABLE_MMA_V3", "TRITON_INTERPRET") if name in os.environ}
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "versions": versions,
        "variables": chosen,
    }


def timed(once: Callable[[], Any]) -> float:
    """Median milliseconds of a repeat after warm-up, by CUDA's own events on a GPU."""
    for _ in range(_WARM_UP):
        once()
    milliseconds = []
    for _ in range(_REPEATS):
        if DEVICE == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            once()
            end.record()
            end.synchronize()
            milliseconds.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            once()
            milliseconds.append(1000 * (time.perf_counter() - began))
    return statistics.median(milliseconds)


def _kernels(once: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one call on the device by the name of the kernel, the ten longest and all others together."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if DEVICE == "cuda" else activity.CPU]) as profile:
        once()
        synchronize(torch.device(DEVICE))
    on_gpu = DEVICE == "cuda"
    spent = {
        event.key[:80]: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
        for event in profile.key_averages()
    }
    longest = sorted(spent, key=spent.__getitem__, reverse=True)[:10]
    return {name: spent[name] for name in longest} | {"others": sum(spent.values()) - sum(spent[n] for n in longest)}


def scan_case(name: str, *, setting: str, dtype: str) -> Case:
    """What a name such as B1-T4096-H24-D64-L2-F256-b16 stands for."""
    numbers = [int(number) for number in re.findall(r"-?[A-Za-z](\d+)", name)]
    batch, length, heads, width, depth, hidden, chunk = numbers
    return Case(
        implementation=OURS, part="scan", setting=setting, direction=BOTH, batch=batch, length=length,
        heads=heads, width=width, depth=depth, expansion=hidden // width, chunk=chunk, gates=1, dtype=dtype,
        device=DEVICE,
    )  # fmt: skip


def scanned(name: str, case: Case, leaves: list[Tensor], backend: str) -> dict[str, Tensor]:
    """Reads, end state, and gradients of a random functional of them at all leaves: tokens, gates, M_0, LayerNorm."""
    from titans_mcore.memory import memory_scan

    leaves = [x.clone().requires_grad_() for x in leaves]
    queries, keys, values, theta, eta, alpha, *parameters = leaves
    weights, (scale, shift) = parameters[: case.depth], parameters[case.depth :] or (None, None)
    read, state = memory_scan(
        *(queries, keys, values, theta, eta, alpha, weights),
        network="residual_norm" if scale is not None else "plain",
        norm_weight=scale,
        norm_bias=shift,
        forgets="-keeping" not in name,
        chunk_size=case.chunk,
        backend=backend,
    )
    outputs = {"reads": read}
    for place in range(case.depth):
        outputs |= {f"weights {place}": state.weights[place], f"momentum {place}": state.momentum[place]}
    torch.manual_seed(1)
    functional = sum((x.float() * torch.randn(x.shape, device=x.device)).sum() for x in outputs.values())
    assert isinstance(functional, Tensor)
    at = ["queries", "keys", "values", "theta", "eta", "alpha", *(f"M_0 {place}" for place in range(case.depth))]
    found = zip((*at, "scale", "shift"), torch.autograd.grad(functional, leaves), strict=False)  # plain has no scale
    return outputs | {f"gradient at {name}": x for name, x in found}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the norm of theirs; what is no number is as far off as can be, and JSON can say it."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    found = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
    return found if found < _FAR_OFF else _FAR_OFF


def run_config(preset: str, *more: str) -> "RunConfig":
    """The preset's, with steps of one row."""
    from pretrain.config.command_line import parse

    size = ("--train.global-batch", "1", "--train.micro-batch", "1")
    tiny = _TINY if "--tiny" in sys.argv else ()
    vocabulary = ("--model.vocab-size", "512" if tiny else str(_VOCABULARY))
    return parse(["--config", preset, "--run-dir", "-", *size, *vocabulary, *tiny, *more]).config


def _free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
