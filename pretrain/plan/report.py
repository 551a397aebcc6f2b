"""A plan as a table to read."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_GIB = 2**30
_WORDS = ("part", "what")  # columns of words; others are of numbers


def print_report(plan: dict[str, Any], console: Console) -> None:
    """Prints a plan, as `plan.plan_of` makes it."""
    layout = plan["layout"]
    console.print(
        f"{plan['model']['variant']}, {plan['parameters']['total']:,} parameters | "
        f"tensor {layout['tensor']} x context {layout['context']} x data {layout['data']}{_layout_words(layout)}, "
        f"ZeRO {layout['zero_stage']}, {layout['precision']} | "
        f"{plan['step']['tokens']:,} tokens a step",
        highlight=False,
        soft_wrap=True,
    )
    for title, columns, rows in _tables(plan):
        table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="left" if column in _WORDS else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in plan["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _layout_words(layout: dict[str, Any]) -> str:
    """What is not the default."""
    words = {
        "sequence parallel": layout["sequence"],
        "memory by hidden": layout["memory_parallel"] == "hidden",
        "optimizer on the host": layout["offload_optimizer"],
        f"recompute {_words(layout['recompute'])}": layout["recompute"] != "none",
    }
    return "".join(f", {word}" for word, here in words.items() if here)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _gib(size: float) -> str:
    return f"{size / _GIB:.3f}"


def _tables(plan: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]]]:
    """Title, columns and rows of each."""
    layout, counts, rank, step = plan["layout"], dict(plan["parameters"]), plan["rank"], plan["step"]
    total = counts.pop("total")
    parts = [(_words(part), f"{count:,}", f"{count / total:.1%}") for part, count in counts.items()]
    yield "Parameters", ("part", "numbers", "share"), [*parts, ("total", f"{total:,}", "")]
    held = [(_words(part), _gib(size)) for part, size in rank["parts"].items()]
    host = [(f"{_words(part)}, on the host", _gib(size)) for part, size in rank["host_parts"].items() if size]
    title = f"Memory of each of {layout['gpus']} rank{'s' if layout['gpus'] > 1 else ''}"
    yield title, ("part", "GiB"), [*held, ("total", _gib(rank["bytes"])), *host]
    flops = [(f"TFLOP {kind}", f"{flops / 1e12:,.2f}") for kind, flops in step["flops"].items()]
    if step["recomputed_flops"]:
        flops.append(("TFLOP recomputed, beside", f"{step['recomputed_flops'] / 1e12:,.2f}"))
    first = [("tokens", f"{step['tokens']:,}"), ("micro-batches of a rank", f"{layout['micro_batches']:,}")]
    last = [("FLOP a token", f"{step['flops']['total'] / step['tokens']:,.0f}")]
    if (sent := plan["messages"])["states"]:
        last.append(("messages from a rank to the next", f"{sent['states'] + sent['headers']:,}"))
        last.append(("GiB of them, and as much of gradients back", _gib(sent["bytes"])))
    yield "A step of all ranks", ("what", "value"), [*first, *flops, *last]
    time, checkpoint = plan["time"], plan["checkpoint"]
    wavefront = [("wavefront efficiency", f"{time['wavefront_efficiency']:.3f}")] if layout["context"] > 1 else []
    run = [
        *wavefront,
        ("seconds a step", f"{time['step_seconds']:,.3f}"),
        ("tokens a second", f"{time['tokens_per_second']:,.0f}"),
        ("steps", f"{time['steps']:,}"),
        ("tokens", f"{time['tokens']:,}"),
        ("hours", f"{time['hours']:,.2f}"),
        ("GPU hours", f"{time['gpu_hours']:,.2f}"),
        ("GiB a checkpoint", _gib(checkpoint["bytes"])),
        (f"GiB of the {checkpoint['keep']} that are kept", _gib(checkpoint["kept_bytes"])),
    ]
    yield f"The run, {time['gpu']} at utilisation {time['utilisation']:g}", ("what", "value"), run
