"""From a dataset's name to the list of its files, pinned to one revision, with the `datasets` library.

`datasets` knows which files a configuration such as sample-100BT is made of. Streaming through its iterators would
read a file from its beginning to reach the middle; the files themselves, read by row groups, can be taken up anywhere.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tokenization.command_line import TokenizationError
from tokenization.remote import is_remote, open_source, with_retries
from tokenization.sources import SUFFIXES, Source, suffix_of

_SIZES_AT_ONCE = 16


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub, or a folder laid out like one."""

    dataset: str
    """Such as HuggingFaceFW/fineweb-edu."""
    name: str | None = None
    """Configuration, such as sample-100BT."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Branch, tag or commit; None for the newest."""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.dataset, self.name)))


def find_hub_sources(wanted: HubDataset) -> list[Source]:
    """Lists the files of a split in the order of the dataset.

    Raises:
        TokenizationError: No such dataset, configuration or split, files of another format, or no network.
    """
    files = with_retries(f"--dataset {wanted}", lambda: _data_files(wanted))
    if wanted.split not in files:
        raise TokenizationError(f"--split {wanted.split}: {wanted} has {', '.join(map(str, files))}; give one of them")
    with ThreadPoolExecutor(_SIZES_AT_ONCE) as pool:
        return list(pool.map(lambda path: _source(str(path), wanted), files[wanted.split]))


def _data_files(wanted: HubDataset) -> Any:
    import datasets

    try:
        builder = datasets.load_dataset_builder(wanted.dataset, wanted.name, revision=wanted.revision)
    except ValueError as fault:  # its sentence lists the configurations
        raise TokenizationError(f"--dataset {wanted}: {str(fault).splitlines()[0]}; check --name") from fault
    return builder.config.data_files or {}


def _source(path: str, wanted: HubDataset) -> Source:
    suffix = suffix_of(path)
    if suffix is None:
        raise TokenizationError(
            f"--dataset {wanted}: {path} is none of {', '.join(SUFFIXES)}; "
            "the hub keeps a Parquet copy of most datasets under --revision refs/convert/parquet"
        )
    with open_source(path) as file:
        size = file.seek(0, 2)
    return Source(path, suffix, size, 0 if is_remote(path) else os.stat(path).st_mtime_ns)
