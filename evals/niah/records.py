"""The raw results: one JSON line a sample, appended as batches finish, read back when a run goes on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import evals.record_file
from evals.niah import templates
from evals.niah.samples import SampleKey

FILL = "exact"  # to the token


@dataclass(frozen=True)
class Identity:
    """What must be equal for results to be counted together."""

    checkpoint_sha256: str
    """Of the weights."""
    tokenizer_sha256: str
    """Of the tokenizer file."""
    max_new_tokens: int
    """Tokens of the answer."""
    fill: str
    """How prompts fill their length: FILL; files of earlier versions may have another."""
    haystack: str
    """noise, synthetic, file, essay or needles."""
    haystack_sha256: str
    """Of the text."""
    words: str
    """Those that keys are made of: own, or SHA-256 of the user's lists."""


@dataclass(frozen=True, kw_only=True)
class NeedleResult(Identity):
    """One sample's result. Times and memory are those of the batch it ran in."""

    task: str
    length: int
    depth: float
    sample: int
    seed: int
    control: str
    needle_key: str
    """The key that was asked for, or several as the question names them."""
    value: str
    """The right answer: the value, or several."""
    prompt_tokens: int
    prompt_sha256: str
    """Of the prompt's ids as 32-bit little-endian numbers: equal for equal samples, whatever read them."""
    answer: str
    """Its text."""
    answer_ids: list[int]
    """Its tokens, end token left out."""
    substring: float
    first_value: bool
    wrong_value: bool
    value_loss: float
    """Cross-entropy of the value in nats, summed over its tokens, each fed as it stands."""
    value_tokens: int
    batch: int
    """Samples read side by side."""
    prefill_tokens: int
    """Tokens that the batch read, all rows together, and its part of the beginning that several batches share."""
    prefill_seconds: float
    """Of those tokens."""
    decode_ms_per_token: float
    seconds: float
    """All that the batch took."""
    peak_bytes: int
    state_bytes_per_sample: int
    words: str = templates.OWN_WORDS.name

    @property
    def name(self) -> SampleKey:
        """Which sample it is."""
        return SampleKey(self.task, self.length, self.depth, self.sample, self.seed, self.control)

    @property
    def identity(self) -> Identity:
        """What it belongs to."""
        return Identity(**{field.name: getattr(self, field.name) for field in fields(Identity)})


class RecordFile(evals.record_file.RecordFile[NeedleResult]):
    """The records of needles.

    Args:
        path: The file; it and its folder are made when missing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, NeedleResult)

    def of(self, identities: Mapping[str, Identity]) -> list[NeedleResult]:
        """The records that may be counted together: those of each task's identity, each sample once."""
        found = {record.name: record for record in self.records if record.identity == identities.get(record.task)}
        return list(found.values())

    def absorb(self, path: Path) -> None:
        """Takes over the records of another process's file and removes it; a crash in between leaves both."""
        with RecordFile(path) as other:
            self.append(other.records)
            path.unlink()
