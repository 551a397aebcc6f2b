"""The raw results of needles, a JSON line a sample in niah.jsonl."""

from dataclasses import dataclass

from evals.niah import templates
from evals.niah.samples import SampleKey
from evals.record_file import Identity, SampleResult

FILL = "exact"  # to the token


@dataclass(frozen=True, kw_only=True)
class NeedleIdentity(Identity):
    """What results of a task must have in common."""

    fill: str
    """How prompts fill their length: FILL; files of earlier versions may have another."""
    haystack: str
    """noise, synthetic, file, essay or needles."""
    haystack_sha256: str
    """Of the text."""
    words: str
    """Those that keys are made of: own, or SHA-256 of the user's lists."""


@dataclass(frozen=True, kw_only=True)
class NeedleResult(NeedleIdentity, SampleResult):
    """One sample's result."""

    depth: float
    control: str
    needle_key: str
    """The key that was asked for, or several as the question names them."""
    value: str
    """The right answer: the value, or several."""
    prompt_sha256: str
    """Of the prompt's ids as 32-bit little-endian numbers: equal for equal samples, whatever read them."""
    answer_ids: list[int]
    """Its tokens, end token left out."""
    substring: float
    first_value: bool
    wrong_value: bool
    value_loss: float
    """Cross-entropy of the value in nats, summed over its tokens, each fed as it stands."""
    value_tokens: int
    prefill_tokens: int
    """Tokens that the batch read, all rows together, and its part of the beginning that several batches share."""
    seconds: float
    """All that the batch took."""
    words: str = templates.OWN_WORDS.name

    @property
    def name(self) -> SampleKey:
        """Which sample it is."""
        return SampleKey(self.task, self.length, self.depth, self.sample, self.seed, self.control)
