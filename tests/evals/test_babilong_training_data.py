"""BABILong's training documents: the evaluation's words around stories that it never asks."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.babilong.samples import Background, SampleBuilder, SampleKey, simulated_sentences
from evals.babilong.stories import SIMULATED_TASKS, correct, load_prompts, parse_stories, simulate
from evals.babilong.training_data import TrainingDataSettings, documents, main
from evals.command_line import EvaluationError
from evals.models import load_tokenizer
from evals.tokens import encoder

FILE = Path("babilong.jsonl")


def texts(**settings: Any) -> list[str]:
    return [document.text for document in documents(TrainingDataSettings(FILE, **{"documents": 40, **settings}))]


@pytest.fixture
def babi(tmp_path: Path) -> Path:
    for split, task, seed in (("train", "qa1", 7), ("train", "qa2", 7), ("test", "qa1", 8), ("test", "qa2", 8)):
        (tmp_path / f"{task}_name_{split}.txt").write_text(simulate(task, 200, seed))
    return tmp_path


@pytest.mark.parametrize("task", SIMULATED_TASKS)
def test_document_is_the_evaluations_prompt_with_an_answer_that_its_metric_takes(tokenizer: Path, task: str) -> None:
    processor = load_tokenizer(tokenizer).processor
    background = Background(list(simulated_sentences())[:50], encoder(processor, ". "), None)
    stories = list(parse_stories(simulate(task, 10_000, 1)))
    for text in texts(tasks=(task,), documents=5):
        prompt, answer = text.rsplit("\nAnswer: ", 1)
        key = SampleKey(task, 0, 0, 0)
        built = [
            (story, SampleBuilder(processor, load_prompts()[task], [story], background).build(key))
            for story in stories
            if prompt.endswith(" ".join(story.facts) + "\n</context>\n\nQuestion: " + story.question)
        ]
        assert any(
            processor.decode(np.concatenate(list(sample.pieces(64))).tolist()) == prompt
            and correct(answer, story.target, story.question, load_prompts()[task].labels)
            for story, sample in built
        )


def test_only_the_train_split_is_told(babi: Path) -> None:
    told = {name: list(parse_stories(simulate("qa2", 200, seed))) for name, seed in (("train", 7), ("test", 8))}
    facts = {name: {" ".join(story.facts) for story in stories} for name, stories in told.items()}
    contexts = {text.split("<context>\n")[-1].split("\n</context>")[0] for text in texts(babi=babi, tasks=("qa2",))}
    assert contexts <= facts["train"]
    assert not contexts & facts["test"]


def test_simulated_stories_are_none_of_the_evaluations() -> None:
    evaluated = {" ".join(story.facts) for story in parse_stories(simulate("qa2", 1_000))}
    for seed in (0, 1):
        for text in texts(tasks=("qa2",), seed=seed):
            assert text.split("<context>\n")[-1].split("\n</context>")[0] not in evaluated


def test_tokens_are_filled_exactly_and_facts_keep_their_order_among_the_sentences(tokenizer: Path) -> None:
    encode = load_tokenizer(tokenizer).processor.encode
    stories = list(parse_stories(simulate("qa1", 10_000, 1)))
    made = texts(tokens=3_000, tokenizer=tokenizer)
    assert {len(encode(text)) + 2 for text in made} == {3_000}
    prose = set(simulated_sentences())
    for text in made:
        context, question = re.search(r"<context>\n(.*)\n</context>\n\nQuestion: (.*)\nAnswer:", text, re.S).groups()  # type: ignore[union-attr]
        facts = tuple(re.findall(r"(?:Mary|John|Daniel|Sandra) \w+ (?:back )?to the \w+\.", context))
        assert any((story.facts, story.question) == (facts, question) for story in stories)
        assert sum(sentence in prose for sentence in re.findall(r"[A-Z][^.]*\.", context)) > 5
    assert texts(tokens=3_000, tokenizer=tokenizer) == made
    assert not set(texts(tokens=3_000, tokenizer=tokenizer, seed=1)) & set(made)


def test_more_questions_tell_whole_stories_on_behind_each_answer(babi: Path, tokenizer: Path) -> None:
    for more in ({}, {"tokens": 5_000, "tokenizer": tokenizer}):
        for text in texts(babi=babi, questions=7, documents=10, **more):
            opening = load_prompts()["qa1"].opening
            assert text.startswith(opening)
            turns = text[len(opening) :].split("\n\n<context>\n")
            assert len(turns) == 7
            place: dict[str, str] = {}
            for turn in turns:
                place |= dict(re.findall(r"(Mary|John|Daniel|Sandra) \w+ (?:back )?to the (\w+)\.", turn))
                person = re.search(r"\n</context>\n\nQuestion: Where is (\w+)\?\nAnswer: ", turn)[1]  # type: ignore[index]
                assert turn.endswith(f"Answer: The most recent location of {person} is {place[person]}.")


def test_repeated_facts_are_all_of_a_question_in_their_order() -> None:
    once = {" ".join(story.facts) for story in parse_stories(simulate("qa1", 10_000, 1))}
    times = set()
    for text in texts(repeats=3):
        context = text.split("<context>\n")[-1].split("\n</context>")[0]
        found = [k for k in (1, 2, 3) if " ".join([context[: len(context) // k]] * k) == context]
        times |= {k for k in found if context[: len(context) // k] in once}
    assert times == {1, 2, 3}


def test_text_of_ones_own_lies_between_the_facts_and_only_its_train_split(babi: Path, tokenizer: Path) -> None:
    for split in ("train", "test"):
        (babi / split).mkdir()
        (babi / split / "1.txt").write_text(f"These are words of the {split} split that lie around. " * 3)
    for text in texts(babi=babi, text=babi, tokens=3_000, tokenizer=tokenizer, documents=3):
        assert "words of the train split" in text
        assert "words of the test split" not in text


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"tasks": ("qa1", "qa7")}, "--tasks qa7; give qa1 to qa5"),
        ({"documents": 0}, "--documents is 0"),
        ({"questions": 0}, "--questions is 0"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"tokens": 500}, "--tokens is 500 and --tokenizer None"),
        ({"text": FILE}, r"--text babilong.jsonl fills documents of one length; give --tokens"),
        ({"output": Path("x.txt")}, r"--output x.txt: .* end it with .jsonl"),
        ({"babi": Path("nowhere")}, r"--babi nowhere: 0 files qa1_\*_train.txt; .* whose train split alone is used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fault_is_one_sentence_about_the_setting(wrong: dict[str, Any], fault: str) -> None:
    with pytest.raises(EvaluationError, match=fault) as found:
        next(documents(TrainingDataSettings(**{"output": FILE, **wrong})))
    assert "\n" not in str(found.value)


def test_what_cannot_be_filled_is_said(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="--tokens 300: too short for the prompt and the facts of qa1"):
        texts(tokens=300, tokenizer=tokenizer)
    with pytest.raises(EvaluationError, match=r"nowhere: no \.txt file there"):
        texts(tokens=3_000, tokenizer=tokenizer, text=tmp_path / "nowhere")
    (tmp_path / "short.txt").write_text("No. So.")
    with pytest.raises(EvaluationError, match="has no sentence of 10 tokens or more"):
        texts(tokens=3_000, tokenizer=tokenizer, text=tmp_path / "short.txt")


def test_command_writes_json_lines_and_help_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "babilong.jsonl"
    monkeypatch.setattr(sys, "argv", ["x", "--output", str(file), "--documents", "3", "--tasks", "qa4", "qa5"])
    main()
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == texts(
        documents=3, tasks=("qa4", "qa5")
    )
    words = [sys.executable, "-X", "importtime", "-m", "evals.babilong.training_data", "--help"]
    result = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0
    assert "torch" not in {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
