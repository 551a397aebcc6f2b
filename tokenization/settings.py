"""What besides text and tokenizer decides the content of the shards; which documents are wanted is a part of it."""

from dataclasses import dataclass, field, fields
from typing import Any

from tokenization.command_line import TokenizationError


@dataclass(frozen=True)
class Filters:
    """What a document must have; None and () ask for nothing."""

    min_score: float | None = None
    """Least number in `score`."""
    languages: tuple[str, ...] = ()
    """Accepted values of `language`."""
    min_characters: int | None = None
    """Least length."""
    max_characters: int | None = None
    """Greatest length."""

    def __post_init__(self) -> None:
        least, most = self.min_characters, self.max_characters
        if least is not None and most is not None and least > most:
            raise TokenizationError(
                f"--min-characters is {least:,} and --max-characters {most:,}; no document is both, give a range"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields beside `text` that have to be read."""
        wanted = (("score", self.min_score is not None), ("language", bool(self.languages)))
        return tuple(name for name, needed in wanted if needed)

    def verdict(self, text: str, fields: dict[str, Any]) -> str | None:
        """Returns the kind under which a document is left out, None when it is wanted."""
        if self.min_score is not None:
            score = fields.get("score")
            if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
                return "missing_score"
            if score < self.min_score:
                return "filtered_score"
        if self.languages:
            language = fields.get("language")
            if not isinstance(language, str):
                return "missing_language"
            if language not in self.languages:
                return "filtered_language"
        if self.min_characters is not None and len(text) < self.min_characters:
            return "filtered_short"
        if self.max_characters is not None and len(text) > self.max_characters:
            return "filtered_long"
        return None


@dataclass(frozen=True)
class EncodingSettings:
    """Saved with the plan and the manifest; a restart with others is refused."""

    seed: int
    """Of the split into train and held-out documents."""
    heldout_fraction: float
    """Share of the documents kept apart."""
    shard_tokens: int = 0
    """Tokens after which the next train shard begins; 0 for one shard."""
    deduplicate: bool = False
    """Whether a text that came before is left out."""
    filters: Filters = field(default_factory=Filters)
    """What a document must have."""
    max_document_bytes: int = 0
    """Largest document, UTF-8 bytes; 0 where it is not known."""
    unit_bytes: int = 0
    """Text in a unit of work, about; 0 where it is not known."""
    dataset: str | None = None
    """On the hub."""
    name: str | None = None
    """Its configuration."""
    split: str | None = None
    """Its split."""
    revision: str | None = None
    """As it was asked for."""

    def difference(self, other: "EncodingSettings") -> str | None:
        """Names the first setting that another object has otherwise, None when there is none."""
        for setting in fields(self):
            mine, others = getattr(self, setting.name), getattr(other, setting.name)
            if isinstance(mine, Filters):
                for one in fields(mine):
                    if getattr(mine, one.name) != getattr(others, one.name):
                        return f"made with {one.name} {getattr(mine, one.name)}, not {getattr(others, one.name)}"
            elif mine != others:
                return f"made with {setting.name} {mine}, not {others}"
        return None
