"""How fast `encode` is beside sentencepiece alone, on the same text and cores, measured in one go."""

import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tokenization.documents import read_documents
from tokenization.encode import EncodeSettings, encode
from tokenization.skipped import Skipped
from tokenization.sources import find_sources
from tokenization.tokenizer import load_tokenizer

_DOCUMENTS_AT_ONCE = 4_096


@dataclass(frozen=True)
class Throughput:
    """Tokens a second, start and end tokens included."""

    workers: int
    """Processes of `encode`, threads of sentencepiece."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    tokens: int
    """That it gives."""
    sentencepiece: float
    """Its batch API on texts in memory, its tokens thrown away; the fastest round."""
    encode: float
    """The whole command: start of the processes, reading, hashes, duplicates, writing, shards, manifest;
    the fastest round."""
    sentencepiece_cpu_seconds: float
    """Of all threads; does not grow when others use the machine."""
    encode_cpu_seconds: float
    """Of all processes, this one included."""

    @property
    def ratio(self) -> float:
        """Share of sentencepiece's speed that `encode` keeps."""
        return self.encode / self.sentencepiece


def measure_throughput(
    inputs: tuple[str, ...], tokenizer: Path, workers: int, scratch: Path, rounds: int = 2
) -> Throughput:
    """Encodes text with sentencepiece alone and with `encode` in turn, and keeps the fastest of each.

    The text is read into memory for sentencepiece; give a few hundred MB, so that the seconds that starting takes (most
    of them Megatron-core's import) weigh as little as they do in real work.

    Args:
        inputs: Files or folders, as for `encode`.
        tokenizer: Sentencepiece model.
        workers: Cores to use.
        scratch: Folder for the shards, which are deleted; on the disk that is to be measured.
        rounds: Of both; other work on the machine slows single ones.

    Returns:
        What was measured.
    """
    processor = load_tokenizer(tokenizer)
    texts = [text.text for source in find_sources(inputs, Skipped()) for text in read_documents(source, Skipped())]
    settings = EncodeSettings(
        input=inputs,
        tokenizer=tokenizer,
        output=scratch,
        workers=workers,
        keep_duplicates=True,  # so that both do the same work
        max_rejected="100%",
    )
    alone, whole = [], []
    for _ in range(rounds):
        alone.append(_timed(lambda: _sentencepiece_tokens(processor, texts, workers)))
        whole.append(_timed(lambda: _encode_tokens(settings, scratch)))
    tokens = {measured[2] for measured in alone + whole}
    assert len(tokens) == 1, tokens
    text_bytes = sum(len(text.encode()) for text in texts)
    (seconds, cpu, total), (encode_seconds, encode_cpu, _) = min(alone), min(whole)
    return Throughput(workers, text_bytes, total, total / seconds, total / encode_seconds, cpu, encode_cpu)


def _timed(action: Callable[[], int]) -> tuple[float, float, int]:
    """Returns the seconds on the clock and of the processor that an action took, and its result."""
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    result = action()
    return time.perf_counter() - started, _cpu_seconds() - cpu_started, result


def _sentencepiece_tokens(processor: Any, texts: list[str], threads: int) -> int:
    tokens, remaining = 0, iter(texts)
    while batch := list(islice(remaining, _DOCUMENTS_AT_ONCE)):
        tokens += sum(map(len, processor.encode(batch, add_bos=True, add_eos=True, num_threads=threads)))
    return tokens


def _encode_tokens(settings: EncodeSettings, scratch: Path) -> int:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        manifest = encode(replace(settings, output=Path(folder, "shards")))
    assert manifest is not None
    return sum(split.tokens for split in manifest.splits.values())


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
