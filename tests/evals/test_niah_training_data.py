"""Training documents: the evaluation's words, each value once before it is asked for, none of the evaluation's."""

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from evals.command_line import EvaluationError
from evals.models import load_tokenizer
from evals.niah import templates
from evals.niah.samples import SampleBuilder, SampleKey
from evals.niah.training_data import TrainingDataSettings, documents, main

FILE = Path("recall.jsonl")


def texts(**settings: Any) -> list[str]:
    return list(documents(TrainingDataSettings(FILE, **{"documents": 200, **settings})))


def parts(text: str) -> tuple[dict[str, str], list[str]]:
    """Needles by key, and the lines behind the opening."""
    pattern = re.escape(templates.NEEDLE).replace(r"\{key\}", "(.+)").replace(r"\{value\}", r"(\d+)")
    opening, *lines = text.split("\n")
    assert opening == templates.OPENING
    found = [(match[1], match[2]) for line in lines if (match := re.fullmatch(pattern, line))]
    needles = dict(found)
    assert len(needles) == len(found)
    return needles, lines


@pytest.mark.parametrize(("needles", "questions"), [(1, 1), (4, 3)])
def test_value_stands_once_before_it_is_asked_for(needles: int, questions: int) -> None:
    for text in texts(needles=needles, questions=questions):
        stated, lines = parts(text)
        assert 1 <= len(stated) <= needles
        first_question = next(i for i, line in enumerate(lines) if line.startswith("What is"))
        before, asked = "\n".join(lines[:first_question]), lines[first_question:]
        for key, value in stated.items():
            assert before.count(value) == 1
            answer = f"{templates.QUESTION.format(key=key)} {value}."
            assert 1 <= asked.count(answer) <= questions
        assert set(asked) == {f"{templates.QUESTION.format(key=k)} {v}." for k, v in stated.items()}


def test_noise_has_any_number_of_lines_in_the_range_and_needles_any_place_in_it() -> None:
    counts, places = set(), set()
    for text in texts(most_lines=3):
        lines = parts(text)[1]
        counts.add(lines.count(templates.NOISE))
        places.add(next(i for i, line in enumerate(lines) if line.startswith("One of")))
    assert counts == {0, 1, 2, 3}
    assert places == {0, 1, 2, 3}


def test_repeated_needles_are_the_same_one() -> None:
    times = set()
    for text in texts(repeats=3):
        stated = [line for line in text.split("\n") if line.startswith("One of")]
        assert len(set(stated)) == 1
        times.add(len(stated))
    assert times == {1, 2, 3}


def test_same_seed_gives_the_same_documents_and_another_one_others() -> None:
    assert texts(seed=3) == texts(seed=3)
    assert not set(texts(seed=3)) & set(texts(seed=4))


def test_no_document_has_a_key_and_value_of_the_evaluation(tokenizer: Path) -> None:
    trained = {pair for seed in range(3) for text in texts(seed=seed, needles=4) for pair in parts(text)[0].items()}
    assert len(trained) > 1_000
    builder = SampleBuilder(load_tokenizer(tokenizer).processor, 16)
    names = product((512, 1_024), (0.0, 25.0, 50.0, 75.0, 100.0), range(5), range(4))
    samples = [builder.build(SampleKey(templates.TASK, *name)) for name in names]
    evaluated = {(sample.needle_key, sample.value) for sample in samples}
    assert len(evaluated) == len(samples) == 200
    assert not trained & evaluated


def test_documents_fill_their_tokens_exactly_and_differ_in_questions(tokenizer: Path) -> None:
    encode = load_tokenizer(tokenizer).processor.encode
    settings = TrainingDataSettings(FILE, documents=50, questions=2, tokens=900, tokenizer=tokenizer)
    asked = set()
    for text in documents(settings):
        assert len(encode(text)) + 2 == 900
        asked.add(text.count("What is"))
    assert asked == {1, 2}


@pytest.mark.parametrize("more", [{"other_words": 1.0}, {"lists": True}], ids=["other words", "lists"])
def test_documents_of_every_kind_fill_their_tokens_exactly(tokenizer: Path, more: dict[str, Any]) -> None:
    encode = load_tokenizer(tokenizer).processor.encode
    made = list(documents(TrainingDataSettings(FILE, documents=30, tokens=900, tokenizer=tokenizer, **more)))
    assert len(set(made)) == 30
    assert {len(encode(text)) + 2 for text in made} == {900}


def test_noise_of_other_words_has_no_line_twice_and_hides_the_same_needles(tokenizer: Path) -> None:
    settings = TrainingDataSettings(FILE, documents=20, tokens=1_500, tokenizer=tokenizer, other_words=0.5)
    repeated = set()
    for text in documents(settings):
        needles, lines = parts(text)
        assert len(needles) == 1
        noise = [line for line in lines if line.startswith("The ") and line.endswith(".")]
        repeated.add(len(set(noise)) == 1)
        assert len(set(noise)) in (1, len(noise))
    assert repeated == {True, False}


def test_nearly_all_of_a_list_has_been_said_before(tokenizer: Path) -> None:
    encode = load_tokenizer(tokenizer).processor.encode
    for text in documents(TrainingDataSettings(FILE, documents=20, tokens=240, tokenizer=tokenizer, lists=True)):
        ids = encode(text)
        period = next(p for p in range(20, 130) if ids[p + 1 :] == ids[1:-p])
        assert len(set(ids[:period])) > period / 3


def test_the_command_writes_lists(tokenizer: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evals.niah.training_data", "--lists", "--documents", "3", "--tokens", "240"]
    subprocess.run([*command, "--tokenizer", str(tokenizer), "--output", str(tmp_path / FILE)], check=True)
    assert len((tmp_path / FILE).read_text().splitlines()) == 3


def test_length_too_short_for_the_words_is_one_sentence(tokenizer: Path) -> None:
    settings = TrainingDataSettings(FILE, tokens=50, tokenizer=tokenizer)
    with pytest.raises(EvaluationError, match=r"--tokens 50: too short for the words of a document"):
        next(documents(settings))


def test_command_writes_one_document_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "recall.jsonl"
    monkeypatch.setattr(sys, "argv", ["training_data", "--output", str(file), "--documents", "7", "--seed", "2"])
    main()
    written = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert written == texts(documents=7, seed=2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"documents": 0}, "--documents is 0; give at least 1"),
        ({"needles": 0}, "--needles is 0; give at least 1"),
        ({"most_lines": -1}, "--most-lines is -1; give at least 0"),
        ({"other_words": 1.5}, "--other-words is 1.5; it is a share, from 0 to 1"),
        (
            {"lists": True, "tokens": 256, "tokenizer": FILE, "needles": 2},
            "--lists has no needles: leave out --needles, --questions, --repeats and --other-words with it",
        ),
        ({"lists": True}, "--lists and --other-words make documents of one length; give --tokens and --tokenizer"),
        ({"tokens": 256}, "--tokens is 256 and --tokenizer None; documents of one length need both, others neither"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(sentence)):
        texts(**settings)


def test_another_ending_than_jsonl_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"end it with \.jsonl"):
        TrainingDataSettings(Path("recall.txt"))
