"""The folders that a run reads, checked and identified together, and their samples in fixed shares.

Megatron's BlendedDataset draws from datasets that were built for the length of the run: their shuffle changes with it,
and so does sample i. Here only its rule for who comes next is taken, and each folder goes through its own epochs:
sample i is sample k of folder f, where f and k are a function of the shares and i alone.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.datasets import helpers

from pretrain.config.run_config import RunConfig
from pretrain.data.batches import DocumentPart, MicroBatch, Samples
from titans_mcore.io import bytes_text, sha256_of, write_file_atomically
from tokenization.manifest import Manifest
from tokenization.progress import Progress
from tokenization.tokenizer import TokenizerInfo

_VERIFIED_FILE = "verified.json"
_READERS = 8  # threads: one alone hashes slower than most disks read
_BLOCK = 1 << 20
"""After so many samples the pattern of folders repeats: shares are met to about a millionth, in bounded memory."""


class Folder(NamedTuple):
    """A folder of shards.

    Attributes:
        path: The folder.
        share: Share of the samples that come from it; all shares make 1.
        manifest: Of the folder.
    """

    path: Path
    share: float
    manifest: Manifest


@dataclass(frozen=True)
class RunData:
    """The folders of a run; one tokenizer made all of them."""

    folders: tuple[Folder, ...]
    """In the order of the settings."""

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer of every folder."""
        return self.folders[0].manifest.tokenizer

    @property
    def fingerprint(self) -> str:
        """Identifies everything that decides the samples but seed and length; a folder alone has its manifest's."""
        if len(self.folders) == 1:
            return self.folders[0].manifest.fingerprint
        lines = [f"{folder.manifest.fingerprint} {folder.share!r}" for folder in self.folders]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_data(config: RunConfig) -> RunData:
    """The run's folders, checked against their manifests, each other and the model.

    Raises:
        ValueError: There are no shards, they are not those of their manifest, folders have different tokenizers, or the
            model has another vocabulary.
    """
    if not config.data.folders:
        raise ValueError("data.path is missing: name the folder of shards with --data.path DIR")
    data = RunData(tuple(Folder(Path(p), s, Manifest.load(Path(p))) for p, s in config.data.folders.items()))
    for folder in data.folders:
        folder.manifest.check_quick(folder.path)
        if folder.manifest.tokenizer.sha256 != data.tokenizer.sha256:
            raise ValueError(
                f"data.blend mixes tokenizers: that of {folder.path} is not that of {data.folders[0].path}; "
                "encode both with one tokenizer.model"
            )
    if data.tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size} but the tokenizer of {data.folders[0].path} has "
            f"{data.tokenizer.vocab_size} pieces; leave model.vocab_size out to take it from the data"
        )
    return data


def check_shards(config: RunConfig, data: RunData, run_dir: Path) -> str:
    """Reads the shards unless data.verify is false, or this run has read them as they are now: RUN/verified.json.

    Returns:
        A sentence that says what of them was checked.

    Raises:
        ValueError: One is not what its manifest lists.
    """
    if not config.data.verify:
        return "shards: sizes are those of the manifest, contents were not compared (data.verify is false)"
    wanted = {
        str(folder.path.resolve() / name): info.sha256
        for folder in data.folders
        for name, info in folder.manifest.token_files().items()
    }
    file = run_dir / _VERIFIED_FILE
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    sizes = {path: os.stat(path).st_size for path in wanted}
    now = {path: [sizes[path], os.stat(path).st_mtime_ns, wanted[path]] for path in wanted}
    unread = [path for path in wanted if known.get(path) != now[path]]
    if not unread:
        return "shards: sizes and times are as when this run compared their checksums"
    began, size = time.monotonic(), sum(sizes[path] for path in unread)
    with ThreadPoolExecutor(_READERS) as threads, Progress("of the shards verified", size) as progress:
        for path, found in zip(unread, threads.map(sha256_of, unread), strict=True):
            if found != wanted[path]:
                raise ValueError(
                    f"{path}: not the file that the manifest lists (SHA-256 differs); copy it again, or encode again"
                )
            progress.advance(sizes[path], 0)
    write_file_atomically(file, json.dumps(now, indent=1).encode())
    return (
        f"shards: checksums of {len(unread)} files, {bytes_text(size)}, are those of the manifest "
        f"({time.monotonic() - began:.0f} s)"
    )


