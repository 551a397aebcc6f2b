"""Which text is read: the settings that say so, and the list of files behind them, in an order of their names alone.

A dataset's name becomes the list of its files, pinned to one revision, with the `datasets` library, which knows which
files a configuration such as sample-100BT is made of. Streaming through its iterators would read a file from its
beginning to reach the middle; the files themselves, read by row groups, can be taken up anywhere.
"""

import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenization.command_line import TokenizationError
from tokenization.records import Skipped
from tokenization.remote import is_remote, open_source, with_retries
from tokenization.settings import Filters

STDLIB = "stdlib"
SUFFIXES: tuple[str, ...] = (
    *(".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"),
    *(".json.gz", ".json.zst"),  # compressed, they are lines of JSON nearly always
)
OTHER = "other_type"
STDLIB_SUFFIXES: tuple[str, ...] = (".py", ".txt", ".rst", ".md")
_SIZES_AT_ONCE = 16
_STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class SourceFile:
    """A file to read documents from."""

    path: str
    """Where it lies; on the hub an address that names the revision."""
    suffix: str
    """Decides how it is read; one of SUFFIXES or STDLIB_SUFFIXES, lower case."""
    bytes: int
    """Its size."""
    modified_ns: int = 0
    """When it was last written, in nanoseconds; 0 on the hub, where a revision never changes."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which text is read."""

    input: tuple[str, ...] = ()
    """Files or folders: .txt and .md (one document a file), .jsonl, .jsonl.gz, .jsonl.zst (.json.gz and .json.zst as
    well) and .parquet (a `text` field or column), or the word stdlib for the sources of the running Python's standard
    library."""
    dataset: str | None = None
    """Instead of --input: a dataset of the Hugging Face hub, streamed, such as HuggingFaceFW/fineweb-edu; or a folder
    laid out like one."""
    name: str | None = None
    """Configuration of the dataset, such as sample-100BT."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of the dataset; default: the newest, which is then kept."""
    min_score: float | None = None
    """Leave out documents whose `score` is lower."""
    languages: tuple[str, ...] = ()
    """Leave out documents whose `language` is none of these, such as: en de."""
    min_characters: int | None = None
    """Leave out shorter documents."""
    max_characters: int | None = None
    """Leave out longer documents."""

    def __post_init__(self) -> None:
        if self.input and self.dataset:
            raise TokenizationError(f"--input and --dataset {self.dataset}: both are given; give one of them")
        if not self.dataset and (self.name or self.revision):
            raise TokenizationError("--name and --revision belong to a --dataset, and none is given; add --dataset")

    @property
    def filters(self) -> Filters:
        """What a document must have."""
        return Filters(self.min_score, self.languages, self.min_characters, self.max_characters)

    @property
    def shown(self) -> str:
        """The sources as they were given, for messages."""
        return f"--dataset {self.named}" if self.dataset else f"--input {' '.join(self.input)}"

    @property
    def named(self) -> str:
        """The dataset and its configuration."""
        return " ".join(filter(None, (self.dataset, self.name)))

    def find(self, skipped: Skipped) -> list[SourceFile]:
        """Lists the sources.

        Raises:
            TokenizationError: Nothing readable is meant.
        """
        if self.dataset is None:
            return find_sources(self.input, skipped)
        return find_hub_sources(self)


def find_sources(inputs: Sequence[str], skipped: Skipped) -> list[SourceFile]:
    """Lists the files behind the `--input` arguments, arguments in their order, folders by sorted path.

    A folder is searched with everything below it, symbolic links included; names that start with a dot, and folders of
    shards, are left alone, files of other types are counted by their suffix. A file that is reached twice is read once
    and counted as `repeated_file`.

    Args:
        inputs: Paths of files or folders, or the word `stdlib` for the running Python's standard library.
        skipped: Receives files that cannot be opened and files reached twice.

    Returns:
        At least one source.

    Raises:
        TokenizationError: No input, no such path, a file of an unsupported type, a folder without a readable file.
    """
    if not inputs:
        raise TokenizationError(f"--input is empty; give files, folders or the word {STDLIB}, or a --dataset")
    sources: list[SourceFile] = []
    seen: set[str] = set()
    for argument in inputs:
        for source in _sources_of(argument, skipped):
            real = os.path.realpath(source.path)
            if real in seen:
                skipped.add("repeated_file", source.path)
                continue
            seen.add(real)
            sources.append(source)
    return sources


