"""BABILong's training documents: the evaluation's words around stories that it never asks."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.babilong.samples import Background, StoryBuilder, StoryKey
from evals.babilong.stories import correct, load_prompts, parse_stories
from evals.babilong.training_data import TrainingDataSettings, documents, main
from evals.command_line import EvaluationError
from evals.models import load_tokenizer
from evals.tokens import encoder
from tests.commands import status_of

from .babi import TASKS, prose, simulate

FILE = Path("babilong.jsonl")


def texts(babi: Path, **settings: Any) -> list[str]:
    made = documents(TrainingDataSettings(FILE, babi, **{"documents": 40, **settings}))
    return [document.text for document in made]


@pytest.mark.parametrize("task", TASKS)
def test_document_is_the_evaluations_prompt_with_an_answer_that_its_metric_takes(
    babi: Path, tokenizer: Path, task: str
) -> None:
    processor = load_tokenizer(tokenizer).processor
    background = Background(list(prose())[:50], encoder(processor, ". "), None)
    stories = list(parse_stories(simulate(task, 500, 1)))
    for text in texts(babi, tasks=(task,), documents=5):
        prompt, answer = text.rsplit("\nAnswer: ", 1)
        key = StoryKey(task, 0, 0, 0)
        built = [
            (story, StoryBuilder(processor, load_prompts()[task], [story], background).build(key))
            for story in stories
            if prompt.endswith(" ".join(story.facts) + "\n</context>\n\nQuestion: " + story.question)
        ]
        assert any(
            processor.decode(np.concatenate(list(sample.pieces(64))).tolist()) == prompt
            and correct(answer, story.target, story.question, load_prompts()[task].labels)
            for story, sample in built
        )


def test_only_the_train_split_is_told(babi: Path) -> None:
    told = {name: parse_stories(simulate("qa2", n, seed)) for name, n, seed in (("train", 500, 1), ("test", 100, 0))}
    facts = {name: {" ".join(story.facts) for story in stories} for name, stories in told.items()}
    contexts = {text.split("<context>\n")[-1].split("\n</context>")[0] for text in texts(babi, tasks=("qa2",))}
    assert contexts <= facts["train"]
    assert not contexts & facts["test"]


def test_tokens_are_filled_exactly_and_facts_keep_their_order_among_the_sentences(
    babi: Path, books: Path, tokenizer: Path
) -> None:
    encode = load_tokenizer(tokenizer).processor.encode
    stories = list(parse_stories(simulate("qa1", 500, 1)))
    sized = {"tokens": 3_000, "tokenizer": tokenizer, "text": books}
    made = texts(babi, **sized)
    assert {len(encode(text)) + 2 for text in made} == {3_000}
    sentences = set(prose())
    for text in made:
        context, question = re.search(r"<context>\n(.*)\n</context>\n\nQuestion: (.*)\nAnswer:", text, re.S).groups()  # type: ignore[union-attr]
        facts = tuple(re.findall(r"(?:Mary|John|Daniel|Sandra) \w+ (?:back )?to the \w+\.", context))
        assert any((story.facts, story.question) == (facts, question) for story in stories)
        assert sum(sentence in sentences for sentence in re.findall(r"[A-Z][^.]*\.", context)) > 5
    assert texts(babi, **sized) == made
    assert not set(texts(babi, **sized, seed=1)) & set(made)


def test_more_questions_tell_whole_stories_on_behind_each_answer(babi: Path, books: Path, tokenizer: Path) -> None:
    for more in ({}, {"tokens": 5_000, "tokenizer": tokenizer, "text": books}):
        for text in texts(babi, questions=7, documents=10, **more):
            opening = load_prompts()["qa1"].opening
            assert text.startswith(opening)
            turns = text[len(opening) :].split("\n\n<context>\n")
            assert len(turns) == 7
            place: dict[str, str] = {}
            for turn in turns:
                place |= dict(re.findall(r"(Mary|John|Daniel|Sandra) \w+ (?:back )?to the (\w+)\.", turn))
                person = re.search(r"\n</context>\n\nQuestion: Where is (\w+)\?\nAnswer: ", turn)[1]  # type: ignore[index]
                assert turn.endswith(f"Answer: The most recent location of {person} is {place[person]}.")


def test_repeated_facts_are_all_of_a_question_in_their_order(babi: Path) -> None:
    once = {" ".join(story.facts) for story in parse_stories(simulate("qa1", 500, 1))}
    times = set()
    for text in texts(babi, repeats=3):
        context = text.split("<context>\n")[-1].split("\n</context>")[0]
        found = [k for k in (1, 2, 3) if " ".join([context[: len(context) // k]] * k) == context]
        times |= {k for k in found if context[: len(context) // k] in once}
    assert times == {1, 2, 3}


def test_text_of_ones_own_lies_between_the_facts_and_only_its_train_split(
    babi: Path, tokenizer: Path, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.txt").write_text(f"These are words of the {split} split that lie around. " * 3)
    for text in texts(babi, text=tmp_path, tokens=3_000, tokenizer=tokenizer, documents=3):
        assert "words of the train split" in text
        assert "words of the test split" not in text


def test_other_words_are_the_texts_in_any_order_with_one_of_a_fact(babi: Path, books: Path, tokenizer: Path) -> None:
    known = {word.lower() for sentence in prose() for word in sentence.rstrip(".").split()}
    sized = {"tokens": 3_000, "tokenizer": tokenizer, "text": books}
    for text in texts(babi, **sized, other_words=1.0, documents=5):
        assert len(load_tokenizer(tokenizer).processor.encode(text)) + 2 == 3_000
        context = re.search(r"<context>\n(.*)\n</context>", text, re.S)[1]  # type: ignore[index]
        facts = re.findall(r"(?:Mary|John|Daniel|Sandra) \w+ (?:back )?to the \w+\.", context)
        told = {word.lower() for fact in facts for word in fact.rstrip(".").split()}
        *others, _cut = [sentence for sentence in re.findall(r"[^ .][^.]*\.", context) if sentence not in facts]
        assert len(others) > 20
        for sentence in others:
            words = [word.lower() for word in sentence.rstrip(".").split()]
            assert 8 <= len(words) <= 30
            assert {*words} - known <= told
    assert len({other in text for other in prose() for text in texts(babi, **sized, other_words=0.5)}) == 2


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"tasks": ("qa1", "qa21")}, "--tasks qa21; give some of bAbI's qa1 to qa20"),
        ({"documents": 0}, "--documents is 0"),
        ({"questions": 0}, "--questions is 0"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"tokens": 500}, "--tokens is 500, --tokenizer None and --text None; documents of one length need all three"),
        ({"text": FILE}, r"--tokens is 0, --tokenizer None and --text babilong.jsonl"),
        ({"other_words": 0.5}, "--other-words are a --text's; give that"),
        ({"other_words": 1.5}, "--other-words is 1.5; it is a share, from 0 to 1"),
        ({"output": Path("x.txt")}, r"--output x.txt: .* end it with .jsonl"),
        ({"babi": Path("nowhere")}, r"--babi nowhere: 0 files qa1_\*_train.txt; .* whose train split alone is used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fault_is_one_sentence_about_the_setting(wrong: dict[str, Any], fault: str) -> None:
    with pytest.raises(EvaluationError, match=fault) as found:
        next(documents(TrainingDataSettings(**{"output": FILE, "babi": Path("nowhere"), **wrong})))
    assert "\n" not in str(found.value)


def test_what_cannot_be_filled_is_said(babi: Path, books: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="--tokens 300: too short for the prompt and the facts of qa1"):
        texts(babi, tokens=300, tokenizer=tokenizer, text=books)
    with pytest.raises(EvaluationError, match=r"nowhere: no \.txt file there"):
        texts(babi, tokens=3_000, tokenizer=tokenizer, text=tmp_path / "nowhere")
    (tmp_path / "short.txt").write_text("No. So.")
    with pytest.raises(EvaluationError, match="has no sentence of 10 tokens or more"):
        texts(babi, tokens=3_000, tokenizer=tokenizer, text=tmp_path / "short.txt")


def test_command_writes_json_lines(babi: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "babilong.jsonl"
    assert status_of(main, "--output", file, "--babi", babi, "--documents", 3, "--tasks", "qa4", "qa5") == 0
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == texts(
        babi, documents=3, tasks=("qa4", "qa5")
    )
