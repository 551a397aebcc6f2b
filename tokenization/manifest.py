"""What a folder of shards holds and how to tell whether it still does: `manifest.json`.

data/manifest.json      this file, written last
data/tokenizer.model    the tokenizer, byte for byte
data/train.bin .idx     Megatron indexed dataset, one document a text
data/heldout.bin .idx   the documents kept apart for evaluation
"""

import hashlib
import json
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from tokenization.errors import TokenizationError
from tokenization.sources import sha256_of
from tokenization.tokenizer import TokenizerInfo

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
TRAIN, HELDOUT = "train", "heldout"


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
class Split:
    """The documents of one use."""

    prefix: str
    """Name of the Megatron dataset in the folder, without .bin and .idx."""
    documents: int
    """Texts."""
    tokens: int
    """Start and end tokens included."""
    files: dict[str, FileInfo]
    """By name."""


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
    """Of its content, hexadecimal."""


@dataclass(frozen=True)
class EncodingSettings:
    """What besides text and tokenizer decides the shards."""

    seed: int
    """Of the split into train and held-out documents."""
    heldout_fraction: float
    """Share of the documents kept apart."""


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
    """The remaining settings."""
    unigram_entropy: float
    """Entropy of the train split's token frequencies, nats a token: the loss of a model that knows them alone."""
    fingerprint: str
    """Identifies token files and tokenizer together; a training run saves it and compares at resume."""

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Reads the manifest of a folder.

        Raises:
            ManifestError: Missing, damaged, of another version, or with a fingerprint that is not its own.
        """
        path = Path(folder, MANIFEST_NAME)
        try:
            record = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise ManifestError(f"{path}: missing; write shards with `python -m tokenization.encode`") from None
        except ValueError as fault:
            raise ManifestError(f"{path}: damaged, no JSON ({fault}); write the shards again") from fault
        version = record.get("format_version") if isinstance(record, dict) else None
        if version != FORMAT_VERSION:
            raise ManifestError(f"{path}: format version {version}, this code reads {FORMAT_VERSION}; encode again")
        try:
            manifest: Manifest = _from_json(cls, record, "manifest")
        except TypeError as fault:
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
        for name, info in self._token_files().items():
            path = Path(folder, name)
            if not path.is_file():
                raise ManifestError(f"{path}: missing, though the manifest lists it; encode again")
            if path.stat().st_size != info.bytes:
                raise ManifestError(
                    f"{path}: {path.stat().st_size:,} bytes where the manifest says {info.bytes:,}; encode again"
                )
        path = Path(folder, TOKENIZER_NAME)
        if not path.is_file():
            raise ManifestError(f"{path}: missing; copy the tokenizer of these shards back, or encode again")
        if sha256_of(path) != self.tokenizer.sha256:
            raise ManifestError(f"{path}: not the tokenizer of these shards (SHA-256 differs); put that one back")

    def check_full(self, folder: str | Path) -> None:
        """Compares the SHA-256 of every file as well.

        Raises:
            ManifestError: Naming the first file that is missing or differs.
        """
        self.check_quick(folder)
        for name, info in self._token_files().items():
            if sha256_of(Path(folder, name)) != info.sha256:
                raise ManifestError(f"{Path(folder, name)}: damaged, its SHA-256 is not the manifest's; encode again")

    def train_prefix(self, folder: str | Path) -> str:
        """Returns the path of the train split without suffix, as Megatron-core takes it."""
        return str(Path(folder, self.splits[TRAIN].prefix))

    def heldout_prefix(self, folder: str | Path) -> str:
        """Returns the path of the held-out split without suffix, as Megatron-core takes it."""
        return str(Path(folder, self.splits[HELDOUT].prefix))

    def _token_files(self) -> dict[str, FileInfo]:
        return {name: info for split in self.splits.values() for name, info in split.files.items()}


def fingerprint_of(tokenizer: TokenizerInfo, splits: dict[str, Split]) -> str:
    """Returns the SHA-256 over the tokenizer's hash and those of the token files, by split and name."""
    digest = hashlib.sha256(tokenizer.sha256.encode())
    for split_name, split in sorted(splits.items()):
        for name, info in sorted(split.files.items()):
            digest.update(f"\n{split_name} {name} {info.sha256}".encode())
    return digest.hexdigest()


def _from_json(kind: Any, value: Any, where: str) -> Any:
    """Builds `kind` from JSON and raises TypeError, saying where, for anything of another type or name."""
    if isinstance(kind, type) and is_dataclass(kind):
        names, hints = {field.name for field in fields(kind)}, typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != names:
            raise TypeError(f"{where} does not have exactly the fields {', '.join(sorted(names))}")
        return kind(**{name: _from_json(hints[name], value[name], f"{where}.{name}") for name in names})
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, dict):
        return {name: _from_json(parameters[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_from_json(parameters[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is None and type(value) is kind:
        return value
    raise TypeError(f"{where} is {value!r:.60}, not of the type {getattr(kind, '__name__', kind)}")
