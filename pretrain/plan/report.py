"""A plan as a table to read."""

from typing import Any

from rich.console import Console
from rich.table import Table

_GIB = 2**30


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
    for table in (_parameters(plan), _bytes(plan), _collectives(plan), _step(plan), _run(plan)):
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


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("numbers", "share", "GiB", "calls", "value") else "left")
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def _parameters(plan: dict[str, Any]) -> Table:
    table = _table("\nParameters", "part", "numbers", "share")
    counts = plan["parameters"]
    for part, count in counts.items():
        if part != "total":
            table.add_row(_words(part), f"{count:,}", f"{count / counts['total']:.1%}")
    table.add_row("total", f"{counts['total']:,}", "")
    return table


def _bytes(plan: dict[str, Any]) -> Table:
    rank, ranks = plan["rank"], plan["layout"]["gpus"]
    table = _table(f"\nMemory of each of {ranks} rank{'s' if ranks > 1 else ''}", "part", "GiB")
    for part, size in rank["parts"].items():
        table.add_row(_words(part), f"{size / _GIB:.3f}")
    table.add_row("total", f"{rank['bytes'] / _GIB:.3f}")
    for part, size in rank["host_parts"].items():
        if size:
            table.add_row(f"{_words(part)}, on the host", f"{size / _GIB:.3f}")
    return table


def _collectives(plan: dict[str, Any]) -> Table:
    table = _table("\nCollectives of each rank in a step", "group", "operation", "of", "calls", "GiB")
    for row in plan["collectives"]:
        cells = (row["group"], _words(row["operation"]), row["purpose"], f"{row['calls']:,}")
        table.add_row(*cells, f"{row['bytes'] / _GIB:.3f}")
    if not plan["collectives"]:
        table.add_row("none", "", "", "", "")
    return table


def _step(plan: dict[str, Any]) -> Table:
    step = plan["step"]
    table = _table("\nA step of all ranks", "what", "value")
    table.add_row("tokens", f"{step['tokens']:,}")
    table.add_row("micro-batches of a rank", f"{plan['layout']['micro_batches']:,}")
    for kind, flops in step["flops"].items():
        table.add_row(f"TFLOP {kind}", f"{flops / 1e12:,.2f}")
    if step["recomputed_flops"]:
        table.add_row("TFLOP recomputed, beside", f"{step['recomputed_flops'] / 1e12:,.2f}")
    table.add_row("FLOP a token", f"{step['flops']['total'] / step['tokens']:,.0f}")
    return table


def _run(plan: dict[str, Any]) -> Table:
    time, checkpoint = plan["time"], plan["checkpoint"]
    table = _table(f"\nThe run, {time['gpu']} at utilisation {time['utilisation']:g}", "what", "value")
    if plan["layout"]["context"] > 1:
        table.add_row("wavefront efficiency", f"{time['wavefront_efficiency']:.3f}")
    table.add_row("seconds a step", f"{time['step_seconds']:,.3f}")
    table.add_row("tokens a second", f"{time['tokens_per_second']:,.0f}")
    table.add_row("steps", f"{time['steps']:,}")
    table.add_row("tokens", f"{time['tokens']:,}")
    table.add_row("hours", f"{time['hours']:,.2f}")
    table.add_row("GPU hours", f"{time['gpu_hours']:,.2f}")
    table.add_row("GiB a checkpoint", f"{checkpoint['bytes'] / _GIB:.3f}")
    table.add_row(f"GiB of the {checkpoint['keep']} that are kept", f"{checkpoint['kept_bytes'] / _GIB:.3f}")
    return table
