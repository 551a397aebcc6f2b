"""What context parallelism gives: layers timed here, the wavefront over many ranks simulated, memory from the plan."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from evals.command_line import EvaluationError
from evals.efficiency.circumstances import circumstances
from evals.efficiency.settings import WavefrontSettings
from evals.report import table, write_bytes, write_figure, write_json
from pretrain.command_line import parse
from pretrain.config import RunConfig
from pretrain.planning.hardware import GPUS
from pretrain.planning.layout import for_gpus, layout_of
from pretrain.planning.parameters import Parameter, parameters_of
from pretrain.planning.rank_bytes import ranks_of
from pretrain.planning.step_time import step_time
from pretrain.planning.wavefront import Work, equal_efficiency, simulate
from titans_mcore.config import TitansConfig
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALLER = 8  # the timed model's width, heads, window and vocabulary are this part of the planned one's
_RECOMPUTE: tuple[Literal["none", "except_memory", "block"], ...] = ("none", "except_memory", "block")
_GPU, _UTILISATION = "h100", 0.4
Row = dict[str, Any]


def measure(settings: WavefrontSettings) -> str:
    """Measures and writes wavefront.json, wavefront.md and wavefront.png.

    Returns:
        What wavefront.md holds.

    Raises:
        EvaluationError: The configuration cannot be read, or rows of so many tokens cannot be divided.
    """
    torch.set_num_threads(settings.threads)
    try:
        configs = {ranks: _config(settings, ranks) for ranks in sorted(set(settings.ranks))}
        parameters = parameters_of(next(iter(configs.values())).model)
        planned = {ranks: _planned(config, ranks, parameters) for ranks, config in configs.items()}
    except ValueError as fault:
        raise EvaluationError(str(fault)) from fault
    model = next(iter(configs.values())).model
    seconds = token_seconds(model, settings.piece, settings.repeats)
    rows = [{**_simulated(model, seconds, settings.tokens, ranks), **planned[ranks]} for ranks in configs]
    report = {
        **circumstances(settings, "cpu"),
        "model": model.to_dict(),
        "timed_model": _small(model).to_dict(),
        "seconds_a_token": seconds,
        "rows": rows,
    }
    text = _markdown(settings, model, seconds, rows)
    write_json(settings.output / "wavefront.json", report)
    write_bytes(settings.output / "wavefront.md", text.encode())
    write_figure(settings.output / "wavefront.png", _figure(model, settings.tokens, rows))
    return text


def token_seconds(model: TitansConfig, piece: int, repeats: int) -> dict[str, float]:
    """Median seconds of a layer forward and backward and of the head, both ways, over the tokens of one piece.

    The layer goes on from the state of an earlier piece, as it does on every rank but the first. It belongs to a small
    model of the same proportions: what the wavefront loses depends on nothing but the times' ratios.
    """
    small = _small(model)
    groups = start(1, seed=0)
    try:
        built = TitansModel(small, transformer_config(small), groups)
        parts = _timed_parts(built, small, piece)
        found: dict[str, list[float]] = {}
        for _ in range(repeats + 1):  # the first one warms up
            for name, seconds in parts():
                found.setdefault(name, []).append(seconds / piece)
    finally:
        stop()
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def _timed_parts(model: TitansModel, small: TitansConfig, piece: int) -> Callable[[], Iterator[tuple[str, float]]]:
    # Here and not above: titans_mcore.parallel, which comes first, keeps it from saying what it does without.
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    layer, generator = model.layers[0], torch.Generator().manual_seed(0)
    first, hidden = (torch.randn(piece, 1, small.dim, generator=generator) for _ in range(2))
    labels = torch.randint(0, small.vocab_size, (1, piece), generator=generator)
    with torch.no_grad():
        _, before = layer(first)

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_(x.is_floating_point())

    def parts() -> Iterator[tuple[str, float]]:
        state, inputs = before.map(leaf), leaf(hidden)
        began = time.perf_counter()
        output, after = layer(inputs, state)
        turned = time.perf_counter()
        ends = [output, *(x for x in after.state_dict().values() if x.requires_grad)]
        gradients = [torch.ones_like(x) for x in ends]
        set_out = time.perf_counter()
        torch.autograd.backward(ends, gradients)
        yield "forward", turned - began
        yield "backward", time.perf_counter() - set_out
        inputs, began = leaf(hidden), time.perf_counter()
        weight = model.embedding.weight if small.tie_embeddings else None
        logits, _ = model.output_layer(model.final_norm(inputs), weight=weight)
        vocab_parallel_cross_entropy(logits, labels.transpose(0, 1)).mean().backward()
        yield "head", time.perf_counter() - began

    return parts


def _small(model: TitansConfig) -> TitansConfig:
    heads = max(1, model.num_heads // _SMALLER)
    dim, width = heads * model.head_dim, model.memory_shape.width
    return replace(
        model,
        num_layers=1,
        num_heads=heads,
        dim=dim,
        memory_heads=0,
        memory_head_dim=0 if dim % width else width,
        ffn_dim=max(1, model.ffn_dim // _SMALLER),
        vocab_size=max(1, model.vocab_size // _SMALLER),
        window=model.window // _SMALLER,
        persistent_tokens=model.persistent_tokens // _SMALLER,
    )


def _config(settings: WavefrontSettings, ranks: int) -> RunConfig:
    """The run with one row shared by all ranks."""
    own = {
        "run-dir": "unused",
        "train.sequence-length": settings.tokens,
        "train.global-batch": 1,
        "train.micro-batch": 1,
        "parallel.context": ranks,
        "model.vocab-size": TitansConfig.vocab_size,
    }
    flags = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    return for_gpus(parse(["--config", settings.config, *flags]).config)


def _planned(config: RunConfig, ranks: int, parameters: list[Parameter]) -> Row:
    """Bytes of a rank with each way to recompute, and the efficiency with messages on GPUs."""
    found = {}
    for recompute in _RECOMPUTE:
        chosen = replace(config, train=replace(config.train, recompute=recompute))
        found[recompute] = ranks_of(chosen, layout_of(chosen, ranks), parameters)[0]
    on_gpus = step_time(config, layout_of(config, ranks), parameters, GPUS[_GPU], _UTILISATION)
    return {
        "bytes": {recompute: rank.bytes for recompute, rank in found.items()},
        "parts": {recompute: rank.parts for recompute, rank in found.items()},
        "planned_efficiency": on_gpus.wavefront_efficiency,
    }


def _simulated(model: TitansConfig, seconds: dict[str, float], tokens: int, ranks: int) -> Row:
    def work(tokens: int) -> Work:
        forward, backward, head = (tokens * seconds[name] for name in ("forward", "backward", "head"))
        return Work([forward] * model.num_layers, [backward] * model.num_layers, head=head)

    found = simulate([[work(tokens // ranks)] * ranks])
    return {
        "ranks": ranks,
        "tokens_a_rank": tokens // ranks,
        "equal_efficiency": equal_efficiency(model.num_layers, ranks),
        "efficiency": found.efficiency,
        "relative_time": found.seconds / work(tokens).seconds,
    }


_HEADER = (
    "ranks",
    "tokens a rank",
    "L / (L + C - 1)",
    "efficiency",
    "with messages",
    "speed over one rank",
    *(f"GB, {recompute.replace('_', ' ')}" for recompute in _RECOMPUTE),
)


def _markdown(settings: WavefrontSettings, model: TitansConfig, seconds: dict[str, float], rows: list[Row]) -> str:
    lines = [
        [
            f"{row['ranks']:,}",
            f"{row['tokens_a_rank']:,}",
            f"{row['equal_efficiency']:.3f}",
            f"{row['efficiency']:.3f}",
            f"{row['planned_efficiency']:.3f}",
            f"{1 / row['relative_time']:.1f}x",
            *(f"{row['bytes'][recompute] / 1e9:,.1f}" for recompute in _RECOMPUTE),
        ]
        for row in rows
    ]
    forward, backward, head = (1e6 * seconds[name] for name in ("forward", "backward", "head"))
    small, network = _small(model), GPUS[_GPU].network_bytes / 1e9
    timed = (
        f"({small.memory_shape.heads} memory heads of {small.memory_shape.width}, width {small.dim}) on "
        f"{settings.threads} CPU threads, over {settings.piece} tokens\n"
        f"  ({forward:.0f} us a token forward, {backward:.0f} us backward, {head:.0f} us for the head both ways)"
    )
    return f"""# Context parallelism as a wavefront

