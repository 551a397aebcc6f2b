"""Trains a tokenizer: `python -m tokenization.train --input PATH... --output FILE.model`."""

import heapq
import io
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_mcore.io import write_file_atomically
from tokenization.command_line import TokenizationError, check_range, parse_settings, run_command
from tokenization.documents import Reader, SourceDocument
from tokenization.plan import plan_units
from tokenization.records import Skipped
from tokenization.sources import SourceFile, SourceOptions
from tokenization.tokenizer import llama_settings

_PASSAGE_CHARACTERS = 4_096
_READ_SAMPLES = 40
_READ_UNITS = 400


@dataclass(frozen=True, kw_only=True)
class TrainSettings(SourceOptions):
    """Trains a sentencepiece BPE tokenizer with byte fallback, of Llama-2's kind, on text files."""

    output: Path
    """Tokenizer file to write, usually tokenizer.model."""
    vocab_size: int = 32_000
    """Pieces, the 3 special and the 256 byte tokens included."""
    sample_bytes: int = 100_000_000
    """Train on about this many bytes of text, drawn evenly; memory grows with it, 0.5 GB for the default."""
    seed: int = 0
    """Decides which passages are drawn when there is more text than sample_bytes."""
    overwrite: bool = False
    """Replace an existing file that holds another tokenizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--vocab-size", self.vocab_size, 1, 10_000_000)
        check_range("--sample-bytes", self.sample_bytes, 1, 1_000_000_000_000)
        if self.output.is_dir():
            raise TokenizationError(f"--output {self.output}: is a folder; give the name of a file")


def train(settings: TrainSettings) -> None:
    """Trains a tokenizer and writes it; the same text and settings give the same bytes.

    Raises:
        TokenizationError: Unusable input, too little text for the vocabulary, or another tokenizer in the way.
    """
    started = time.monotonic()
    skipped = Skipped()
    passages = sample_passages(settings, settings.find(skipped), skipped)
    if not passages:
        raise TokenizationError(f"{settings.shown}: no document in it (left out: {skipped})")
    sampled_bytes = sum(len(passage.encode()) for passage in passages)
    print(f"training {settings.vocab_size:,} pieces on {sampled_bytes / 1e6:,.1f} MB of text", file=sys.stderr)
    model = _train_model(passages, settings.vocab_size)
    if not settings.overwrite and settings.output.exists() and settings.output.read_bytes() != model:
        raise TokenizationError(
            f"--output {settings.output}: exists and differs from what was trained now; "
            "give another name, or --overwrite to replace it"
        )
    write_file_atomically(settings.output, model)
    seconds = time.monotonic() - started
    print(f"{settings.output}: {settings.vocab_size:,} pieces in {seconds:.1f} s; left out: {skipped}")


def sample_passages(settings: TrainSettings, sources: Sequence[SourceFile], skipped: Skipped) -> list[str]:
    """Draws passages evenly from the text in one pass, holding no more than the sample.

    Every passage gets a random key; those with the smallest keys stay while they fit. So each passage has the same
    chance, whichever file it is in and however many follow. Of more text than forty samples, as many units of work as
    make forty are drawn first, so that a hub of terabytes is not read for 100 MB.

    Returns:
        Passages in the order of the text, together at most `sample_bytes` bytes (or one passage).
    """
    generator = random.Random(settings.seed)
    kept: list[tuple[float, int, str]] = []
    kept_bytes = 0
    texts = (document.text for document in _documents(settings, sources, skipped))
    for index, passage in enumerate(passage for text in texts for passage in cut_passages(text)):
        heapq.heappush(kept, (-generator.random(), index, passage))
        kept_bytes += len(passage.encode())
        while kept_bytes > settings.sample_bytes and len(kept) > 1:
            kept_bytes -= len(heapq.heappop(kept)[2].encode())
    return [passage for _, _, passage in sorted(kept, key=lambda item: item[1])]


def _documents(settings: TrainSettings, sources: Sequence[SourceFile], skipped: Skipped) -> Iterator[SourceDocument]:
    enough = settings.sample_bytes * _READ_SAMPLES
    units = list(plan_units(sources, max(1, enough // _READ_UNITS), skipped))
    chosen, weight = set(), 0
    for number in random.Random(settings.seed).sample(range(len(units)), len(units)):
        if weight < enough:
            chosen.add(number)
            weight += units[number].weight
    for number in sorted(chosen):
        for span in units[number].spans:
            yield from Reader(sources[span.source], span.span, skipped=skipped, filters=settings.filters)


def cut_passages(text: str) -> Iterator[str]:
    """Cuts a text into passages of at most 4,096 characters, at line ends where there are any."""
    start = 0
    while start < len(text):
        end = start + _PASSAGE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _train_model(passages: Sequence[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(passages), model_writer=model, **llama_settings(vocab_size)
        )
    except RuntimeError as fault:
        raise TokenizationError(_explain(str(fault), vocab_size)) from fault
    return model.getvalue()


def _explain(fault: str, vocab_size: int) -> str:
    if largest := re.search(r"value <= (\d+)", fault):
        return (
            f"--vocab-size {vocab_size}: this text gives at most {int(largest[1])} pieces; "
            f"ask for {int(largest[1])} or fewer, or give more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", fault):
        return f"--vocab-size {vocab_size}: this text needs at least {int(smallest[1])} pieces; ask for more"
    return f"sentencepiece cannot train on this text: {' '.join(fault.split())}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    train(parse_settings(TrainSettings, "python -m tokenization.train", arguments, folder=False))


if __name__ == "__main__":
    run_command(main)