def suffix_of(name: str, suffixes: Iterable[str] = SUFFIXES) -> str | None:
    """Returns the supported suffix a file name ends with, None when there is none."""
    return next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)


def _sources_of(argument: str, skipped: Skipped) -> list[SourceFile]:
    if argument == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return _sources_below(root, STDLIB_SUFFIXES, _STDLIB_LEFT_OUT, skipped)
    path = Path(argument)
    if _spelled(argument) != argument:
        raise TokenizationError(f"--input {_spelled(argument)}: its name is not UTF-8; rename it")
    if path.is_dir():
        return _sources_below(path, SUFFIXES, frozenset(), skipped)
    if not path.exists():
        raise TokenizationError(f"--input {argument}: no such file or folder; check the path")
    suffix = suffix_of(path.name)
    if suffix is None:
        raise TokenizationError(f"--input {argument}: this type of file is not read; give {', '.join(SUFFIXES)}")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise TokenizationError(f"--input {argument}: cannot be read; check that it is a file and its rights")
    return [_local(path, suffix)]


def _spelled(name: str) -> str:
    """A name as it can be written down: bytes that are no UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _local(path: Path, suffix: str) -> SourceFile:
    status = path.stat()
    return SourceFile(os.path.abspath(path), suffix, status.st_size, status.st_mtime_ns)


def _sources_below(root: Path, suffixes: Iterable[str], left_out: frozenset[str], skipped: Skipped) -> list[SourceFile]:
    found: list[SourceFile] = []
    for path in sorted(_files_below(root, left_out, skipped), key=lambda path: path.relative_to(root).parts):
        suffix, name = suffix_of(path.name, suffixes), _spelled(str(path))
        if suffix is None:
            if not left_out:
                skipped.add(OTHER + "".join(Path(_spelled(path.name)).suffixes[-2:]).lower()[:20], name)
            continue
        if name != str(path):
            skipped.add("unreadable_file", name, detail="its name is not UTF-8; rename it")
        elif path.is_file() and os.access(path, os.R_OK):
            found.append(_local(path, suffix))
        else:
            skipped.add("unreadable_file", str(path), detail="no file, or no right to read it")
    if not found and is_shard_folder(root):
        raise TokenizationError(f"--input {root}: holds shards, not text; give what they were made of")
    if not found:
        raise TokenizationError(
            f"--input {root}: the folder holds no readable file of the types {', '.join(suffixes)}; give another folder"
        )
    return found


def is_shard_folder(folder: Path) -> bool:
    """Whether `encode` has begun to write there: its plan, lists and tokenizer are no text."""
    return (folder / "plan.json").is_file() and (folder / "tokenizer.model").is_file()


def _files_below(root: Path, left_out: frozenset[str], skipped: Skipped) -> Iterator[Path]:
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up would be walked for ever
            folders.clear()
            continue
        visited.add(real)
        if is_shard_folder(Path(folder)):
            skipped.add("shard_folder", folder)
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith("."))
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def find_hub_sources(wanted: SourceOptions) -> list[SourceFile]:
    """Lists the files of a split in the order of the dataset.

    Raises:
        TokenizationError: No such dataset, configuration or split, files of another format, or no network.
    """
    files = with_retries(wanted.shown, lambda: _data_files(wanted))
    if wanted.split not in files:
        raise TokenizationError(
            f"--split {wanted.split}: {wanted.named} has {', '.join(map(str, files))}; give one of them"
        )
    with ThreadPoolExecutor(_SIZES_AT_ONCE) as pool:
        return list(pool.map(lambda path: _source(str(path), wanted), files[wanted.split]))


def _data_files(wanted: SourceOptions) -> Any:
    import datasets

    try:
        builder = datasets.load_dataset_builder(wanted.dataset, wanted.name, revision=wanted.revision)
    except ValueError as fault:  # its sentence lists the configurations
        raise TokenizationError(f"{wanted.shown}: {str(fault).splitlines()[0]}; check --name") from fault
    return builder.config.data_files or {}


def _source(path: str, wanted: SourceOptions) -> SourceFile:
    suffix = suffix_of(path)
    if suffix is None:
        raise TokenizationError(
            f"{wanted.shown}: {path} is none of {', '.join(SUFFIXES)}; "
            "the hub keeps a Parquet copy of most datasets under --revision refs/convert/parquet"
        )
    with open_source(path) as file:
        size = file.seek(0, 2)
    return SourceFile(path, suffix, size, 0 if is_remote(path) else os.stat(path).st_mtime_ns)
