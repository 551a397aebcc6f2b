"""Which documents the user wants: by score, language and length."""

from dataclasses import dataclass
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
