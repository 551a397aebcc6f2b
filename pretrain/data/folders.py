"""A run's folders: its own, which one process holds, and those of its shards, checked and identified together."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pretrain.config.run_config import RunConfig
from pretrain.data.batches import NumberedSamples, Samples
from pretrain.data.blend import Blend
from titans_mcore.weights import file_sha256
from tokenization.io import try_lock, write_file_atomically
from tokenization.manifest import TOKENIZER_NAME, Manifest
from tokenization.tokenizer import TokenizerInfo


def lock_run_folder(run_dir: Path) -> int:
    """Makes the folder and holds its lock until this process ends, however it ends.

    Returns:
        The descriptor of the lock file, which stays open.

    Raises:
        ValueError: Another process holds it: two runs would write over each other's checkpoints.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if not try_lock(descriptor):
        os.close(descriptor)
        raise ValueError(f"another process is training in {run_dir}; wait for it or use another --run-dir")
    return descriptor


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


def keep_tokenizer(data: RunData, run_dir: Path) -> None:
    """Puts the data's tokenizer into RUN/tokenizer/, where evaluation and export look for it.

    Raises:
        ValueError: Another tokenizer is there.
    """
    kept, folder = run_dir / "tokenizer" / TOKENIZER_NAME, data.folders[0].path
    if not kept.exists():
        write_file_atomically(kept, (folder / TOKENIZER_NAME).read_bytes())
    elif file_sha256(kept) != data.tokenizer.sha256:
        raise ValueError(f"{kept} is not the tokenizer of {folder}; use another --run-dir, or the data it belongs to")


def open_samples(config: RunConfig, data: RunData, run_dir: Path) -> tuple[NumberedSamples, NumberedSamples | None]:
    """Training samples, and held-out ones unless none are asked for; both in the shares of the folders."""
    start_token = data.tokenizer.bos_id if config.data.reset_documents else None

    def of_folder(prefixes: list[str], strands: int = 0) -> Samples:
        return Samples(
            prefixes,
            run_dir / "index",
            vocab_size=config.model.vocab_size,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            start_token=start_token,
            strands=strands,
        )

    def blended(prefixes: list[list[str]], strands: int = 0) -> NumberedSamples:
        parts = [of_folder(one, strands) for one in prefixes]
        return Blend(parts, [folder.share for folder in data.folders]) if len(parts) > 1 else parts[0]

    strands = config.train.global_batch if config.data.carry_state else 0
    samples = blended([folder.manifest.train_prefixes(folder.path) for folder in data.folders], strands)
    if not config.evaluate.heldout_sequences:
        return samples, None
    return samples, blended([[folder.manifest.heldout_prefix(folder.path)] for folder in data.folders])
