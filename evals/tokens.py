"""Token ids of long texts, and rows of them whose loss is measured: they lie in a file and are read piece by piece."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from evals.command_line import EvaluationError
from evals.models import EvalModel
from tokenization.shards import import_indexed_dataset

_BLOCK = 1 << 20  # characters, or tokens, looked at at a time


@dataclass(frozen=True)
class DiskTokens:
    """A stretch of token ids. A slice of it is one, too, and `np.asarray` reads it.

    It reads with pread: pages of a memory map would count as this process's memory, as many as were ever read.
    """

    file: IO[bytes]
    """Open for reading; it must stay so."""
    start: int
    """First id, counted from the beginning of the file."""
    stop: int
    """Id behind the last."""
    dtype: Any = np.int32
    """How an id is stored."""

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> "DiskTokens":
        first, last, step = part.indices(len(self))
        assert step == 1
        return DiskTokens(self.file, self.start + first, self.start + max(first, last), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        size = np.dtype(self.dtype).itemsize
        data = bytearray(len(self) * size)
        filled = 0
        while filled < len(data):  # one call reads at most 2 GB
            read = os.preadv(self.file.fileno(), [memoryview(data)[filled:]], self.start * size + filled)
            if not read:
                raise ValueError(f"{self.file.name}: ends before token {self.stop:,}; it was cut while it was read")
            filled += read
        return np.frombuffer(data, self.dtype).astype(dtype or self.dtype, copy=False)


Encode = Callable[[Sequence[str]], list[list[int]]]


def encoder(processor: Any, before: str) -> Encode:
    """Encodes texts as they stand behind `before`, whose ids are left out but for a blank at its end.

    Alone a text would begin with sentencepiece's dummy prefix, whatever stands before it.

    Args:
        processor: The `sentencepiece.SentencePieceProcessor`.
        before: Such as ". ", between sentences.

    Raises:
        EvaluationError: When it is called, if the tokenizer joins a text with what stands before it.
    """
    head = before.rstrip(" ")
    ids = processor.encode(head)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        both = [processor.encode(before + text) for text in texts]
        if any(whole[: len(ids)] != ids for whole in both):
            raise EvaluationError("the tokenizer joins the end of a text with the next one; they cannot be spliced")
        return [whole[len(ids) :] for whole in both]

    return encode


def heldout_rows(folder: Path, model: EvalModel, rows: int, length: int) -> list[DiskTokens]:
    """Held-out documents, joined in their order and cut into rows.

    Args:
        folder: Has heldout.bin and heldout.idx, and manifest.json where the tokenizer is to be checked.
        model: Must have read the same tokens.
        rows: Most rows.
        length: Tokens that a row predicts.

    Returns:
        Rows of length + 1 tokens: a row's last token is the next row's first, so that every token but the very first
        is predicted once.

    Raises:
        EvaluationError: Files are missing or damaged, too short for one row, or of another tokenizer.
    """
    _check_tokenizer(folder, model)
    dataset = _open(folder / "heldout")
    have = int(dataset.sequence_lengths.sum(dtype=np.int64))
    rows = min(rows, (have - 1) // length)
    if rows < 1:
        raise EvaluationError(
            f"--data {folder}: {have:,} held-out tokens, but a row of --length {length} needs {length + 1:,}; "
            "give a smaller --length or encode more text"
        )
    tokens = DiskTokens(
        (folder / "heldout.bin").open("rb"), 0, have, dataset.index.dtype
    )  # documents one behind another
    _check_vocabulary(f"--data {folder}", tokens[: rows * length + 1], model)
    return [tokens[row * length : (row + 1) * length + 1] for row in range(rows)]


def text_rows(paths: Sequence[Path], model: EvalModel, rows: int, length: int) -> list[DiskTokens]:
    """The beginnings of texts that are long enough, each a row of its own, behind a start token as in training.

    Args:
        paths: Text files, or folders of .txt files. A text is tokenised as far as its row reaches.
        model: Whose tokenizer is used.
        rows: Most rows.
        length: Tokens that a row predicts.

    Raises:
        EvaluationError: No text there, or none long enough.
    """
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.txt")))]
    if not files:
        raise EvaluationError(f"--text {' '.join(map(str, paths))}: no text file there; give files, or folders of .txt")
    ids: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as rows are read from it
    found: list[DiskTokens] = []
    longest = end = 0
    for file in files:
        if len(found) == rows:
            break
        have = encode_text(file, model.tokenizer.processor, ids, length + 1)
        if have > length:
            found.append(DiskTokens(ids, end, end + length + 1))
        longest, end = max(longest, have), end + have
    ids.flush()
    if not found:
        raise EvaluationError(
            f"--text: the longest of {len(files)} files has {longest:,} tokens, but a row of --length {length} needs "
            f"{length + 1:,}; give a smaller --length or a longer text"
        )
    return found


def encode_text(file: Path, processor: Any, ids: IO[bytes], most: int) -> int:
    """Appends the start token and the ids of a text as int32, at most so many, and returns how many there are.

    Args:
        file: UTF-8; it is read in parts, whatever its length.
        processor: The `sentencepiece.SentencePieceProcessor`, or what encodes like it.
        ids: File to append to.
        most: Tokens.
    """
    encode = encoder(processor, ".")
    ids.write(np.array([processor.bos_id()], np.int32).tobytes())
    have = 1
    for number, block in enumerate(_blocks(file)):
        found = (encode([block])[0] if number else processor.encode(block))[: most - have]
        ids.write(np.array(found, np.int32).tobytes())
        have += len(found)
        if have == most:
            break
    return have


def _blocks(file: Path) -> Iterator[str]:
    """A text in parts that begin with a blank or a line feed, where tokens never go across."""
    rest = ""
    with file.open(encoding="utf-8", errors="replace", newline="") as text:
        while part := text.read(_BLOCK):
            rest += part
            cut = max(rest.rfind(" "), rest.rfind("\n"))
            while cut > 0 and rest[cut - 1] in " \n":  # several of them may be one token
                cut -= 1
            if cut > 0:
                yield rest[:cut]
                rest = rest[cut:]
    if rest:
        yield rest


def _check_vocabulary(source: str, tokens: DiskTokens, model: EvalModel) -> None:
    for start in range(0, len(tokens), _BLOCK):
        largest = np.asarray(tokens[start : start + _BLOCK]).max()
        if largest >= model.config.vocab_size:
            raise EvaluationError(
                f"{source}: it holds token {largest}, but the model knows {model.config.vocab_size:,}; "
                "give the shards of the model's own tokenizer"
            )


def _open(prefix: Path) -> Any:
    for suffix in (".bin", ".idx"):
        if not prefix.with_suffix(suffix).is_file():
            raise EvaluationError(
                f"--data {prefix.parent}: {prefix.name}{suffix} is missing; write shards with "
                "`python -m tokenization.encode`"
            )
    # Readers that could not be made complain on stderr when they are dropped, after the error has said it all.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        dataset = import_indexed_dataset().IndexedDataset(str(prefix))
        expected = int(dataset.sequence_lengths.sum(dtype=np.int64)) * dataset.index.dtype_size
    except Exception as error:  # a damaged index fails in whatever way its bytes lead to
        fault = " ".join(str(error).split()) or type(error).__name__
    else:
        there = prefix.with_suffix(".bin").stat().st_size
        if there == expected:
            return dataset
        fault = f"{prefix.name}.bin has {there:,} bytes instead of {expected:,}"
    finally:
        sys.unraisablehook = hook
    raise EvaluationError(f"--data {prefix.parent}: cannot read {prefix.name}.idx and .bin ({fault}); encode again")


def _check_tokenizer(folder: Path, model: EvalModel) -> None:
    try:
        shards = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if shards != model.tokenizer.sha256:
        raise EvaluationError(
            f"--data {folder}: its tokens were made with another tokenizer (sha256 {shards[:12]}, the model's is "
            f"{model.tokenizer.sha256[:12]}); give the shards of the model's own tokenizer"
        )
