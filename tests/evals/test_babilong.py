"""BABILong: its files, its metric, samples from token ids, and scores of models whose answers are known."""

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from torch import Tensor

from evals.babilong import BabilongSettings, texts
from evals.babilong.run import evaluate
from evals.babilong.samples import (
    PROMPT_ROOM,
    Background,
    StoryBuilder,
    StoryKey,
    book_sentences,
)
from evals.babilong.stories import Story, correct, load_prompts, parse_stories, read_stories
from evals.command_line import EvaluationError
from evals.models import EvalModel, load_model
from evals.tokens import encoder

from .babi import TASKS, prose, simulate
from .planted import plant

PLACES = load_prompts()["qa1"].labels


class Answerer:
    """Reads prompts from their tokens; when a question ends, it writes what a rule says, and then goes on."""

    def __init__(self, processor: Any, reply: Callable[[str], str]) -> None:
        self.processor, self.reply = processor, reply
        self.rows_read: list[int] = []

    def stream(self, tokens: Tensor, states: Any, last: int | None = None) -> tuple[Tensor, Any]:
        rows = [{"read": [], "answer": None} for _ in tokens] if states is None else states
        self.rows_read.append(len(rows))
        logits = torch.zeros(len(rows), 1, self.processor.vocab_size())
        for row, new, scores in zip(rows, tokens.tolist(), logits[:, 0], strict=True):
            row["read"] += new
            scores[self._next(row)] = 1.0
        return logits, rows

    def _next(self, row: dict[str, Any]) -> int:
        if row["answer"] is None:
            if not re.search(r"</context>\n\nQuestion: .*\?$", self.processor.decode(row["read"][-150:])):
                return 5
            written = "\nAnswer: " + self.reply(self.processor.decode(row["read"]))
            row["answer"] = self.processor.encode("?" + written)[len(self.processor.encode("?")) :]
        return row["answer"].pop(0) if row["answer"] else self.processor.eos_id()


def answerer(tokenizer: Path, reply: Callable[[str], str]) -> EvalModel:
    model = plant(tokenizer, str)
    return EvalModel(
        Answerer(model.tokenizer.processor, reply), model.config, model.tokenizer, "planted", "0" * 64, 512
    )


def solve(prompt: str) -> str:
    """The answer of the one story whose facts stand in the prompt in their order."""
    context, question = re.search(r"<context>\n(.*)\n</context>\n\nQuestion: (.*)$", prompt, re.S).groups()  # type: ignore[union-attr]
    for task in TASKS:
        for story in parse_stories(simulate(task, 100)):
            ordered = ".*".join(map(re.escape, story.facts))
            told = len(re.findall(rf"\b(?:{'|'.join(PEOPLE)}) \w+ .*?\.|The \w+ is \w+ of", context))
            if story.question == question and len(story.facts) == told and re.search(ordered, context, re.S):
                return story.target
    raise AssertionError(f"no story for {question}")


PEOPLE = ("Mary", "John", "Daniel", "Sandra", "Bill", "Fred", "Jeff")


@pytest.fixture(scope="module")
def processor(tokenizer: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))


@pytest.fixture(scope="module")
def background(processor: Any) -> Background:
    return Background(list(prose()), encoder(processor, ". "), None)


Evaluation = Callable[..., dict[str, Any]]


@pytest.fixture
def run(babi: Path, books: Path) -> Evaluation:
    def run(model: EvalModel, output: Path, **settings: Any) -> dict[str, Any]:
        chosen = {"lengths": (0, 700), "samples": 4, "piece": 300, "max_new_tokens": 40, "pg19": books, **settings}
        return evaluate(model, BabilongSettings(Path("planted"), output, babi, **chosen))

    return run


