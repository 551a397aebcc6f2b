"""What samples are made from, read from the user's paths, and results that may be counted together."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.babilong import BabilongSettings
from evals.babilong.samples import Background, Count, SampleBuilder, SampleKey, book_sentences
from evals.babilong.stories import Prompt, StorySet, load_prompts, read_stories
from evals.command_line import EvaluationError
from evals.models import EvalModel
from evals.tokens import encoder


@dataclass(frozen=True)
class Identity:
    """What must be equal for results to be counted together."""

    checkpoint_sha256: str
    """Of the weights."""
    tokenizer_sha256: str
    """Of the tokenizer file."""
    max_new_tokens: int
    """Tokens of the answer."""
    background_sha256: str
    """Over the background's token ids."""
    length_tokenizer: str
    """"model", or the hash of a tokenizer.json."""
    stories: str = "bAbI"
    """Results of earlier versions may be of others, like their background."""
    background: str = "text"


@dataclass(frozen=True, kw_only=True)
class StoryResult(Identity):
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

    @property
    def name(self) -> SampleKey:
        """Which sample it is."""
        return SampleKey(self.task, self.length, self.sample, self.seed)

    def belongs_to(self, identity: Identity, stories_sha256: str | None) -> bool:
        """Whether it may be counted with this identity and these stories; None has none of the task."""
        return self.stories_sha256 == stories_sha256 and all(
            getattr(self, name) == value for name, value in vars(identity).items()
        )


@dataclass(frozen=True)
class Texts:
    """Everything the samples of a run are made from."""

    prompts: dict[str, Prompt]
    """By task."""
    stories: dict[str, StorySet]
    """By task."""
    background: Background
    """What the facts lie in."""
    identity: Identity
    """What results are counted by."""

    def builder(self, model: EvalModel, task: str) -> SampleBuilder:
        """Builds the samples of a task."""
        return SampleBuilder(model.tokenizer.processor, self.prompts[task], self.stories[task].stories, self.background)


def read_texts(model: EvalModel, settings: BabilongSettings) -> Texts:
    """Reads stories and background, and tokenises the latter.

    Raises:
        EvaluationError: A path has not what it should have.
    """
    stories = {task: read_stories(settings.babi, task) for task in settings.tasks}
    count, counted_with = _count(settings.length_tokenizer)
    background = Background(book_sentences(settings.pg19), encoder(model.tokenizer.processor, ". "), count)
    identity = Identity(
        model.checkpoint_sha256,
        model.tokenizer.sha256,
        settings.max_new_tokens,
        background.sha256,
        counted_with,
    )
    return Texts(load_prompts(), stories, background, identity)


def _count(file: Path | None) -> tuple[Count | None, str]:
    """Counts the tokens of sentences, and names the tokenizer that does."""
    if file is None:
        return None, "model"
    from tokenizers import Tokenizer

    try:
        data = file.read_bytes()
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises plain Exception for what it cannot read
        fault = " ".join(str(error).split())[:200]
        raise EvaluationError(
            f"--length-tokenizer {file}: cannot be read ({fault}); give a tokenizer.json, such as GPT-2's"
        ) from None

    def count(sentences: Sequence[str]) -> list[int]:
        encoded = tokenizer.encode_batch([" " + sentence for sentence in sentences], add_special_tokens=False)
        return [len(one.ids) for one in encoded]

    return count, hashlib.sha256(data).hexdigest()