def keep_tokenizer(data: RunData, run_dir: Path) -> None:
    """Puts the data's tokenizer into RUN/tokenizer/, where evaluation and export look for it.

    Raises:
        ValueError: Another tokenizer is there.
    """
    kept, folder = run_dir / "tokenizer" / data.tokenizer.file, data.folders[0].path
    if not kept.exists():
        write_file_atomically(kept, (folder / data.tokenizer.file).read_bytes())
    elif sha256_of(kept) != data.tokenizer.sha256:
        raise ValueError(f"{kept} is not the tokenizer of {folder}; use another --run-dir, or the data it belongs to")


def open_samples(config: RunConfig, data: RunData, run_dir: Path) -> "tuple[NumberedSamples, NumberedSamples | None]":
    """Training samples, and held-out ones unless none are asked for; both in the shares of the folders."""

    def of_folder(prefixes: list[str], strands: int = 0) -> Samples:
        return Samples(
            prefixes,
            run_dir / "index",
            vocab_size=config.model.vocab_size,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            documents_apart=config.data.reset_documents,
            strands=strands,
        )

    def blended(prefixes: list[list[str]], strands: int = 0) -> "NumberedSamples":
        parts = [of_folder(one, strands) for one in prefixes]
        return Blend(parts, [folder.share for folder in data.folders]) if len(parts) > 1 else parts[0]

    strands = config.train.global_batch if config.data.carry_state else 0
    samples = blended([folder.manifest.train_prefixes(folder.path) for folder in data.folders], strands)
    if not config.evaluate.heldout_sequences:
        return samples, None
    return samples, blended([[folder.manifest.heldout_prefix(folder.path)] for folder in data.folders])


class Blend:
    """The numbered samples of several folders, in the proportion of their shares at any point."""

    def __init__(self, parts: Sequence[Samples], shares: Sequence[float]) -> None:
        """Nothing is read.

        Args:
            parts: Samples of each folder.
            shares: Share of the samples that come from each; at least config.SMALLEST_SHARE, in sum 1.
        """
        self._parts = parts
        self._part = np.empty(_BLOCK, np.int16)
        self._place = np.empty(_BLOCK, np.int64)
        helpers.build_blending_indices(self._part, self._place, np.array(shares), len(parts), _BLOCK, False)
        self._in_block = np.bincount(self._part, minlength=len(parts))
        self.per_epoch = min(self._first_number_of(part, samples.per_epoch) for part, samples in enumerate(parts))
        """Samples before a folder begins again."""

    def prepare(self, first: int, last: int) -> None:
        """Opens what the samples `first` to `last` need; collective, see Samples.prepare."""
        found = [self._locate(index) for index in range(first, last + 1)]
        for part, samples in enumerate(self._parts):
            if places := [place for of, place in found if of == part]:
                samples.prepare(places[0], places[-1])

    def micro_batch(self, indices: Iterable[int]) -> MicroBatch:
        """The samples of these numbers, which `prepare` has opened."""
        rows = [self._parts[part].micro_batch([place]) for part, place in map(self._locate, indices)]
        tokens, labels = torch.cat([row.tokens for row in rows]), torch.cat([row.labels for row in rows])
        if all(row.starts is None for row in rows):
            return MicroBatch(tokens, labels, None)
        none = torch.zeros_like(tokens[:1], dtype=torch.bool)
        return MicroBatch(tokens, labels, torch.cat([none if row.starts is None else row.starts for row in rows]))

    def documents(self, index: int) -> list[DocumentPart]:
        """The parts of documents that a sample is made of, in order; `prepare` has opened it."""
        part, place = self._locate(index)
        return self._parts[part].documents(place)

    def _locate(self, index: int) -> tuple[int, int]:
        """The folder of a sample, and its number there."""
        block, inside = divmod(index, _BLOCK)
        part = int(self._part[inside])
        return part, block * int(self._in_block[part]) + int(self._place[inside])

    def _first_number_of(self, part: int, place: int) -> int:
        """The inverse of `_locate`."""
        block, rest = divmod(place, int(self._in_block[part]))
        return block * _BLOCK + int(np.flatnonzero(self._part == part)[rest])


NumberedSamples = Samples | Blend
"""What batches are made of."""
