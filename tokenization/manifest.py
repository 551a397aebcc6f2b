"""What a folder of shards holds and how to tell whether it still does: `manifest.json`.

data/manifest.json            this file, written last
data/tokenizer.model          the tokenizer, byte for byte; tokenizer.json where it is not of sentencepiece
data/train.bin .idx           Megatron indexed dataset, one document a text; train-00000.bin, ... when there are several
data/heldout.bin .idx         the documents kept apart for evaluation
data/train.rows heldout.rows  where each document came from: an ORIGIN for each
data/rejected.jsonl           bad data, one line each
data/plan.json                the units of work
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from titans_mcore.io import from_json, sha256_of
from tokenization.command_line import TokenizationError
from tokenization.settings import EncodingSettings
from tokenization.tokenizer import TokenizerInfo

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
TRAIN, HELDOUT = "train", "heldout"
ORIGIN = [("source", "<u4"), ("row", "<i8")]
"""NumPy fields of a document in a .rows file: place of its source in the manifest, and row there."""


class ManifestError(TokenizationError, ValueError):
    """A manifest that cannot be read, or files that are not those it describes; the sentence names the file."""


@dataclass(frozen=True)
class FileInfo:
    """A file as it was written."""

    bytes: int
    """Its size."""
    sha256: str
    """Of its content, hexadecimal."""


@dataclass(frozen=True)
class Shard:
    """One Megatron dataset of a split."""

    prefix: str
    """Its name in the folder, without .bin and .idx."""
    documents: int
    """Texts."""
    tokens: int
    """Start and end tokens included."""


@dataclass(frozen=True)
class Split:
    """The documents of one use."""

    prefix: str
    """Name of the split, and of its Megatron dataset where that is the only one."""
    documents: int
    """Texts."""
    tokens: int
    """Start and end tokens included."""
    files: dict[str, FileInfo]
    """The .bin and .idx of all its datasets, by name."""
    shards: tuple[Shard, ...] = ()
    """Its datasets in order; none listed means the one called `prefix`."""

    @property
    def datasets(self) -> tuple[Shard, ...]:
        """Its datasets in order."""
        return self.shards or (Shard(self.prefix, self.documents, self.tokens),)


@dataclass(frozen=True)
class SourceInfo:
    """A file that was read."""

    path: str
    """As it was given or found."""
    documents: int
    """Texts taken from it."""
    bytes: int
    """Its size."""
    sha256: str
    """Of its content, hexadecimal; empty for a file on the hub, whose path names its revision."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    format_version: int
    """FORMAT_VERSION."""
    tokenizer: TokenizerInfo
    """The tokenizer the tokens belong to."""
    dtype: str
    """NumPy name of the token type: uint16 or int32."""
    splits: dict[str, Split]
    """`train` and `heldout`."""
    sources: tuple[SourceInfo, ...]
    """In reading order."""
    skipped: dict[str, int]
    """What was left out, by kind."""
    settings: EncodingSettings
    """What else decides the shards."""
    unigram_entropy: float
    """Entropy of the train split's token frequencies, nats a token: the loss of a model that knows them alone."""
    fingerprint: str
    """Identifies token files and tokenizer together; a training run saves it and compares at resume."""
    records: dict[str, FileInfo] = field(default_factory=dict)
    """The other files by name: .rows, rejected.jsonl, plan.json. Training does not need them."""
    unknown_tokens: int = 0
    """Train tokens that are the tokenizer's unknown piece."""
    adopted: bool = False
    """Whether `tokenization.adopt` made it: sources are datasets of Megatron's, train .bin files are links to them and
    hold the held-out documents, too, which their .idx passes over, and documents have the ends that they came with."""

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Reads the manifest of a folder.

        Raises:
            ManifestError: Missing, damaged, of another version, or with a fingerprint that is not its own.
        """
        path = Path(folder, MANIFEST_NAME)
        try:
            text = path.read_bytes()
            record = json.loads(text)
        except (FileNotFoundError, NotADirectoryError):
            raise ManifestError(
                f"{path}: missing; write shards with `python -m tokenization.encode`, or take Megatron's .bin and .idx "
                "with `python -m tokenization.adopt`"
            ) from None
        except ValueError as fault:
            raise ManifestError(f"{path}: damaged, no JSON ({fault}); write the shards again") from fault
        version = record.get("format_version") if isinstance(record, dict) else None
        if version != FORMAT_VERSION:
            raise ManifestError(f"{path}: format version {version}, this code reads {FORMAT_VERSION}; encode again")
        try:
            manifest = from_json(cls, text, "manifest")
        except ValueError as fault:
            raise ManifestError(f"{path}: damaged, {fault}; write the shards again") from fault
        if set(manifest.splits) != {TRAIN, HELDOUT}:
            raise ManifestError(f"{path}: damaged, splits are {sorted(manifest.splits)}; write the shards again")
        if manifest.fingerprint != fingerprint_of(manifest.tokenizer, manifest.splits):
            raise ManifestError(f"{path}: its fingerprint is not that of its file hashes; write the shards again")
        return manifest

    def to_json(self) -> str:
        """Returns the text of `manifest.json`."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def check_quick(self, folder: str | Path) -> None:
        """Compares the sizes of the token files and the tokenizer's hash: milliseconds, for the start of a run.

        Raises:
            ManifestError: Naming the first file that is missing or differs.
        """
        damages = (size_damage(Path(folder, name), info) for name, info in self.token_files().items())
        if damage := next(filter(None, damages), self.tokenizer_damage(folder)):
            raise ManifestError(damage)

    def tokenizer_damage(self, folder: str | Path) -> str:
        """What is wrong with a folder's tokenizer; empty when it is the one of these shards."""
        path = Path(folder, self.tokenizer.file)
        if not path.is_file():
            return f"{path}: missing; copy the tokenizer of these shards back, or encode again"
        whole = sha256_of(path) == self.tokenizer.sha256
        return "" if whole else f"{path}: not the tokenizer of these shards (SHA-256 differs); put that one back"

    def train_prefixes(self, folder: str | Path) -> list[str]:
        """Returns the paths of the train split's datasets in order, without suffix, as Megatron-core takes them."""
        return [str(Path(folder, shard.prefix)) for shard in self.splits[TRAIN].datasets]

    def heldout_prefix(self, folder: str | Path) -> str:
        """Returns the path of the held-out dataset without suffix, as Megatron-core takes it."""
        return str(Path(folder, self.splits[HELDOUT].prefix))

    def token_files(self) -> dict[str, FileInfo]:
        """Returns every .bin and .idx by name."""
        return {name: info for split in self.splits.values() for name, info in split.files.items()}


def size_damage(path: Path, info: FileInfo) -> str:
    """What is wrong with a file that a manifest lists, its content aside; empty when nothing is."""
    if not path.is_file():
        return f"{path}: missing, though the manifest lists it; encode again"
    if (size := path.stat().st_size) != info.bytes:
        return f"{path}: {size:,} bytes where the manifest says {info.bytes:,}; encode again"
    return ""


def fingerprint_of(tokenizer: TokenizerInfo, splits: dict[str, Split]) -> str:
    """Returns the SHA-256 over the tokenizer's hash and those of the token files, by split and name."""
    digest = hashlib.sha256(tokenizer.sha256.encode())
    for split_name, split in sorted(splits.items()):
        for name, info in sorted(split.files.items()):
            digest.update(f"\n{split_name} {name} {info.sha256}".encode())
    return digest.hexdigest()
