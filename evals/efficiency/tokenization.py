"""The measurement of the tokenisation: encode beside sentencepiece alone."""

import tempfile
from dataclasses import asdict
from pathlib import Path

from evals.command_line import EvaluationError
from evals.efficiency.circumstances import circumstances
from evals.efficiency.settings import TokenizationSettings
from evals.report import bytes_text, table, write_json
from tokenization.errors import TokenizationError
from tokenization.throughput import measure_throughput

TARGET = 0.8  # of sentencepiece's tokens a second


def measure(settings: TokenizationSettings) -> str:
    """Measures and writes tokenization.json.

    Returns:
        The table.

    Raises:
        EvaluationError: Text or tokenizer cannot be read.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.output) as scratch:
        try:
            found = measure_throughput(
                settings.input, settings.tokenizer, settings.threads, Path(scratch), rounds=settings.repeats
            )
        except TokenizationError as fault:
            raise EvaluationError(str(fault)) from fault
    report = {**circumstances(settings, "cpu"), **asdict(found), "ratio": found.ratio, "target": TARGET}
    write_json(settings.output / "tokenization.json", report)
    rows = [
        ["sentencepiece alone", f"{found.sentencepiece:,.0f}", f"{found.sentencepiece_cpu_seconds:.1f}"],
        ["tokenization.encode", f"{found.encode:,.0f}", f"{found.encode_cpu_seconds:.1f}"],
    ]
    verdict = "reached" if found.ratio >= TARGET else "missed"
    return (
        f"{table(['', 'tokens/s', 'CPU seconds'], rows)}\n\n"
        f"{bytes_text(found.text_bytes)} of text, {found.tokens:,} tokens, {found.workers} processes: "
        f"encode keeps {found.ratio:.2f} of sentencepiece's speed (target {TARGET}: {verdict})"
    )
