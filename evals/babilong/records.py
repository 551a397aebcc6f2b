"""One sample's result, and what results must share to be counted together."""

from dataclasses import dataclass

from evals.babilong.samples import SampleKey


@dataclass(frozen=True)
class Identity:
    """What must be equal for results to be counted together."""

    checkpoint_sha256: str
    """Of the weights."""
    tokenizer_sha256: str
    """Of the tokenizer file."""
    max_new_tokens: int
    """Tokens of the answer."""
    stories: str
    """"bAbI" or "simulated"."""
    background: str
    """"text" or "simulated"."""
    background_sha256: str
    """Over the background's token ids."""
    length_tokenizer: str
    """"model", or the hash of a tokenizer.json."""


@dataclass(frozen=True)
class Record:
    """One sample's result. Times and memory are those of the batch it ran in."""

    task: str
    length: int
    sample: int
    seed: int
    question: str
    target: str
    answer: str
    correct: bool
    facts: int
    prompt_tokens: int
    answer_tokens: int
    batch: int
    prefill_seconds: float
    decode_ms_per_token: float
    peak_bytes: int
    state_bytes_per_sample: int
    stories_sha256: str
    checkpoint_sha256: str
    tokenizer_sha256: str
    max_new_tokens: int
    stories: str
    background: str
    background_sha256: str
    length_tokenizer: str

    @property
    def name(self) -> SampleKey:
        """Which sample it is."""
        return SampleKey(self.task, self.length, self.sample, self.seed)

    def belongs_to(self, identity: Identity, stories_sha256: str | None) -> bool:
        """Whether it may be counted with this identity and these stories; None has none of the task."""
        return self.stories_sha256 == stories_sha256 and all(
            getattr(self, name) == value for name, value in vars(identity).items()
        )
