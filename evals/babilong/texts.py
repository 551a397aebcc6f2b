"""What samples are made from, read from the user's paths, and results that may be counted together."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.babilong import BabilongSettings
from evals.babilong.samples import Background, Count, StoryBuilder, StoryKey, book_sentences
from evals.babilong.stories import Prompt, StorySet, load_prompts, read_stories
from evals.command_line import EvaluationError
from evals.models import EvalModel
from evals.record_file import Identity, SampleResult
from evals.tokens import encoder


@dataclass(frozen=True, kw_only=True)
class StoryIdentity(Identity):
    """What results of a task must have in common."""

    background_sha256: str
    """Over the background's token ids."""
    length_tokenizer: str
    """"model", or the hash of a tokenizer.json."""
    stories_sha256: str
    """Of the task's file."""
    stories: str = "bAbI"
    """Results of earlier versions may be of others, like their background."""
    background: str = "text"


@dataclass(frozen=True, kw_only=True)
class StoryResult(StoryIdentity, SampleResult):
    """One sample's result."""

    question: str
    target: str
    correct: bool
    facts: int
    answer_tokens: int

    @property
    def name(self) -> StoryKey:
        """Which sample it is."""
        return StoryKey(self.task, self.length, self.sample, self.seed)


@dataclass(frozen=True)
class Texts:
    """Everything the samples of a run are made from."""

    prompts: dict[str, Prompt]
    """By task."""
    stories: dict[str, StorySet]
    """By task."""
    background: Background
    """What the facts lie in."""
    identities: dict[str, StoryIdentity]
    """What results are counted by, by task."""

    def builder(self, model: EvalModel, task: str) -> StoryBuilder:
        """Builds the samples of a task."""
        return StoryBuilder(model.tokenizer.processor, self.prompts[task], self.stories[task].stories, self.background)


def read_texts(model: EvalModel, settings: BabilongSettings) -> Texts:
    """Reads stories and background, and tokenises the latter.

    Raises:
        EvaluationError: A path has not what it should have.
    """
    stories = {task: read_stories(settings.babi, task) for task in settings.tasks}
    count, counted_with = _count(settings.length_tokenizer)
    background = Background(book_sentences(settings.pg19), encoder(model.tokenizer.processor, ". "), count)
    identities = {
        task: StoryIdentity(
            checkpoint_sha256=model.checkpoint_sha256,
            tokenizer_sha256=model.tokenizer.sha256,
            max_new_tokens=settings.max_new_tokens,
            background_sha256=background.sha256,
            length_tokenizer=counted_with,
            stories_sha256=found.sha256,
        )
        for task, found in stories.items()
    }
    return Texts(load_prompts(), stories, background, identities)


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
