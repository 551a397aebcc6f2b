"""Says what a run will need before there is a GPU: `python -m pretrain.plan --config NAME --gpus N`.

It takes the command line of a run (`--run-dir` may stay away) and four flags of its own. A layout that a run would
refuse is refused in the run's words, with exit code 2. Nothing is allocated and nothing is started.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pretrain.config.command_line import parse
from pretrain.config.run_config import RunConfig
from pretrain.launch.status import EXIT_MISTAKE
from pretrain.schedule import tokens_after

if TYPE_CHECKING:
    from pretrain.plan.step_time import StepTime

_USAGE = (
    "python -m pretrain.plan --config NAME --gpus N [--utilisation 0.4] [--gpu h100] [--json] [--SETTING VALUE ...]"
)


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        config: The settings of the run.
        gpus: Processes, one a GPU.
        gpu: Key of hardware.GPUS.
        utilisation: Share of the peak that the run is taken to reach, above 0 and at most 1.
        json: Print JSON.
        assumed_vocabulary: Whether the vocabulary stands for that of data which is not there yet.
    """

    config: RunConfig
    gpus: int
    gpu: str
    utilisation: float
    json: bool
    assumed_vocabulary: bool


def request_of(arguments: Sequence[str]) -> Request:
    """Reads a command line and the files that it names.

    Raises:
        ValueError: Something is unknown, missing or illegal; the message says what and what to do.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.plan", usage=_USAGE, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    for flag in ("--gpus", "--gpu", "--utilisation"):
        parser.add_argument(flag)
    parser.add_argument("--json", action="store_true")
    try:
        own, words = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name} needs a value") from None
    if own.gpus is None:
        raise ValueError(f"--gpus is missing; usage: {_USAGE}")
    if not own.gpus.isdecimal() or int(own.gpus) < 1:
        raise ValueError(f"--gpus is {own.gpus!r}; it must be a number of GPUs, 1 or more")
    run = parse(words, planning=True)
    utilisation = _utilisation(own.utilisation)
    return Request(run.config, int(own.gpus), own.gpu or "h100", utilisation, own.json, run.assumed_vocabulary)


def plan_of(request: Request) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in the unit that their name says.

    Raises:
        ValueError: A run with these settings would not start.
    """
    # The model's and the engine's packages take seconds to import, which --help and a mistyped flag need not wait for.
    from pretrain.plan.bytes import checkpoint_bytes, rank_bytes
    from pretrain.plan.layout import for_gpus, layout_of
    from pretrain.plan.parameters import count_by_part, parameters_of
    from pretrain.plan.step_time import messages_of, step_flops, step_time

    config = for_gpus(request.config)
    layout = layout_of(config, request.gpus)
    parameters = parameters_of(config.model, layout.tensor, layout.memory_parallel)
    rank = rank_bytes(config, layout, parameters)
    flops = step_flops(config, parameters)
    time = step_time(config, layout, parameters, _known_gpu(request.gpu), request.utilisation)
    checkpoint = checkpoint_bytes(layout, parameters)
    every = config.checkpoint.every_steps
    kept = min(config.checkpoint.keep, -(-config.train.steps // every) if every else 1)
    return {
        "model": asdict(config.model),
        "layout": asdict(layout),
        "parameters": count_by_part(parameters),
        "rank": rank,
        "messages": messages_of(config, layout),
        "step": {
            "tokens": config.train.tokens_per_step,
            "flops": flops,
            "recomputed_flops": time.recomputed_flops,
        },
        "time": _time(request, time),
        "checkpoint": {
            "bytes": checkpoint.pop("total"),
            "parts": checkpoint,
            "keep": kept,
            "kept_bytes": kept * sum(checkpoint.values()),
        },
        "notes": _notes(request, rank["bytes"]),
    }


def _time(request: Request, time: "StepTime") -> dict[str, Any]:
    gpu, train, seconds = _known_gpu(request.gpu), request.config.train, time.seconds
    tokens = tokens_after(train.steps, train)
    hours = tokens / train.tokens_per_step * seconds / 3600  # steps of a smaller batch take less
    return {
        "gpu": request.gpu,
        "peak_flops_per_second": gpu.flops,
        "peak_source": gpu.source,
        "utilisation": request.utilisation,
        "wavefront_efficiency": time.wavefront_efficiency,
        "step_seconds": seconds,
        "tokens_per_second": train.tokens_per_step / seconds,
        "steps": train.steps,
        "tokens": tokens,
        "hours": hours,
        "gpu_hours": hours * request.gpus,
    }


def _notes(request: Request, bytes_on_rank: int) -> list[str]:
    gpu, notes = _known_gpu(request.gpu), []
    if bytes_on_rank > gpu.memory_bytes:
        notes.append(
            f"{bytes_on_rank / 1e9:.1f} GB do not fit into the {gpu.memory_bytes / 1e9:.0f} GB of one {request.gpu}; "
            "a smaller train.micro_batch, a larger parallel.tensor or parallel.context, a higher parallel.zero_stage "
            "or train.recompute needs less"
        )
    if request.assumed_vocabulary:
        pieces = request.config.model.vocab_size
        notes.append(f"a vocabulary of {pieces:,} pieces is assumed; --data.path DIR takes the data's")
    context, layers = request.config.parallel.context, request.config.model.num_layers
    if context > layers and not all(mixer.composes for mixer in request.config.model.mixers):
        notes.append(
            f"parallel.context {context} is more than {layers} layers: the wavefront gives at most {layers} times the "
            "speed of one rank, further ranks little but memory"
        )
    if request.config.train.precision == "fp32":
        notes.append("the peak is that of bf16, and the run is in fp32: it will not come near")
    notes.append("activations are an estimate, and the time is what the utilisation makes of it: neither is measured")
    return notes


def _utilisation(text: str | None) -> float:
    try:
        value = 0.4 if text is None else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"--utilisation is {text!r}; it must be above 0 and at most 1")
    return value


def _known_gpu(name: str) -> Any:
    from pretrain.plan.step_time import GPUS

    if name not in GPUS:
        raise ValueError(f"--gpu is {name!r}; it must be one of {', '.join(GPUS)}")
    return GPUS[name]


def main() -> None:
    """Runs the command line."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(f"usage: {_USAGE}\n\n{__doc__}\n`python -m pretrain.train --help` lists the settings.")
        return
    try:
        request = request_of(sys.argv[1:])
        _known_gpu(request.gpu)
        plan = plan_of(request)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_MISTAKE) from None
    if request.json:
        print(json.dumps(plan, indent=2))
        return
    from rich.console import Console

    from pretrain.plan.report import print_report

    print_report(plan, Console())


if __name__ == "__main__":
    main()
