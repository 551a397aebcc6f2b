"""Turns text into shards: `python -m tokenization.encode --input PATH... --tokenizer FILE --output DIR --workers N`."""

import math
import os
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from titans_mcore.hf.folder import ExportError
from titans_mcore.hf.tokenizer import read_tokenizer
from titans_mcore.io import exclusive, sha256_of, sweep_partial_files, write_file_atomically
from tokenization.assemble import assemble, remove_work
from tokenization.command_line import MOST_WORKERS, TokenizationError, check_range, parse_settings, run_command
from tokenization.manifest import HELDOUT, TRAIN, Manifest
from tokenization.output import claim_output, mark_failed
from tokenization.plan import Plan
from tokenization.progress import Progress
from tokenization.settings import EncodingSettings
from tokenization.shards import UINT16_BELOW, import_indexed_dataset
from tokenization.sources import SourceOptions
from tokenization.tokenizer import TOKENIZER_NAME, describe_tokenizer
from tokenization.units import UnitEncoder, load_result, units_folder
from tokenization.workers import run_tasks


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(SourceOptions):
    """Writes every document as start token, pieces, end token into Megatron shards, train and held-out apart.

    Killed at any moment and started again with the same arguments, it ends with the same bytes. On many hosts, or as
    a SLURM array, give all the same shared --output and each its --shard, then run once more with --merge.
    """

    tokenizer: Path
    """Sentencepiece model: from `python -m tokenization.train`, or an existing tokenizer.model such as Llama-2's."""
    output: Path
    """Folder to write; done when manifest.json is in it."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that tokenize; the shards are the same for any number."""
    shard: str = "0/1"
    """I/N: do every Nth unit of work, from the Ith; in a SLURM array: $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT."""
    merge: bool = False
    """Only assemble what the --shard runs have done."""
    shard_tokens: int = 1_000_000_000
    """Tokens of a train shard at most, give or take a document; all become about equal."""
    heldout_fraction: float = 0.01
    """Share of the documents kept apart for evaluation, chosen by a hash of their text; at least one document."""
    seed: int = 0
    """Changes which documents are kept apart."""
    keep_duplicates: bool = False
    """Keep documents whose text came before, letter for letter."""
    max_document_mb: float = 64.0
    """Reject larger documents, MB of UTF-8. A worker needs up to nine times as much: under 1 GB for the default."""
    max_rejected: str = "1%"
    """Fail at the end when more of the documents, or of the files, is bad data."""
    dtype: Literal["auto", "uint16", "int32"] = "auto"
    """Type of a token in the shards; auto takes uint16 for vocabularies below 65,500 pieces."""
    unit_mb: float = 64.0
    """About how much text a worker does at a time: what a killed one has to do again."""
    overwrite: bool = False
    """Replace a folder of shards that was made, or begun, from something else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--workers", self.workers, 1, MOST_WORKERS)
        if not 0 < self.heldout_fraction < 1:
            raise TokenizationError(
                f"--heldout-fraction is {self.heldout_fraction}; give a number above 0 and below 1, such as 0.01"
            )
        check_range("--shard-tokens", self.shard_tokens, 1, 1_000_000_000_000)
        check_range("--max-document-mb", self.max_document_mb, 1e-6, 100_000)
        check_range("--unit-mb", self.unit_mb, 1e-6, 1_000_000)
        parse_share(self.max_rejected)
        parse_shard(self.shard)

    @property
    def content(self) -> EncodingSettings:
        """What decides the content of the shards."""
        return EncodingSettings(
            seed=self.seed,
            heldout_fraction=self.heldout_fraction,
            shard_tokens=self.shard_tokens,
            deduplicate=not self.keep_duplicates,
            filters=self.filters,
            max_document_bytes=round(self.max_document_mb * 1e6),
            unit_bytes=max(1, round(self.unit_mb * 1e6)),
            dataset=self.dataset,
            name=self.name,
            split=self.split if self.dataset else None,
            revision=self.revision,
        )


def encode(settings: EncodeSettings) -> Manifest | None:
    """Writes the shards, goes on with them, or finds that they are there already.

    Args:
        settings: What to read and where to write.

    Returns:
        The manifest of the folder; None when other hosts' units are still to be done.

    Raises:
        TokenizationError: Unusable input or tokenizer, something else in the way, or too much bad data.
    """
    output, (host, hosts) = settings.output, parse_shard(settings.shard)
    tokenizer = describe_tokenizer(settings.tokenizer)
    dtype = token_type(settings.dtype, tokenizer.vocab_size)
    plan, manifest = claim_output(settings, settings.content, output, tokenizer, dtype, replace=settings.overwrite)
    if manifest is not None:
        remove_work(output)
        print(f"{output}: already done, the shards of this text, tokenizer and settings are there")
        return manifest
    warn_of_tokenizer(settings.tokenizer)
    kept = output / TOKENIZER_NAME
    if not kept.exists() or sha256_of(kept) != tokenizer.sha256:
        write_file_atomically(kept, settings.tokenizer.read_bytes())
    if not settings.merge:
        lock = units_folder(output) / f"host-{host}-of-{hosts}.lock"
        with exclusive(
            lock, f"--output {output}: another process works there as --shard {settings.shard}; wait for it"
        ):
            if hosts == 1 and settings.workers > 1:
                threading.Thread(target=_import_early).start()
            encode_units(plan, output, range(host, len(plan.units), hosts), settings.workers)
    if hosts > 1 and not settings.merge:
        print(f"{output}: --shard {settings.shard} is done; when all {hosts} are, run once with --merge")
        return None
    try:
        manifest = assemble(plan, output, settings.workers, parse_share(settings.max_rejected))
    except TokenizationError:
        if not settings.merge:  # all units are done, so that the text itself is the fault
            mark_failed(output)
        raise
    summarize(output, manifest)
    return manifest


def warn_of_tokenizer(path: Path) -> None:
    """Says now what the export would say when the model is trained."""
    try:
        read_tokenizer(path)
    except ExportError as fault:
        print(f"note: {fault}; models of these shards train and are evaluated, and have no Hugging Face export")


def _import_early() -> None:
    """What assembling imports takes seconds, and this process only waits while its workers tokenize."""
    with suppress(Exception):  # the command may end meanwhile; where the import is needed, it speaks for itself
        import_indexed_dataset()


def encode_units(plan: Plan, output: Path, numbers: Sequence[int], workers: int) -> None:
    """Does those of the units that are not done."""
    sweep_partial_files(units_folder(output))
    todo = [number for number in numbers if load_result(output, number) is None]
    total = sum(plan.units[number].weight for number in numbers)
    done = total - sum(plan.units[number].weight for number in todo)
    if len(todo) < len(numbers):
        print(f"{output}: going on, {len(numbers) - len(todo):,} of {len(numbers):,} units of work are done")
    with Progress("encoded", total, done) as progress:
        for _ in run_tasks(UnitEncoder, (output,), todo, workers, progress.advance):
            pass


def summarize(output: Path, manifest: Manifest) -> None:
    """Prints what the shards hold and what was left out."""
    train, heldout = manifest.splits[TRAIN], manifest.splits[HELDOUT]
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in manifest.skipped.items()) or "nothing"
    print(
        f"{output}: {train.tokens:,} train tokens in {train.documents:,} documents and {len(train.datasets):,} "
        f"shard(s), {heldout.tokens:,} held-out in {heldout.documents:,}, {manifest.dtype}; "
        f"unigram entropy {manifest.unigram_entropy:.3f} nats; left out: {skipped}"
    )
    if manifest.unknown_tokens:
        share = manifest.unknown_tokens / train.tokens
        print(
            f"note: {manifest.unknown_tokens:,} train tokens ({share:.1%}) are the unknown piece: text that this "
            "tokenizer cannot spell; one trained with byte fallback can"
        )


def token_type(wanted: str, vocab_size: int) -> str:
    """Returns the NumPy name of the type that holds a vocabulary.

    Raises:
        TokenizationError: The wanted type does not.
    """
    if wanted == "auto":
        return "uint16" if vocab_size < UINT16_BELOW else "int32"
    if wanted == "uint16" and vocab_size > 1 << 16:
        raise TokenizationError(
            f"--dtype uint16: holds 65,536 different tokens and the tokenizer has {vocab_size:,}; use --dtype int32"
        )
    return wanted


def parse_shard(value: str) -> tuple[int, int]:
    """Returns I and N of "I/N"."""
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or int(match[1]) >= int(match[2]):
        raise TokenizationError(f"--shard is {value!r}; give I/N with I from 0 to N - 1, such as 0/8")
    return int(match[1]), int(match[2])


def parse_share(value: str) -> float:
    """Returns the share that "1%" or "0.01" means."""
    number, percent = value.removesuffix("%"), value.endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise TokenizationError(f"--max-rejected is {value!r}; give a share such as 1% or 0.01")
    return share


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    encode(parse_settings(EncodeSettings, "python -m tokenization.encode", arguments))


if __name__ == "__main__":
    run_command(main)
