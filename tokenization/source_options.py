"""The command-line settings that say which text is meant, shared by `encode` and `train`."""

from dataclasses import dataclass

from tokenization.command_line import TokenizationError
from tokenization.hub import HubDataset, find_hub_sources
from tokenization.settings import Filters
from tokenization.skipped import Skipped
from tokenization.sources import Source, find_sources


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
        return f"--dataset {self.dataset}" if self.dataset else f"--input {' '.join(self.input)}"

    def find(self, skipped: Skipped) -> list[Source]:
        """Lists the sources.

        Raises:
            TokenizationError: Nothing readable is meant.
        """
        if self.dataset is None:
            return find_sources(self.input, skipped)
        return find_hub_sources(HubDataset(self.dataset, self.name, self.split, self.revision))