@pytest.mark.parametrize(
    ("answer", "target", "question", "labels", "expected"),
    [
        ("The most recent location of Mary is kitchen.", "kitchen", "Where is Mary?", PLACES, True),
        ("KITCHEN", "kitchen", "Where is Mary?", PLACES, True),
        ("kitchen or garden", "kitchen", "Where is Mary?", PLACES, False),
        ("kitchen. It was the garden before.", "kitchen", "Where is Mary?", PLACES, True),
        ("It is in the. kitchen", "kitchen", "Where is Mary?", PLACES, False),
        ("kitchen <example> garden", "kitchen", "Where is Mary?", PLACES, True),
        ("Before the kitchen it was in the garden", "garden", "Where was it before the kitchen?", PLACES, True),
        ("the kitchen", "kitchen", "Where was it before the kitchen?", PLACES, False),
        ("nowhere", "kitchen", "Where is Mary?", PLACES, False),
        ("milk, apple", "apple,milk", "What is Daniel carrying?", load_prompts()["qa8"].labels, True),
        ("milk", "apple,milk", "What is Daniel carrying?", load_prompts()["qa8"].labels, False),
        ("apple,milk,football", "apple,milk", "What is Daniel carrying?", load_prompts()["qa8"].labels, False),
        ("s,e", "s,e", "How do you go?", load_prompts()["qa19"].labels, True),
        ("e,s", "s,e", "How do you go?", load_prompts()["qa19"].labels, False),
    ],
)
def test_an_answer_is_right_when_it_names_the_target_and_nothing_else(
    answer: str, target: str, question: str, labels: tuple[str, ...], expected: bool
) -> None:
    assert correct(answer, target, question, labels) is expected


def test_a_question_has_the_facts_before_it_and_no_other_question() -> None:
    lines = ["1 Mary went home.", "2 Where is Mary? \thome\t1", "3 John left.", "4 Who left? \tJohn\t3", "1 It rains."]
    text = "\n".join([*lines, "2 What does it do?\trains\t1"])
    assert list(parse_stories(text)) == [
        Story(("Mary went home.",), "Where is Mary?", "home"),
        Story(("Mary went home.", "John left."), "Who left?", "John"),
        Story(("It rains.",), "What does it do?", "rains"),
    ]
    for broken, fault in (("1 a\nb", "line 2 does not begin with a number"), ("1 a?\t", "line 1 is a question")):
        with pytest.raises(ValueError, match=fault):
            list(parse_stories(broken))


def test_all_twenty_tasks_are_read_and_their_test_split_alone(tmp_path: Path) -> None:
    for number, (task, prompt) in enumerate(load_prompts().items(), 1):
        for split, target in (("test", prompt.labels[-1]), ("train", "never")):
            lines = f"1 A fact of {task}.\n2 What? \t{target}\t1\n"
            (tmp_path / f"{task}_some-name_{split}.txt").write_text(lines)
        stories = read_stories(tmp_path, f"qa{number}").stories
        assert [story.target for story in stories] == [prompt.labels[-1]]
    (tmp_path / "qa3_some-name_test.txt").rename(tmp_path / "qa3_test.txt")  # as in bAbI's en-valid
    assert len(read_stories(tmp_path, "qa3").stories) == 1
    (tmp_path / "qa1_some-name_test.txt").unlink()
    with pytest.raises(EvaluationError, match=r"0 files qa1_\*_test\.txt; give the folder en-10k of bAbI"):
        read_stories(tmp_path, "qa1")
    for text, fault in (("Mary went home.\n", "line 1 does not begin with a number"), ("", "it asks nothing")):
        (tmp_path / "qa2_some-name_test.txt").write_text(text)
        with pytest.raises(EvaluationError, match=rf"not in bAbI's format \({fault}\)"):
            read_stories(tmp_path, "qa2")


@pytest.mark.parametrize("task", TASKS)
def test_made_up_questions_have_one_answer_that_the_metric_accepts(task: str) -> None:
    stories = list(parse_stories(simulate(task, 500)))
    assert len(stories) == 500
    for story in stories:
        assert correct(story.target, story.target, story.question, load_prompts()[task].labels), story


def test_made_up_answers_follow_from_the_facts() -> None:
    for story in parse_stories(simulate("qa1", 300)):
        person = story.question[len("Where is ") : -1]
        last = next(fact for fact in reversed(story.facts) if fact.startswith(person))
        assert last.endswith(f" the {story.target}.")
    for story in parse_stories(simulate("qa2", 300)):
        assert where(story.facts, story.question[len("Where is the ") : -1])[-1] == story.target, story
    for story in parse_stories(simulate("qa3", 300)):
        thing, place = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", story.question).groups()  # type: ignore[union-attr]
        assert where(story.facts, thing)[-2:] == [story.target, place], story


def where(facts: tuple[str, ...], thing: str) -> list[str]:
    """Places of a thing by the facts alone, told apart from the stories' own book-keeping."""
    at: dict[str, str] = {}
    carrier, places = None, []
    for fact in facts:
        person, last = fact.split()[0], fact.rstrip(".").split()[-1]
        if re.search(r"(moved|went|journeyed|travelled|back) to ", fact):
            at[person] = last
            places += [last] if carrier == person else []
        elif f"the {thing} there" in fact:
            carrier = person
            places += [] if places and places[-1] == at[person] else [at[person]]
        elif f"the {thing}." in fact:
            carrier = None
    return places


