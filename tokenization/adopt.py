"""Takes Megatron's shards as they are: `python -m tokenization.adopt --prefix PATH... --tokenizer FILE --output DIR`.

No train token is copied. The folder gets a link to each .bin, an .idx that names the documents to be trained on (their
places in the .bin, held-out ones passed over), the held-out documents in files of their own, and the manifest.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from titans_mcore.io import commit_file, sha256_of, write_file_atomically
from tokenization.assemble import entropy_of
from tokenization.command_line import MOST_WORKERS, TokenizationError, check_range, parse_settings, run_command
from tokenization.encode import summarize, warn_of_tokenizer
from tokenization.manifest import (
    FORMAT_VERSION,
    HELDOUT,
    MANIFEST_NAME,
    ORIGIN,
    TRAIN,
    FileInfo,
    Manifest,
    Shard,
    SourceInfo,
    Split,
    fingerprint_of,
)
from tokenization.output import make_room, names_in
from tokenization.plan import PLAN_NAME
from tokenization.progress import Progress
from tokenization.selection import bytes_position, choose_threshold
from tokenization.settings import EncodingSettings
from tokenization.shards import import_indexed_dataset
from tokenization.tokenizer import TOKENIZER_NAME, TokenizerInfo, describe_any_tokenizer, load_tokenizer
from tokenization.workers import Report, run_tasks, worthwhile_workers

_BLOCK_TOKENS = 1 << 22
_DTYPES = ("uint16", "int32")
_OTHERWISE = "preprocess the text again, or encode it with `python -m tokenization.encode`"


@dataclass(frozen=True)
class AdoptSettings:
    """Writes a manifest over .bin/.idx pairs of Megatron-LM, NeMo or datatrove, which stay where they are.

    Every token is read once: hashes, counts, and that each is a piece of the tokenizer. A copy is made of the held-out
    documents alone, which are then left out of training.
    """

    prefix: tuple[Path, ...]
    """Datasets, each without .bin and .idx (or with)."""
    tokenizer: Path
    """What made the tokens: a sentencepiece .model, a tokenizer.json of Hugging Face's, or a vocab.json of GPT-2's."""
    output: Path
    """Folder to write; done when manifest.json is in it."""
    heldout_fraction: float = 0.01
    """Share of the documents kept apart for evaluation, chosen by a hash of their tokens; at least one document."""
    seed: int = 0
    """Changes which documents are kept apart."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that read; one dataset each at a time."""
    overwrite: bool = False
    """Replace a folder of other shards."""

    def __post_init__(self) -> None:
        check_range("--workers", self.workers, 1, MOST_WORKERS)
        check_range("--seed", self.seed, 0, (1 << 63) - 1)
        if not 0 < self.heldout_fraction < 1:
            raise TokenizationError(
                f"--heldout-fraction is {self.heldout_fraction}; give a number above 0 and below 1, such as 0.01"
            )


def adopt(settings: AdoptSettings) -> Manifest:
    """Reads the datasets, and writes the folder when all of them are good.

    Raises:
        TokenizationError: A dataset is missing, damaged or of another token type, a token is none of the tokenizer's,
            all is one document, or something else is in the folder.
    """
    prefixes = tuple(
        (path.with_suffix("") if path.suffix in (".bin", ".idx") else path).absolute() for path in settings.prefix
    )
    output = settings.output
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise TokenizationError(f"--prefix {prefix}: given twice; give each dataset once")
        if prefix.parent == output.resolve():
            raise TokenizationError(f"--output {output}: holds {prefix.name}, which is to be read; give another folder")
    tokenizer = describe_any_tokenizer(settings.tokenizer)
    types = {prefix: _Documents(prefix).dtype for prefix in prefixes}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{prefix} {dtype}" for prefix, dtype in types.items())
        raise TokenizationError(f"--prefix: datasets of one token type go together ({listed}); adopt each by itself")
    total = sum(prefix.with_name(f"{prefix.name}.bin").stat().st_size for prefix in prefixes)
    workers = worthwhile_workers(settings.workers, total)
    with Progress("read", total) as progress:
        done = run_tasks(_Reader, (tokenizer, settings.seed), prefixes, workers, progress.advance)
        found: dict[Path, _Content] = dict(done)
    positions = (found[prefix].positions for prefix in prefixes)
    threshold = choose_threshold(positions, settings.heldout_fraction, "--prefix")
    replace = settings.overwrite or not {MANIFEST_NAME, PLAN_NAME} & names_in(output)
    if names_in(output):
        make_room(output, f"not those of {prefixes[0]}", replace)
    output.mkdir(parents=True, exist_ok=True)
    manifest = _write(settings, tokenizer, prefixes, found, threshold)
    summarize(output, manifest)
    if tokenizer.file == TOKENIZER_NAME:
        warn_of_tokenizer(settings.tokenizer)
    else:
        print(
            f"{output}: its tokenizer is not of sentencepiece, so that runs of it train and measure held-out loss, and "
            "that evaluations of text and the Hugging Face export, which read sentencepiece alone, will refuse them"
        )
    return manifest


@dataclass(frozen=True)
class _Content:
    """What was found in a dataset."""

    counts: "numpy.ndarray"
    """Of each token, (V,)."""
    positions: "numpy.ndarray"
    """Of each document, [0, 1): it is kept apart below the threshold."""
    sha256: str
    """Of the .bin."""


class _Documents:
    """The documents of a dataset; where an older preprocessing cut one into sequences, they are joined again."""

    def __init__(self, prefix: Path) -> None:
        """Maps the files.

        Raises:
            TokenizationError: They are missing or damaged, or tokens of a type that is not read here.
        """
        for end in ("bin", "idx"):
            if not prefix.with_name(f"{prefix.name}.{end}").is_file():
                raise TokenizationError(f"--prefix {prefix}: there is no {prefix.name}.{end}; give PATH of PATH.bin")
        module = import_indexed_dataset()
        try:
            index = module._IndexReader(f"{prefix}.idx", multimodal=False)
        except (AssertionError, KeyError, ValueError, struct.error) as fault:
            raise TokenizationError(f"{prefix}.idx: Megatron-core cannot read it ({fault}); {_OTHERWISE}") from fault
        self.dtype: str = numpy.dtype(index.dtype).name
        if self.dtype not in _DTYPES:
            raise TokenizationError(
                f"{prefix}.idx: holds {self.dtype} tokens, {' and '.join(_DTYPES)} are read; {_OTHERWISE}"
            )
        lengths = index.sequence_lengths.astype(numpy.int64)
        ends = numpy.cumsum(lengths)
        size, item = prefix.with_name(f"{prefix.name}.bin").stat().st_size, numpy.dtype(self.dtype).itemsize
        if not len(lengths) or (lengths < 0).any() or ends[-1] * item != size:
            told = f"{int(ends[-1]) if len(ends) else 0:,} tokens of {item} bytes"
            raise TokenizationError(f"{prefix}.bin: {size:,} bytes, its index says {told}; copy both files again")
        bounds = index.document_indices
        if (
            not numpy.array_equal(index.sequence_pointers, (ends - lengths) * item)
            or bounds[0] != 0
            or bounds[-1] != len(lengths)
            or (numpy.diff(bounds) < 0).any()
        ):
            raise TokenizationError(f"{prefix}.idx: its documents do not follow one upon the other; {_OTHERWISE}")
        self.starts: numpy.ndarray = numpy.concatenate([[0], ends])[bounds]
        """First token of each document, and the end of the last; empty documents are left as they are."""
        self.tokens = numpy.memmap(f"{prefix}.bin", dtype=self.dtype, mode="r")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First document and the one behind the last of blocks of some millions of tokens, or of one document."""
        first = 0
        while first < len(self):
            stop = int(numpy.searchsorted(self.starts, self.starts[first] + _BLOCK_TOKENS, side="right")) - 1
            stop = min(max(stop, first + 1), len(self))
            yield first, stop
            first = stop


class _Reader:
    """Reads datasets; each worker has one."""

    def __init__(self, tokenizer: TokenizerInfo, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed

    def __call__(self, prefix: Path, report: Report) -> _Content:
        """Reads every token of a dataset; raises TokenizationError as `_Documents` does, or for a token beyond."""
        documents = _Documents(prefix)
        counts = numpy.zeros(self._tokenizer.vocab_size, numpy.int64)
        positions = numpy.empty(len(documents))
        digest = hashlib.sha256()
        for first, stop in documents.blocks():
            bounds = documents.starts[first : stop + 1]
            block = numpy.array(documents.tokens[bounds[0] : bounds[-1]])
            self._check(prefix, block, bounds)
            digest.update(block.data)
            counts += numpy.bincount(block, minlength=len(counts))
            for place, (start, end) in enumerate(zip(bounds[:-1] - bounds[0], bounds[1:] - bounds[0], strict=True)):
                positions[first + place] = bytes_position(block[start:end].data, self._seed)
            report(block.nbytes, len(block))
        return _Content(counts, positions, digest.hexdigest())

    def _check(self, prefix: Path, block: "numpy.ndarray", bounds: "numpy.ndarray") -> None:
        vocab_size = self._tokenizer.vocab_size
        beyond = numpy.flatnonzero((block < 0) | (block >= vocab_size))
        if len(beyond):
            place = int(bounds[0] + beyond[0])
            document = int(numpy.searchsorted(_Documents(prefix).starts, place, side="right")) - 1
            raise TokenizationError(
                f"{prefix}: document {document:,} (from 0) holds token {int(block[beyond[0]]):,} "
                f"and the tokenizer has {vocab_size:,} pieces; give the one that these tokens were made with"
            )


def _write(
    settings: AdoptSettings,
    tokenizer: TokenizerInfo,
    prefixes: Sequence[Path],
    found: dict[Path, _Content],
    threshold: float,
) -> Manifest:
    """Writes the folder, the manifest last."""
    output = settings.output
    train: list[Shard] = []
    train_files: dict[str, FileInfo] = {}
    records: dict[str, FileInfo] = {}
    sources, origins = [], []
    dtype = _Documents(prefixes[0]).dtype
    partial = {end: output / f".{HELDOUT}.{end}.partial" for end in ("bin", "idx")}
    heldout = import_indexed_dataset().IndexedDatasetBuilder(str(partial["bin"]), getattr(numpy, dtype))
    counts = numpy.sum([content.counts for content in found.values()], axis=0)
    for number, prefix in enumerate(prefixes):
        documents = _Documents(prefix)
        lengths = numpy.diff(documents.starts)
        apart = found[prefix].positions < threshold
        for document in numpy.flatnonzero(apart & (lengths > 0)).tolist():
            tokens = documents.tokens[documents.starts[document] : documents.starts[document + 1]]
            heldout.add_document(tokens, [len(tokens)])
            counts -= numpy.bincount(tokens, minlength=len(counts))
        origins.append(_origins(number, numpy.flatnonzero(apart & (lengths > 0))))
        kept = numpy.flatnonzero(~apart & (lengths > 0))
        name = TRAIN if len(prefixes) == 1 else f"{TRAIN}-{number:05d}"
        if len(kept):
            shard, linked = _link(output / name, prefix, documents, kept, found[prefix].sha256)
            train.append(shard)
            train_files |= linked
            records[f"{name}.rows"] = _write_rows(output / f"{name}.rows", _origins(number, kept))
        size = prefix.with_name(f"{prefix.name}.bin").stat().st_size
        sources.append(SourceInfo(f"{prefix}.bin", len(documents), size, found[prefix].sha256))
    heldout.finalize(str(partial["idx"]))
    files = {f"{HELDOUT}.{end}": FileInfo(path.stat().st_size, sha256_of(path)) for end, path in partial.items()}
    for end, path in partial.items():
        commit_file(path, output / f"{HELDOUT}.{end}")
    apart_rows = numpy.concatenate(origins)
    records[f"{HELDOUT}.rows"] = _write_rows(output / f"{HELDOUT}.rows", apart_rows)
    apart_tokens = files[f"{HELDOUT}.bin"].bytes // numpy.dtype(dtype).itemsize
    trained = sum(one.documents for one in train), sum(one.tokens for one in train)
    splits = {
        TRAIN: Split(TRAIN, *trained, train_files, tuple(train)),
        HELDOUT: Split(HELDOUT, len(apart_rows), apart_tokens, files),
    }
    write_file_atomically(output / tokenizer.file, settings.tokenizer.read_bytes())
    of_sentencepiece = tokenizer.file == TOKENIZER_NAME
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer,
        dtype=dtype,
        splits=splits,
        sources=tuple(sources),
        skipped={},
        settings=EncodingSettings(seed=settings.seed, heldout_fraction=settings.heldout_fraction),
        unigram_entropy=entropy_of(counts),
        fingerprint=fingerprint_of(tokenizer, splits),
        records=records,
        unknown_tokens=int(counts[load_tokenizer(settings.tokenizer).unk_id()]) if of_sentencepiece else 0,
        adopted=True,
    )
    manifest.check_quick(output)
    write_file_atomically(output / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _link(
    target: Path, prefix: Path, documents: _Documents, kept: "numpy.ndarray", sha256: str
) -> tuple[Shard, dict[str, FileInfo]]:
    """Links a .bin and writes an .idx of the documents to train on; Megatron's writer knows no gaps between them."""
    module = import_indexed_dataset()
    lengths, starts = numpy.diff(documents.starts)[kept], documents.starts[kept]
    code = module.DType.code_from_dtype(getattr(numpy, documents.dtype))
    index = module._INDEX_HEADER + struct.pack("<QBQQ", 1, code, len(kept), len(kept) + 1)
    index += lengths.astype("<i4").tobytes() + (starts * documents.tokens.itemsize).astype("<i8").tobytes()
    index += numpy.arange(len(kept) + 1, dtype="<i8").tobytes()
    write_file_atomically(target.with_name(f"{target.name}.idx"), index)
    link = target.with_name(f"{target.name}.bin")
    link.unlink(missing_ok=True)
    link.symlink_to(f"{prefix}.bin")
    files = {
        link.name: FileInfo(link.stat().st_size, sha256),
        f"{target.name}.idx": FileInfo(len(index), hashlib.sha256(index).hexdigest()),
    }
    return Shard(target.name, len(kept), int(lengths.sum())), files


def _origins(source: int, documents: "numpy.ndarray") -> "numpy.ndarray":
    """Where documents come from: the dataset's place among the sources, and theirs in it."""
    origins = numpy.zeros(len(documents), ORIGIN)
    origins["source"], origins["row"] = source, documents
    return origins


def _write_rows(path: Path, origins: "numpy.ndarray") -> FileInfo:
    write_file_atomically(path, origins.tobytes())
    return FileInfo(origins.nbytes, hashlib.sha256(origins.tobytes()).hexdigest())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    adopt(parse_settings(AdoptSettings, "python -m tokenization.adopt", arguments))


if __name__ == "__main__":
    run_command(main)
