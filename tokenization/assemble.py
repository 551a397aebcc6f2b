"""From finished units to shards and manifest: duplicates out, train and held-out apart, everything in plan order.

Each step can be killed and started again: shards are marked when they are whole, the manifest is written last, and a
unit's tokens are deleted only when every shard that takes from them is marked, so that the disk holds them about once.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import numpy

from titans_mcore.io import PartialFile, exclusive, sha256_of, write_file_atomically
from tokenization.command_line import TokenizationError
from tokenization.manifest import (
    FORMAT_VERSION,
    HELDOUT,
    MANIFEST_NAME,
    REJECTED_NAME,
    TRAIN,
    FileInfo,
    Manifest,
    SourceInfo,
    Split,
    fingerprint_of,
)
from tokenization.plan import PLAN_NAME, Plan
from tokenization.progress import Progress
from tokenization.records import broken_files, rejected_documents
from tokenization.selection import choose_threshold, find_duplicates
from tokenization.shards import (
    Selection,
    ShardResult,
    ShardSpec,
    ShardWriter,
    load_counts,
    load_shard,
    marker_path,
    plan_shards,
)
from tokenization.tokenizer import TOKENIZER_NAME, load_tokenizer
from tokenization.units import UnitResult, load_result, part_path
from tokenization.workers import run_tasks, worthwhile_workers

_MAX_SHARD_DOCUMENTS = 2_000_000


def assemble(plan: Plan, output: Path, workers: int, max_rejected: float) -> Manifest:
    """Writes the shards and the manifest of a plan whose units are done.

    Args:
        plan: That of the folder.
        output: The folder.
        workers: Processes.
        max_rejected: Share of the documents, or of the files, that may be bad data.

    Returns:
        The manifest.

    Raises:
        TokenizationError: Units are missing, too much was rejected, or there are too few documents.
    """
    results = load_results(plan, output)
    with exclusive(output / "work" / "assemble.lock", f"--output {output}: another process assembles it; wait for it"):
        rejected = _write_rejected(plan, results, output)
        skipped = Counter(plan.skipped)
        for result in results:
            skipped.update(result.skipped)
        _check_rejected(plan, results, skipped, max_rejected, output)
        selection, skipped["duplicate"] = _select(plan, results, output)
        shards = _write_shards(plan, selection, results, workers)
        manifest = _manifest(plan, results, +skipped, shards, {REJECTED_NAME: rejected}, selection)
        manifest.check_quick(output)
        write_file_atomically(output / MANIFEST_NAME, manifest.to_json().encode())
        remove_work(output)
    return manifest


def load_results(plan: Plan, output: Path) -> list[UnitResult]:
    """Returns the markers of all units.

    Raises:
        TokenizationError: Naming the units that are not done.
    """
    found = [load_result(output, number) for number in range(len(plan.units))]
    missing = [number for number, result in enumerate(found) if result is None]
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise TokenizationError(
            f"--output {output}: {len(missing):,} of {len(found):,} units of work are not done ({listed}); unit U is "
            "the work of --shard (U mod N)/N: run those again, and --merge when all have ended"
        )
    return [result for result in found if result is not None]


def remove_work(output: Path) -> None:
    """Deletes what only unfinished shards need."""
    shutil.rmtree(output / "work", ignore_errors=True)
    for path in output.glob(".*.partial*"):
        path.unlink(missing_ok=True)


def _first_rows(plan: Plan, results: Sequence[UnitResult]) -> tuple[dict[int, int], ...]:
    """For each unit, what to add to the rows of a .jsonl, which count from the start of a span."""
    passed: Counter[int] = Counter()
    found = []
    for unit, result in zip(plan.units, results, strict=True):
        found.append({span.source: passed[span.source] for span in unit.spans if passed[span.source]})
        for span, rows in zip(unit.spans, result.rows, strict=True):
            if plan.sources[span.source].suffix == ".jsonl":
                passed[span.source] += rows
    return tuple(found)


def _write_rejected(plan: Plan, results: Sequence[UnitResult], output: Path) -> FileInfo:
    """Joins the units' lists of bad data into rejected.jsonl."""
    path = output / REJECTED_NAME
    with PartialFile(path) as partial:
        for rejected in plan.rejected:
            partial.file.write(json.dumps(asdict(rejected), ensure_ascii=False).encode() + b"\n")
        for number, (unit, first_rows) in enumerate(zip(plan.units, _first_rows(plan, results), strict=True)):
            with part_path(output, number, "rejected.jsonl").open(encoding="utf-8") as lines:
                for line in lines:
                    place, record = json.loads(line)
                    if record["row"] is not None:
                        record["row"] += first_rows.get(unit.spans[place].source, 0)
                    partial.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        size = partial.commit()
    return FileInfo(size, sha256_of(path))


def _check_rejected(
    plan: Plan, results: Sequence[UnitResult], skipped: Counter[str], max_rejected: float, output: Path
) -> None:
    seen = sum(result.seen for result in results)
    for rejected, total, things in (
        (rejected_documents(skipped), seen, "documents"),
        (broken_files(skipped), len(plan.sources) + skipped["unreadable_file"], "files"),
    ):
        if rejected and rejected > max_rejected * total:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.items()))
            raise TokenizationError(
                f"--output {output}: {rejected:,} of {total:,} {things} are bad ({rejected / total:.1%}), more than "
                f"--max-rejected {max_rejected:.2%} ({kinds}; each listed in {output / REJECTED_NAME}); raise "
                "--max-rejected and run again, which only assembles, or mend the sources and use --overwrite"
            )


