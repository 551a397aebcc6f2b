"""What samples are made from: stories and background, read from the user's paths or simulated, with their names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.babilong.background import Background, Count, book_sentences, simulated_sentences
from evals.babilong.records import Identity
from evals.babilong.samples import SampleBuilder
from evals.babilong.settings import BabilongSettings
from evals.babilong.simulator import simulate
from evals.babilong.stories import StorySet, parse_stories, read_stories
from evals.babilong.tasks import Prompt, load_prompts
from evals.command_line import EvaluationError
from evals.models import EvalModel
from evals.tokens import encoder

SIMULATED_QUESTIONS = 1_000  # as many as bAbI's test split has


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
    babi, pg19 = settings.babi, settings.pg19
    stories = {task: read_stories(babi, task) if babi else _simulated(task) for task in settings.tasks}
    count, counted_with = _count(settings.length_tokenizer)
    sentences = book_sentences(pg19) if pg19 else simulated_sentences()
    background = Background(sentences, encoder(model.tokenizer.processor, ". "), count)
    identity = Identity(
        model.checkpoint_sha256,
        model.tokenizer.sha256,
        settings.max_new_tokens,
        "bAbI" if babi else "simulated",
        "text" if pg19 else "simulated",
        background.sha256,
        counted_with,
    )
    return Texts(load_prompts(), stories, background, identity)


def _simulated(task: str) -> StorySet:
    text = simulate(task, SIMULATED_QUESTIONS)
    return StorySet(tuple(parse_stories(text)), hashlib.sha256(text.encode()).hexdigest())


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