One row of {settings.tokens:,} tokens of {settings.config}, {model.num_layers} layers, over C ranks that share it.

```text
{table(_HEADER, lines)}
```

- efficiency: the work of all ranks over C times the time of the step. Its times are those of one layer of a small model
  {timed}
  and scaled with the tokens. It depends on their ratios alone; messages take no time.
- with messages: times from operations on {_GPU} at utilisation {_UTILISATION}, states sent at {network:.0f} GB/s: an
  estimate, nothing of it is measured.
- speed over one rank, at the efficiency measured: it stays below L = {model.num_layers} whatever the number of ranks.
- GB: of a rank in bf16 with ZeRO 1 over the C ranks, by train.recompute, from `pretrain.plan`; its activations are an
  estimate.
"""


def _figure(model: TitansConfig, tokens: int, rows: list[Row]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6))
    share, speed, memory = figure.subplots(1, 3)
    ranks = [row["ranks"] for row in rows]
    share.plot(ranks, [row["equal_efficiency"] for row in rows], "--", color="grey", label="L / (L + C - 1)")
    share.plot(ranks, [row["efficiency"] for row in rows], marker="o", label="times measured on a CPU")
    share.plot(ranks, [row["planned_efficiency"] for row in rows], marker="s", label=f"planned, {_GPU}, with messages")
    share.set(ylabel="efficiency", ylim=(0, 1), title=f"{model.num_layers} layers, {tokens:,} tokens")
    share.legend(fontsize=8)
    speed.plot(ranks, [1 / row["relative_time"] for row in rows], marker="o")
    speed.axhline(model.num_layers, color="black", linestyle="--", label=f"L = {model.num_layers}")
    speed.set(ylabel="speed over one rank", ylim=(0, 1.15 * model.num_layers), title="times measured on a CPU")
    speed.legend(fontsize=8)
    for recompute in _RECOMPUTE:
        sizes = [row["bytes"][recompute] / 1e9 for row in rows]
        memory.plot(ranks, sizes, marker="o", label=f"recompute {recompute.replace('_', ' ')}")
    memory.axhline(GPUS[_GPU].memory_bytes / 1e9, color="black", linestyle="--", label=f"one {_GPU}")
    memory.set(ylabel="GB a rank (plan)", title="bf16, ZeRO 1")
    memory.set_yscale("log")
    memory.legend(fontsize=8)
    for axes in (share, speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.set_xlabel("ranks that share a row")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure
