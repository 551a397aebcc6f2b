"""Turns text into shards: `python -m tokenization.encode --input PATH... --tokenizer FILE --output DIR --workers N`."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenization.documents import read_documents
from tokenization.errors import TokenizationError, run_command
from tokenization.files import staged_folder
from tokenization.manifest import (
    FORMAT_VERSION,
    HELDOUT,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    TRAIN,
    EncodingSettings,
    Manifest,
    ManifestError,
    SourceInfo,
    fingerprint_of,
)
from tokenization.progress import Progress
from tokenization.shards import UINT16_BELOW, ShardWriter
from tokenization.sources import Skipped, Source, find_sources, sha256_of
from tokenization.split import SplitRule, choose_rule
from tokenization.tokenizer import TokenizerInfo, describe_tokenizer
from tokenization.workers import Batch, tokenized

_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 1_024
# What --overwrite may delete; `cache` is where Megatron-core keeps its sample indices beside the shards.
_OWN_NAMES = {MANIFEST_NAME, TOKENIZER_NAME, "cache"} | {
    f"{s}.{end}" for s in (TRAIN, HELDOUT) for end in ("bin", "idx")
}


@dataclass(frozen=True)
class EncodeSettings:
    """Writes every document as start token, pieces, end token into Megatron shards, train and held-out apart."""

    input: tuple[str, ...]
    """Files or folders: .txt and .md (one document a file), .jsonl, .jsonl.gz, .jsonl.zst and .parquet (a `text` field
    or column), or the word stdlib for the sources of the running Python's standard library."""
    tokenizer: Path
    """Sentencepiece model: from `python -m tokenization.train`, or an existing tokenizer.model such as Llama-2's."""
    output: Path
    """Folder to write. It appears when everything is in it."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that tokenize; the shards are the same for any number."""
    heldout_fraction: float = 0.01
    """Share of the documents kept apart for evaluation, chosen by a hash of their text; at least one document."""
    seed: int = 0
    """Changes which documents are kept apart."""
    dtype: Literal["auto", "uint16", "int32"] = "auto"
    """Type of a token in the shards; auto takes uint16 for vocabularies below 65,500 pieces."""
    overwrite: bool = False
    """Replace a folder of shards that was made from something else."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise TokenizationError(f"--workers is {self.workers}; give at least 1")
        if not 0 < self.heldout_fraction < 1:
            raise TokenizationError(
                f"--heldout-fraction is {self.heldout_fraction}; give a number above 0 and below 1, such as 0.01"
            )


def encode(settings: EncodeSettings) -> Manifest:
    """Writes the shards, or finds that they are there already.

    Args:
        settings: What to read and where to write.

    Returns:
        The manifest of the folder.

    Raises:
        TokenizationError: Unusable input or tokenizer, or something else in the way.
    """
    skipped = Skipped()
    sources = find_sources(settings.input, skipped)
    tokenizer = describe_tokenizer(settings.tokenizer)
    dtype = _token_type(settings.dtype, tokenizer.vocab_size)
    existing = _existing(settings, sources, tokenizer, dtype)
    if existing is not None:
        print(f"{settings.output}: already done, the shards of this text, tokenizer and settings are there")
        return existing
    rule = _choose_rule(settings, sources)
    total_bytes = sum(source.bytes for source in sources)
    with staged_folder(settings.output, replace=settings.overwrite) as folder, Progress(total_bytes) as progress:
        shutil.copyfile(settings.tokenizer, folder / TOKENIZER_NAME)
        reader = _Reader(sources, rule, skipped)
        writer = _write_shards(folder, reader, tokenizer, dtype, settings.workers, progress)
        manifest = _manifest(settings, writer, reader, tokenizer, dtype)
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    _summarize(settings.output, manifest, progress.seconds)
    return manifest


class _Reader:
    """Reads all sources in order and keeps account of them."""

    def __init__(self, sources: Sequence[Source], rule: SplitRule, skipped: Skipped) -> None:
        self._sources = sources
        self._rule = rule
        self.skipped = skipped
        self.read: list[SourceInfo] = []

    def batches(self) -> Iterator[Batch]:
        """Yields the documents in batches that may span sources."""
        texts: list[str] = []
        characters = done_bytes = 0
        for source in self._sources:
            sha256, documents = sha256_of(source.path), 0
            for document in read_documents(source, self.skipped):
                documents += 1
                texts.append(document.text)
                characters += len(document.text)
                if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
                    yield self._batch(texts, done_bytes + document.offset)
                    texts, characters = [], 0
            done_bytes += source.bytes
            self.read.append(SourceInfo(str(source.path), documents, source.bytes, sha256))
        if texts:
            yield self._batch(texts, done_bytes)

    def _batch(self, texts: list[str], done_bytes: int) -> Batch:
        return Batch(tuple(texts), tuple(map(self._rule.is_heldout, texts)), done_bytes)


def _write_shards(
    folder: Path, reader: _Reader, tokenizer: TokenizerInfo, dtype: str, workers: int, progress: Progress
) -> ShardWriter:
    with tokenized(reader.batches(), folder / TOKENIZER_NAME, workers) as encoded_batches:
        writer = ShardWriter(folder, tokenizer.vocab_size, dtype)
        for batch, encoded in encoded_batches:
            writer.add(batch, encoded)
            progress.update(batch.done_bytes, sum(writer.tokens.values()))
    return writer


def _manifest(
    settings: EncodeSettings, writer: ShardWriter, reader: _Reader, tokenizer: TokenizerInfo, dtype: str
) -> Manifest:
    splits = writer.finish()
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer,
        dtype=dtype,
        splits=splits,
        sources=tuple(reader.read),
        skipped=dict(sorted(reader.skipped.counts.items())),
        settings=EncodingSettings(settings.seed, settings.heldout_fraction),
        unigram_entropy=writer.unigram_entropy(),
        fingerprint=fingerprint_of(tokenizer, splits),
    )


def _choose_rule(settings: EncodeSettings, sources: Sequence[Source]) -> SplitRule:
    skipped = Skipped()
    texts = (document.text for source in sources for document in read_documents(source, skipped))
    try:
        return choose_rule(texts, settings.seed, settings.heldout_fraction)
    except TokenizationError as fault:
        raise TokenizationError(f"{fault} (input: {' '.join(settings.input)}; skipped: {skipped})") from fault


def _token_type(wanted: str, vocab_size: int) -> str:
    if wanted == "auto":
        return "uint16" if vocab_size < UINT16_BELOW else "int32"
    if wanted == "uint16" and vocab_size > 1 << 16:
        raise TokenizationError(
            f"--dtype uint16: holds 65,536 different tokens and the tokenizer has {vocab_size:,}; use --dtype int32"
        )
    return wanted


def _existing(
    settings: EncodeSettings, sources: Sequence[Source], tokenizer: TokenizerInfo, dtype: str
) -> Manifest | None:
    """Returns the manifest of finished shards of the same content, None where there is room to write."""
    output = settings.output
    if output.exists() and not output.is_dir():
        raise TokenizationError(f"--output {output}: is a file; give a folder")
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if not names:
        return None
    try:
        manifest = Manifest.load(output)
        manifest.check_quick(output)
        difference = _difference(manifest, settings, sources, tokenizer, dtype)
    except ManifestError as fault:
        difference = f"they are not whole ({fault})"
    if difference is None:
        return manifest
    if foreign := sorted(names - _OWN_NAMES):
        raise TokenizationError(f"--output {output}: holds {foreign[0]}, which is not of a shard folder; give another")
    if settings.overwrite:
        return None
    raise TokenizationError(
        f"--output {output}: holds other shards, {difference}; give another folder, or --overwrite to replace them"
    )


def _difference(
    manifest: Manifest, settings: EncodeSettings, sources: Sequence[Source], tokenizer: TokenizerInfo, dtype: str
) -> str | None:
    if manifest.tokenizer != tokenizer:
        return f"written with another tokenizer than {settings.tokenizer}"
    if manifest.dtype != dtype:
        return f"written as {manifest.dtype}, not {dtype}"
    for name, value in (("seed", settings.seed), ("heldout_fraction", settings.heldout_fraction)):
        if getattr(manifest.settings, name) != value:
            return f"written with {name} {getattr(manifest.settings, name)}, not {value}"
    if len(manifest.sources) != len(sources):
        return f"written from {len(manifest.sources):,} files, not {len(sources):,}"
    for old, new in zip(manifest.sources, sources, strict=True):
        if not old.path.lower().endswith(new.suffix) or old.bytes != new.bytes or old.sha256 != sha256_of(new.path):
            return f"written from {old.path}, where {new.path} has other content"
    return None


def _summarize(output: Path, manifest: Manifest, seconds: float) -> None:
    train, heldout = manifest.splits[TRAIN], manifest.splits[HELDOUT]
    tokens = train.tokens + heldout.tokens
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in manifest.skipped.items()) or "nothing"
    print(
        f"{output}: {train.tokens:,} train tokens in {train.documents:,} documents, {heldout.tokens:,} held-out in "
        f"{heldout.documents:,}, {manifest.dtype}; unigram entropy {manifest.unigram_entropy:.3f} nats; "
        f"skipped: {skipped}; {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    import tyro

    encode(
        tyro.cli(
            EncodeSettings, args=arguments, prog="python -m tokenization.encode", config=(tyro.conf.FlagCreatePairsOff,)
        )
    )


if __name__ == "__main__":
    run_command(main)