def _select(plan: Plan, results: Sequence[UnitResult], output: Path) -> tuple[Selection, int]:
    """Finds duplicates and threshold; returns them and the number of duplicates."""
    lengths = [result.documents for result in results]
    first_documents = tuple(accumulate(lengths, initial=0))[:-1]
    selection = Selection(output, 0.0, first_documents, _first_rows(plan, results))
    duplicate = (
        find_duplicates(lengths, selection.table) if plan.settings.deduplicate else numpy.zeros(sum(lengths), bool)
    )
    with PartialFile(selection.duplicates_path) as partial:
        numpy.save(partial.file, duplicate)
        partial.commit()
    positions = (selection.table(unit)["position"] for unit in range(len(results)))
    threshold = choose_threshold(positions, plan.settings.heldout_fraction)
    return Selection(output, threshold, first_documents, selection.first_rows), int(duplicate.sum())


def _write_shards(
    plan: Plan, selection: Selection, results: Sequence[UnitResult], workers: int
) -> dict[str, list[ShardResult]]:
    output, unlimited = selection.output, 1 << 62
    max_tokens = plan.settings.shard_tokens or unlimited
    # One held-out shard, whatever its size: evaluation reads it in order.
    specs = plan_shards(plan, selection, HELDOUT, unlimited, unlimited)
    specs += plan_shards(plan, selection, TRAIN, max_tokens, _MAX_SHARD_DOCUMENTS)
    marker_path(output, TRAIN).parent.mkdir(exist_ok=True)
    missing = [spec for spec in specs if load_shard(output, spec.prefix) is None]
    total_bytes = sum(result.tokens for result in results) * numpy.dtype(plan.dtype).itemsize
    workers = worthwhile_workers(workers, total_bytes)
    with Progress("assembled", total_bytes) as progress:
        pending = Counter(part.unit for spec in specs for part in spec.parts)  # shards that take from a unit
        for spec in specs:
            if spec not in missing:
                _release(spec, pending, output)
        for spec, _ in run_tasks(ShardWriter, (selection,), missing, workers, progress.advance):
            _release(spec, pending, output)
    written: dict[str, list[ShardResult]] = {TRAIN: [], HELDOUT: []}
    for spec in specs:
        result = load_shard(output, spec.prefix)
        assert result is not None
        written[spec.split].append(result)
    return written


def _release(spec: ShardSpec, pending: Counter[int], output: Path) -> None:
    """Deletes the tokens of units that no shard needs any more."""
    for part in spec.parts:
        pending[part.unit] -= 1
        if not pending[part.unit]:
            part_path(output, part.unit, "tokens").unlink(missing_ok=True)


def _manifest(
    plan: Plan,
    results: Sequence[UnitResult],
    skipped: Counter[str],
    shards: dict[str, list[ShardResult]],
    records: dict[str, FileInfo],
    selection: Selection,
) -> Manifest:
    splits = {name: _split(name, written) for name, written in shards.items()}
    for written in shards.values():
        records |= {f"{one.shard.prefix}.rows": one.rows for one in written}
    path = selection.output / PLAN_NAME
    records[PLAN_NAME] = FileInfo(path.stat().st_size, sha256_of(path))
    counts = numpy.sum([load_counts(selection.output, one.shard.prefix) for one in shards[TRAIN]], axis=0)
    unknown = load_tokenizer(selection.output / TOKENIZER_NAME).unk_id()
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=plan.tokenizer,
        dtype=plan.dtype,
        splits=splits,
        sources=tuple(_source_infos(plan, results, selection)),
        skipped=dict(sorted(skipped.items())),
        settings=plan.settings,
        unigram_entropy=entropy_of(counts),
        fingerprint=fingerprint_of(plan.tokenizer, splits),
        records=records,
        unknown_tokens=int(counts[unknown]),
    )


def _split(name: str, written: Sequence[ShardResult]) -> Split:
    files = {file: info for one in written for file, info in one.files.items()}
    shards = tuple(one.shard for one in written)
    return Split(name, sum(one.documents for one in shards), sum(one.tokens for one in shards), files, shards)


def _source_infos(plan: Plan, results: Sequence[UnitResult], selection: Selection) -> Iterator[SourceInfo]:
    documents: Counter[int] = Counter()
    hashes: dict[str, str] = {}
    for number, result in enumerate(results):
        sources, counts = numpy.unique(selection.table(number)["source"], return_counts=True)
        documents.update(dict(zip(sources.tolist(), counts.tolist(), strict=True)))
        hashes |= result.sha256
    for place, source in enumerate(plan.sources):
        sha256 = hashes.get(str(place), "")
        yield SourceInfo(source.path, documents[place], source.bytes, sha256)


def entropy_of(counts: "numpy.ndarray") -> float:
    """Returns -sum p ln p, in nats, of the distribution with these counts (any shape, at least one above 0)."""
    probabilities = counts[counts > 0] / counts.sum()
    return math.fsum(-(probabilities * numpy.log(probabilities)))
