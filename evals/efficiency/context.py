"""What a longer past costs: reading, decoding and memory of trained models at lengths up to millions of tokens."""

import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from evals.efficiency import ContextSettings
from evals.measure import PeakMemory, circumstances, return_large_blocks, state_bytes
from evals.models import EvalModel, load_model
from evals.report import bytes_text, table, write_json
from tokenization.progress import Progress

_WARM_UP = 10
"""Decoding steps that are not counted; a GPU captures them as a graph meanwhile."""
MEMORY_FROM = 65_536
"""Peak memory is compared with that of a length from here on: below, what is read at once is not yet whole."""


class _DoesNotFit(Exception):
    """Why a length was given up."""


def measure(settings: ContextSettings) -> str:
    """Measures every model at every length, short ones first, and writes the rows as they come.

    Returns:
        A table of all rows and the comparison of the longest with the shortest.

    Raises:
        EvaluationError: A model cannot be loaded.
    """
    torch.set_num_threads(settings.threads)
    return_large_blocks()
    report: dict[str, Any] = {"rows": [], "compared": {}}
    for path in settings.checkpoint:
        model, name = load_model(path), str(path)
        report = {**circumstances(settings, model.device.type), **report}
        read_row(model, name, min(settings.lengths), settings)  # warms up
        rows: list[dict[str, Any]] = []
        for length in sorted(settings.lengths):
            rows.append(read_row(model, name, length, settings))
            report["rows"].append(rows[-1])
            report["compared"][name] = compare(rows)
            write_json(settings.json, report)
    return shown(report)


@torch.inference_mode()
def read_row(model: EvalModel, name: str, length: int, settings: ContextSettings) -> dict[str, Any]:
    """What reading so many tokens and decoding behind them costs; or why it was given up."""
    gc.collect()
    peak, began = PeakMemory(model.device), time.perf_counter()
    row: dict[str, Any] = {"model": name, "length": length}
    states: Any = None
    logits = torch.empty(0)
    try:
        with Progress(f"of {length:,} tokens read by {name}", length) as progress:
            for tokens in _pieces(model, length, settings.piece):
                logits, states = model.stream(tokens, states, last=1)
                logits = logits.cpu()  # waits for it
                progress.advance(tokens.numel(), tokens.numel())
                if (size := state_bytes(states)) > settings.limit_gigabytes * 1e9:
                    raise _DoesNotFit(f"its state takes more than {bytes_text(size)}")
        seconds = time.perf_counter() - began
        decoding = []
        for _ in range(_WARM_UP + settings.decode_tokens):
            started = time.perf_counter()
            logits, states = model.decoder(logits[:, -1].argmax(-1)[:, None].to(model.device), states)
            logits = logits.cpu()
            decoding.append(time.perf_counter() - started)
    except _DoesNotFit as reason:
        return {**row, "not_run": str(reason)}
    return {
        **row,
        "prefill_tokens_per_second": length / seconds,
        "decode_ms": 1_000 * statistics.median(decoding[_WARM_UP:]),
        "peak_bytes": peak.bytes(),
        "state_bytes": state_bytes(states),
        "finite": bool(logits.isfinite().all()),
    }


def _pieces(model: EvalModel, length: int, piece: int) -> Iterator[torch.Tensor]:
    """Random tokens (1, T), made when they are read: time and memory do not depend on which they are."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, length, piece):
        yield torch.randint(model.config.vocab_size, (1, min(piece, length - start)), generator=generator)


def compare(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The longest length over the shortest: decoding, tokens/s of reading, and memory over that at 64K tokens."""
    run = [row for row in rows if "not_run" not in row]
    if len(run) < 2:
        return {}
    first, last = run[0], run[-1]
    found = {
        "from": first["length"],
        "to": last["length"],
        "decode_ms": last["decode_ms"] / first["decode_ms"],
        "prefill_tokens_per_second": last["prefill_tokens_per_second"] / first["prefill_tokens_per_second"],
    }
    long = [row for row in run if row["length"] >= MEMORY_FROM]
    if len(long) > 1:
        found["peak_bytes_from_64k"] = last["peak_bytes"] / long[0]["peak_bytes"]
    return found


def shown(report: dict[str, Any]) -> str:
    """The rows as a table, and a line for each model that compares its ends."""
    cells = []
    for row in report["rows"]:
        if "not_run" in row:
            numbers = [f"not run: {row['not_run']}", "", "", ""]
        else:
            numbers = [f"{row['prefill_tokens_per_second']:,.0f}", f"{row['decode_ms']:.2f}"]
            numbers += [bytes_text(row["peak_bytes"]), bytes_text(row["state_bytes"])]
        cells.append([row["model"], f"{row['length']:,}", *numbers])
    lines = [table(["model", "tokens", "prefill tokens/s", "ms a decoded token", "peak memory", "state"], cells)]
    for name, ends in report["compared"].items():
        if ends:
            memory = ends.get("peak_bytes_from_64k")
            lines.append(
                f"{name}: {ends['to']:,} tokens over {ends['from']:,}: decoding {ends['decode_ms']:.2f}x, "
                f"reading {ends['prefill_tokens_per_second']:.2f}x the tokens/s"
                + (f"; memory over 64K tokens {memory:.2f}x" if memory else "")
            )
    return "\n".join(lines)
