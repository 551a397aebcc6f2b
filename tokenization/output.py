"""Who an output folder belongs to: the same work goes on or is done already, any other is refused by name."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from titans_mcore.io import exclusive, sha256_of
from tokenization.command_line import TokenizationError
from tokenization.manifest import HELDOUT, MANIFEST_NAME, REJECTED_NAME, TRAIN, Manifest
from tokenization.plan import PLAN_NAME, PLAN_VERSION, Plan, plan_units
from tokenization.records import Rejected, Skipped
from tokenization.settings import EncodingSettings
from tokenization.sources import SourceFile, SourceOptions
from tokenization.tokenizer import TOKENIZER_JSON, TOKENIZER_NAME, TokenizerInfo

# What --overwrite may delete; `cache` is where Megatron-core keeps its sample indices beside the shards.
_OWN_NAMES = {MANIFEST_NAME, TOKENIZER_NAME, TOKENIZER_JSON, PLAN_NAME, REJECTED_NAME, "work", "cache"}
_FAILED = "work/failed"
_SHARD_FILE = re.compile(rf"({TRAIN}|{HELDOUT})(-\d+)?\.(bin|idx|rows)")


def claim_output(
    options: SourceOptions,
    content: EncodingSettings,
    output: Path,
    tokenizer: TokenizerInfo,
    dtype: str,
    *,
    replace: bool,
) -> tuple[Plan, Manifest | None]:
    """Plans the work, or finds the plan that was made for it.

    Args:
        options: Which text.
        content: What else decides the shards.
        output: The folder; made when missing.
        tokenizer: Of the shards.
        dtype: Of a token.
        replace: Whether shards of anything else are deleted.

    Returns:
        The plan, and the manifest when the work is done.

    Raises:
        TokenizationError: Something else is in the folder, or nothing readable is meant.
    """
    if output.exists() and not output.is_dir():
        raise TokenizationError(f"--output {output}: is a file; give a folder")
    rejected: list[Rejected] = []
    skipped = Skipped(list_rejected=rejected.append)
    # On the hub the plan names the revision, so that a restart needs no network to know what is meant.
    sources = None if options.dataset else options.find(skipped)
    if names_in(output):
        plan, manifest, difference = _existing(output, content, sources, tokenizer, dtype)
        if plan is not None and difference is None:
            return plan, manifest
        make_room(output, difference or "without a plan", replace)
    if sources is None:
        sources = options.find(skipped)
    units = plan_units(sources, content.unit_bytes, skipped)
    counts = dict(sorted(skipped.counts.items()))
    plan = Plan(PLAN_VERSION, content, tokenizer, dtype, tuple(sources), units, counts, tuple(rejected))
    saved = plan.save_once(output)
    if saved != plan:  # another host was first; on the hub its revision counts
        difference = saved.difference(content, tokenizer, dtype)
        if difference is None and options.dataset is None:
            difference = saved.source_difference(sources)
        if difference is not None:
            raise TokenizationError(f"--output {output}: begun by another host and {difference}; give all the same")
    return saved, None


def mark_failed(output: Path) -> None:
    """Notes that what was begun in a folder cannot be ended: other text may take its place without being asked.

    The same command still goes on with what is done, for another --max-rejected.
    """
    (output / _FAILED).touch()


def names_in(output: Path) -> set[str]:
    """What lies in the folder; hidden files are what a killed process was writing."""
    return {path.name for path in output.iterdir() if not path.name.startswith(".")} if output.exists() else set()


def _existing(
    output: Path, content: EncodingSettings, sources: Sequence[SourceFile] | None, tokenizer: TokenizerInfo, dtype: str
) -> tuple[Plan | None, Manifest | None, str | None]:
    """Returns the plan and the manifest that are there, and why they are not what is asked for."""
    try:
        plan = Plan.load(output)
        manifest = Manifest.load(output) if (output / MANIFEST_NAME).exists() else None
        if manifest is not None:
            manifest.check_quick(output)
    except TokenizationError as fault:
        return None, None, f"not whole ({fault})"
    if plan is None:
        return None, None, None
    difference = plan.difference(content, tokenizer, dtype)
    if difference is None and sources is not None:
        difference = plan.source_difference(sources)
        if difference is not None and manifest is not None and _same_content(manifest, sources):
            difference = None
    return plan, manifest, difference


def _same_content(manifest: Manifest, sources: Sequence[SourceFile]) -> bool:
    """Whether files that were moved or touched hold what the shards were made from."""
    if len(manifest.sources) != len(sources):
        return False
    pairs = list(zip(manifest.sources, sources, strict=True))
    if any(old.bytes != new.bytes or not old.path.lower().endswith(new.suffix) for old, new in pairs):
        return False
    return all(old.sha256 == sha256_of(new.path) for old, new in pairs)


def make_room(output: Path, difference: str, replace: bool) -> None:
    """Deletes what is in the way if that is wanted, the files that make it look whole first."""
    if foreign := sorted(
        name for name in names_in(output) if name not in _OWN_NAMES and not _SHARD_FILE.fullmatch(name)
    ):
        raise TokenizationError(f"--output {output}: holds {foreign[0]}, which is not of a shard folder; give another")
    if not (replace or (output / _FAILED).exists()):
        raise TokenizationError(
            f"--output {output}: holds other shards, {difference}; give another folder, or --overwrite to replace them"
        )
    for lock in output.glob("work/**/*.lock"):
        with exclusive(lock, f"--output {output}: another process works there; stop it before you --overwrite"):
            pass
    for name in (MANIFEST_NAME, PLAN_NAME):
        (output / name).unlink(missing_ok=True)
    for path in output.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
