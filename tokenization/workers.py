"""Texts to tokens on many cores: batches go out, come back in the order they went, and few are in flight."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenization.errors import TokenizationError

if TYPE_CHECKING:
    import numpy

_BATCHES_PER_WORKER = 3


@dataclass(frozen=True, slots=True)
class Batch:
    """Some consecutive documents."""

    texts: tuple[str, ...]
    """One a document."""
    heldout: tuple[bool, ...]
    """Whether the document of the same place is kept apart."""
    done_bytes: int
    """Bytes of all sources read when the batch was complete."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The tokens of a Batch."""

    tokens: "numpy.ndarray"
    """All documents one behind the other, int32; each starts with the start token and ends with the end token."""
    lengths: tuple[int, ...]
    """Tokens of each document."""


_processor: Any = None


@contextmanager
def tokenized(batches: Iterable[Batch], tokenizer: Path, workers: int) -> Iterator[Iterator[tuple[Batch, TokenBatch]]]:
    """Tokenizes batches, in order.

    The first batches are handed out on entry, so that what the block imports next costs no time.

    Args:
        batches: Read as they are needed: three per worker are in memory at once.
        tokenizer: Sentencepiece model.
        workers: Processes; with 1 the calling process does the work.

    Yields:
        An iterator over each batch with its tokens.

    Raises:
        TokenizationError: A worker died.
    """
    if workers == 1:
        yield _in_this_process(batches, tokenizer)
        return
    batches = iter(batches)
    with _interrupts_ignored():  # the workers inherit it: Ctrl-C is the parent's to handle
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer,)
        )
        pool.submit(os.getpid)
    try:
        first = islice(batches, _BATCHES_PER_WORKER * workers)
        pending = deque((batch, pool.submit(_tokenize, batch.texts)) for batch in first)
        yield _in_pool(pool, pending, batches)
    except BrokenProcessPool as fault:
        raise TokenizationError(
            "a worker process was killed, most often for want of memory; use fewer --workers"
        ) from fault
    finally:
        pool.shutdown(cancel_futures=True)


def _in_this_process(batches: Iterable[Batch], tokenizer: Path) -> Iterator[tuple[Batch, TokenBatch]]:
    _load(tokenizer)
    for batch in batches:
        yield batch, _tokenize(batch.texts)


def _in_pool(
    pool: ProcessPoolExecutor, pending: "deque[tuple[Batch, Future[TokenBatch]]]", batches: Iterator[Batch]
) -> Iterator[tuple[Batch, TokenBatch]]:
    while pending:
        batch, future = pending.popleft()
        tokens = future.result()
        for following in islice(batches, 1):
            pending.append((following, pool.submit(_tokenize, following.texts)))
        yield batch, tokens


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _start_worker(tokenizer: Path) -> None:
    """A killed parent cannot end its workers, and they would wait for ever on a pipe they hold open themselves."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _load(tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _load(tokenizer: Path) -> None:
    global _processor
    import sentencepiece

    _processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))


def _tokenize(texts: Sequence[str]) -> TokenBatch:
    import numpy

    documents = _processor.encode(list(texts), add_bos=True, add_eos=True, num_threads=1)
    lengths = tuple(map(len, documents))
    tokens = numpy.fromiter(chain.from_iterable(documents), dtype=numpy.int32, count=sum(lengths))
    return TokenBatch(tokens, lengths)