@pytest.mark.parametrize("length", [0, 700, 1_500])
def test_a_sample_is_the_official_prompt_around_exactly_the_length(
    processor: Any, background: Background, length: int
) -> None:
    stories = list(parse_stories(simulate("qa2", 40)))
    sample = StoryBuilder(processor, load_prompts()["qa2"], stories, background).build(StoryKey("qa2", length, 3, 1))
    ids = np.concatenate(list(sample.pieces(64))).tolist()
    assert ids.count(processor.bos_id()) == 1
    text = processor.decode(ids)
    prompt = load_prompts()["qa2"]
    opening = f"{prompt.instruction}\n\n{prompt.examples}\n\n{prompt.post_prompt}\n\n<context>\n"
    ending = f"\n</context>\n\nQuestion: {sample.story.question}"
    assert text.startswith(opening)
    assert text.endswith(ending)
    context = text[len(opening) : -len(ending)]
    assert re.search(".*".join(map(re.escape, sample.story.facts)), context, re.S)
    if length:
        around = len(processor.encode(opening)) + len(processor.encode("." + ending)) - len(processor.encode("."))
        inside = len(ids) - 1 - around
        assert abs(inside - (length - PROMPT_ROOM)) <= 1  # the first word lost its blank
    else:
        assert context == " ".join(sample.story.facts)
        assert ids == [processor.bos_id(), *processor.encode(text)]


def test_pieces_of_any_size_are_one_prompt_and_names_decide_it(processor: Any, background: Background) -> None:
    builder = StoryBuilder(processor, load_prompts()["qa1"], list(parse_stories(simulate("qa1", 40))), background)

    def ids(sample: int, seed: int, size: int) -> list[int]:
        return np.concatenate(list(builder.build(StoryKey("qa1", 900, sample, seed)).pieces(size))).tolist()

    assert ids(0, 0, 1) == ids(0, 0, 7) == ids(0, 0, 10_000)
    assert ids(0, 0, 100) != ids(1, 0, 100)
    assert ids(0, 0, 100) != ids(0, 1, 100)
    drawn = [builder.build(StoryKey("qa1", 900, sample, 0)).story for sample in range(40)]
    assert len(set(drawn)) == len(set(parse_stories(simulate("qa1", 40)))), "a question was drawn twice"
    with pytest.raises(EvaluationError, match=r"--samples 41: qa1 has 40 questions that fit --lengths 900"):
        builder.build(StoryKey("qa1", 900, 40, 0))
    with pytest.raises(EvaluationError, match="qa1 has 0 questions that fit --lengths 200"):
        builder.build(StoryKey("qa1", 200, 0, 0))


def test_a_sample_of_millions_of_tokens_stays_on_disk(processor: Any, background: Background) -> None:
    builder = StoryBuilder(processor, load_prompts()["qa1"], list(parse_stories(simulate("qa1", 40))), background)
    tracemalloc.start()
    sample = builder.build(StoryKey("qa1", 3_000_000, 0, 0))
    assert sum(map(len, sample.pieces(4_096))) == sample.tokens
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 <= sample.tokens - 3_000_000 < 1_000
    assert peak < 1_000_000, "12 MB of ids, and they were held"


