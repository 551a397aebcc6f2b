"""What besides text and tokenizer decides the content of the shards."""

from dataclasses import dataclass, field, fields

from tokenization.filters import Filters


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