def test_lengths_are_counted_by_the_tokenizer_that_is_asked_for(
    tokenizer: Path, tmp_path: Path, babi: Path, books: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    settings = BabilongSettings(
        Path(), tmp_path, babi, books, tasks=("qa1",), length_tokenizer=tmp_path / "tokenizer.json"
    )
    made = texts.read_texts(model := answerer(tokenizer, str), settings)
    sample = made.builder(model, "qa1").build(StoryKey("qa1", 1_300, 0, 0))
    text = model.tokenizer.processor.decode(np.concatenate(list(sample.pieces(99))).tolist())
    context = text.split("<context>\n")[-1].split("\n</context>")[0]
    assert abs(len(context.split()) - 1_000) <= 2
    assert len(made.identities["qa1"].length_tokenizer) == 64
    with pytest.raises(EvaluationError, match=r"--length-tokenizer .*nowhere: cannot be read"):
        texts.read_texts(model, BabilongSettings(Path(), tmp_path, babi, books, length_tokenizer=tmp_path / "nowhere"))


def test_books_are_split_at_sentences_and_only_the_test_split_is_read(tmp_path: Path) -> None:
    for split, text in (("train", "Never this."), ("test", 'He came. "Who is it?" she asked.\nMr. B.\n\nNobody!')):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.txt").write_text(text)
    assert list(book_sentences(tmp_path)) == ["He came.", '"Who is it?" she asked.', "Mr.", "B.", "Nobody!"]
    assert list(book_sentences(tmp_path / "train" / "1.txt")) == ["Never this."]
    with pytest.raises(EvaluationError, match=r"no \.txt file there"):
        list(book_sentences(tmp_path / "none"))


def test_oracle_reaches_100_percent(run: Evaluation, tokenizer: Path, tmp_path: Path) -> None:
    model = answerer(tokenizer, solve)
    report = run(model, tmp_path)
    assert [row["mean_qa1_to_qa5"] for row in report["by_length"]] == [1.0, 1.0]
    assert {cell["n"] for cell in report["cells"]} == {4}
    assert "Lengths in tokens of: model." in (tmp_path / "babilong.md").read_text()
    assert max(model.network.rows_read) > 1, "nothing was read side by side"  # type: ignore[attr-defined]
    assert (tmp_path / "babilong.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("reply", [lambda _: " ".join([*PLACES, *PEOPLE]), lambda _: "nothing of all that"])
def test_listing_and_silent_models_reach_0_percent(
    run: Evaluation, tokenizer: Path, tmp_path: Path, reply: Any
) -> None:
    report = run(answerer(tokenizer, reply), tmp_path, lengths=(0,))
    assert report["by_length"][0]["mean_qa1_to_qa5"] == 0.0


def test_stopped_and_gone_on_equals_never_stopped(run: Evaluation, tokenizer: Path, tmp_path: Path) -> None:
    whole = run(answerer(tokenizer, solve), tmp_path / "whole", tasks=("qa1", "qa4"), batch=3)
    run(answerer(tokenizer, solve), tmp_path / "parts", tasks=("qa1",), samples=2, lengths=(700,))
    torn = tmp_path / "parts" / "babilong.jsonl"
    with torn.open("a") as file:
        file.write('{"task": "qa1", "len')
    again = answerer(tokenizer, solve)
    parts = run(again, tmp_path / "parts", tasks=("qa1", "qa4"), batch=1)
    assert parts["cells"] == whole["cells"]
    assert [row["mean_qa1_to_qa5"] for row in parts["by_length"]] == [None, None]
    lines = [json.loads(line) for line in torn.read_text().splitlines()]
    assert len({(line["task"], line["length"], line["sample"]) for line in lines}) == len(lines) == 16
    read = len(again.network.rows_read)  # type: ignore[attr-defined]
    run(again, tmp_path / "parts", tasks=("qa1", "qa4"))
    assert len(again.network.rows_read) == read, "finished samples ran again"  # type: ignore[attr-defined]


def test_results_of_other_texts_are_left_out(run: Evaluation, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was a long and stony way that led to the old mill by the river. " * 30)
    run(answerer(tokenizer, solve), tmp_path, tasks=("qa1",), lengths=(0,))
    wrong = run(answerer(tokenizer, lambda _: ""), tmp_path, tasks=("qa1",), lengths=(0,), pg19=tmp_path / "book.txt")
    assert [cell["accuracy"] for cell in wrong["cells"]] == [0.0]
    assert wrong["background"] == "text"


def test_a_real_model_answers_the_same_in_any_batch_and_piece(run: Evaluation, mac_run: Path, tmp_path: Path) -> None:
    model = load_model(mac_run)
    answers = []
    for folder, batch, piece in (("a", 1, 64), ("b", 4, 999)):
        run(model, tmp_path / folder, tasks=("qa1",), lengths=(500,), batch=batch, piece=piece, max_new_tokens=6)
        lines = [json.loads(line) for line in (tmp_path / folder / "babilong.jsonl").read_text().splitlines()]
        answers.append({line["sample"]: line["answer"] for line in lines})
    assert answers[0] == answers[1]


def test_faults_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="--tasks qa21; give some of bAbI's qa1 to qa20"):
        BabilongSettings(Path(), tmp_path, tmp_path, tmp_path, tasks=("qa1", "qa21"))
    with pytest.raises(EvaluationError, match=r"--lengths \(-1,\)"):
        BabilongSettings(Path(), tmp_path, tmp_path, tmp_path, lengths=(-1,))
