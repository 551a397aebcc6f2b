"""Training documents: the evaluation's words, each value once before it is asked for, none of the evaluation's."""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from evals.command_line import EvaluationError
from evals.models import load_tokenizer
from evals.niah import templates
from evals.niah.samples import SampleBuilder, SampleKey
from evals.niah.training_data import TrainingDataSettings, documents, main
from tests.commands import status_of

FILE = Path("recall.jsonl")
PROSE = " ".join(f"It was in {year} that somebody, as is said, came back!" for year in range(1200, 1900))


def texts(**settings: Any) -> list[str]:
    return [document.text for document in documents(TrainingDataSettings(FILE, **{"documents": 200, **settings}))]


def parts(text: str) -> tuple[dict[str, str], list[str]]:
    """Needles of a document of niah_single_1 by key, and the lines behind the opening."""
    opening, *lines = text.split("\n")
    assert opening == templates.OPENING
    found = stated(text)
    needles = dict(found)
    assert len(needles) == len(found)
    return needles, lines


def stated(text: str) -> list[tuple[str, str]]:
    """Keys and values of a document's needles, in their order."""
    return re.findall(r"One of the special magic (?:numb|uuid)[ers]+ for (\S+) is: (\S+)\.", text)


def answered(text: str) -> list[tuple[list[str], list[str]]]:
    """Keys and values of a document's questions."""
    found = re.findall(r"The special magic \w+ for (.+) mentioned in the provided text (?:is|are) (.+)\.", text)
    return [(re.split(r", (?:and )?", keys), re.split(r", (?:and )?", values)) for keys, values in found]


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


def test_no_document_has_a_value_of_the_evaluation(tokenizer: Path) -> None:
    trained = {pair for seed in range(3) for text in texts(seed=seed, needles=4) for pair in stated(text)}
    assert len(trained) > 1_000
    builder = SampleBuilder(load_tokenizer(tokenizer).processor, 16)
    names = product((512, 1_024), (0.0, 25.0, 50.0, 75.0, 100.0), range(5), range(4))
    samples = [builder.build(SampleKey(templates.TASK, *name)) for name in names]
    evaluated = {(sample.needle_key, sample.value) for sample in samples}
    assert len(evaluated) == len(samples) == 200
    for task in ("niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery"):
        asked = builder.build(SampleKey(task, 2_000, 50.0, 0, 0))
        assert all(map(templates.held_out, asked.values)), "and training never draws such a one"
    assert not {value for _, value in trained} & {value for _, value in evaluated}


def test_documents_fill_their_tokens_exactly_and_differ_in_questions(tokenizer: Path) -> None:
    encode = load_tokenizer(tokenizer).processor.encode
    settings = TrainingDataSettings(FILE, documents=50, questions=2, tokens=900, tokenizer=tokenizer)
    asked = set()
    for text, _ in documents(settings):
        assert len(encode(text)) + 2 == 900
        asked.add(text.count("What is"))
    assert asked == {1, 2}


@pytest.mark.parametrize("more", [{"other_words": 1.0}, {"lists": True}], ids=["other words", "lists"])
def test_documents_of_every_kind_fill_their_tokens_exactly(tokenizer: Path, more: dict[str, Any]) -> None:
    encode = load_tokenizer(tokenizer).processor.encode
    made = texts(documents=30, tokens=900, tokenizer=tokenizer, **more)
    assert len(set(made)) == 30
    assert {len(encode(text)) + 2 for text in made} == {900}


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    (tmp_path / "prose.txt").write_text(PROSE)
    return tmp_path / "prose.txt"


@pytest.mark.parametrize("letters", templates.TASKS)
@pytest.mark.parametrize("needles", [1, 3])
def test_documents_of_every_task_are_worded_and_answered_as_it_is(
    tokenizer: Path, prose: Path, letters: Any, needles: int
) -> None:
    task = templates.TASKS[letters]
    encode = load_tokenizer(tokenizer).processor.encode
    more = {"text": prose if task.haystack == "prose" else None, "tokenizer": tokenizer, "tokens": 5_000}
    asked_sets = set()
    for text in texts(tasks=(letters,), needles=needles, questions=2, documents=20, **more):
        assert len(encode(text)) + 2 == 5_000
        assert text.startswith(task.opening + "\n")
        hidden: dict[str, list[str]] = {}
        for key, value in stated(text):
            hidden.setdefault(key, []).append(value)
            assert len(value) == (36 if task.value == "uuid" else 7)
            assert len(key) == 36 or task.key == "words"
            assert not templates.held_out(value)
        asked = answered(text)
        for keys, values in asked:
            assert len(keys) == task.asked
            assert values == [value for key in keys for value in hidden[key]], "a key's in the order of the text"
            assert len(set(values)) == task.asked * task.values
            assert text.count(f"{task.question(*keys)} {templates.listed(values)}.") == asked.count((keys, values))
        asked_sets.add(len({tuple(keys) for keys, _ in asked}))
        if task.haystack != "needles":
            count = len({key for keys, _ in asked for key in keys})
            assert len(hidden) == count + task.keys - task.asked
            assert text.count("One of the special") == len(hidden) * task.values
    assert asked_sets == set(range(1, needles + 1))


def test_prose_is_a_stretch_of_the_text_from_anywhere_with_needles_between_its_sentences(
    tokenizer: Path, prose: Path
) -> None:
    settings = {"tasks": ("n",), "needles": 3, "tokens": 1_500, "tokenizer": tokenizer, "text": prose}
    made = texts(documents=30, **settings)
    beginnings = set()
    for text in made:
        haystack = text.split("\n")[1]
        body = re.sub(r" ?One of the special magic numbers for \S+ is: \d+\.", "", haystack).strip()
        assert body in f"{PROSE} {PROSE}"
        beginnings.add(body[:30])
        last_behind_a_cut_sentence = re.sub(r"( One of the special magic numbers for \S+ is: \d+\.)+$", "", haystack)
        for before in last_behind_a_cut_sentence.split("One of the special")[:-1]:
            assert before.endswith(("! ", ". ")) or not before
    assert len(beginnings) > 20
    assert made == texts(documents=30, **settings)


def test_tasks_are_drawn_as_often_as_they_are_named(tokenizer: Path, prose: Path) -> None:
    made = texts(tasks=("pk", "n", "n"), text=prose, tokens=1_000, tokenizer=tokenizer, documents=300, other_words=0.5)
    kinds = ["noise" if templates.NOISE in text else "prose" if "It was in" in text else "words" for text in made]
    shares = [kinds.count(kind) / 300 for kind in ("noise", "prose", "words")]
    assert shares == pytest.approx([1 / 6, 1 / 3, 1 / 2], abs=0.07)


def test_near_misses_are_sentences_with_a_mark_of_needles_drawn_from_anywhere(tokenizer: Path, tmp_path: Path) -> None:
    near = ["He had it: the spring.", "Was it the summer?", "It was late-autumn then.", "So he said: wait."]
    text = tmp_path / "prose.txt"
    text.write_text(" ".join(f"{sentence} Nothing was said at 10:30 - or so." for sentence in near))
    settings = {"tasks": ("n",), "tokens": 1_500, "tokenizer": tokenizer, "text": text, "documents": 40}
    orders, counts, whole = set(), Counter[str](), 0
    for made in texts(**settings, near_misses=0.5):
        if "at 10:30" in made:
            whole += 1
            continue
        said = re.findall("|".join(map(re.escape, near)), made)
        assert set(said) == set(near)
        counts.update(said)
        orders.add(tuple(said[:8]))
    assert 10 < whole < 30
    shares = [counts[sentence] / counts.total() for sentence in near]
    assert shares == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 6], abs=0.05), "each mark as often, and two have a colon"
    assert len(orders) == 40 - whole, "each document has its own order"
    assert texts(**settings, near_misses=0.0) == texts(**settings)


def test_a_document_whose_prose_has_one_of_its_keys_is_drawn_again(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "adjectivelist.txt").write_text("old\nnew\nred\nwet\n")
    (tmp_path / "nounlist.txt").write_text("bus\nhat\nsea\ninn\n")
    (tmp_path / "prose.txt").write_text("There was an old-bus and a new-hat by the sea. " * 9)
    more = {"tasks": ("n",), "text": tmp_path / "prose.txt", "words": tmp_path, "tokenizer": tokenizer}
    keys = {key for text in texts(tokens=1_000, **more) for key, _ in stated(text)}
    assert len(keys) == 14
    assert not keys & {"old-bus", "new-hat"}


def test_noise_of_other_words_has_no_line_twice_and_hides_the_same_needles(tokenizer: Path) -> None:
    settings = TrainingDataSettings(FILE, documents=20, tokens=1_500, tokenizer=tokenizer, other_words=0.5)
    repeated = set()
    for text, _ in documents(settings):
        needles, lines = parts(text)
        assert len(needles) == 1
        noise = [line for line in lines if line.startswith("The ") and line.endswith(".")]
        repeated.add(len(set(noise)) == 1)
        assert len(set(noise)) in (1, len(noise))
    assert repeated == {True, False}


def test_nearly_all_of_a_list_has_been_said_before(tokenizer: Path) -> None:
    encode = load_tokenizer(tokenizer).processor.encode
    for text, _ in documents(TrainingDataSettings(FILE, documents=20, tokens=240, tokenizer=tokenizer, lists=True)):
        ids = encode(text)
        period = next(p for p in range(20, 130) if ids[p + 1 :] == ids[1:-p])
        assert len(set(ids[:period])) > period / 3


def test_the_command_writes_lists(tokenizer: Path, tmp_path: Path) -> None:
    words = ("--lists", "--documents", 3, "--tokens", 240, "--tokenizer", tokenizer)
    assert status_of(main, *words, "--output", tmp_path / FILE) == 0
    assert len((tmp_path / FILE).read_text().splitlines()) == 3


def test_length_too_short_for_the_words_is_one_sentence(tokenizer: Path) -> None:
    settings = TrainingDataSettings(FILE, tokens=50, tokenizer=tokenizer)
    with pytest.raises(EvaluationError, match=r"--tokens 50: too short for the words of a document"):
        next(documents(settings))


def test_command_writes_one_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "new" / "recall.jsonl"
    assert status_of(main, "--output", file, "--documents", 7, "--seed", 2) == 0
    written = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert written == texts(documents=7, seed=2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"documents": 0}, "--documents is 0; give at least 1"),
        ({"needles": 0}, "--needles is 0; give at least 1"),
        ({"most_lines": -1}, "--most-lines is -1; give at least 0"),
        ({"other_words": 1.5}, "--other-words is 1.5; it is a share, from 0 to 1"),
        ({"near_misses": -0.5}, "--near-misses is -0.5; it is a share, from 0 to 1"),
        ({"near_misses": 0.5}, "--near-misses are sentences of a --text; give one, or leave it out"),
        (
            {"lists": True, "tokens": 256, "tokenizer": FILE, "needles": 2},
            "--lists has no needles: leave out --tasks, --text, --needles, --questions, --repeats, --other-words",
        ),
        ({"lists": True}, "--lists makes documents of one length; give --tokens and --tokenizer"),
        ({"tasks": ()}, "--tasks is empty; give at least one"),
        ({"tasks": ("pk", "mv")}, "--tasks mv: hides its needles in prose; give a file of it as --text"),
        ({"text": FILE}, "--text recall.jsonl: no document has prose; leave it out, or add n to --tasks"),
        ({"tasks": ("n",), "text": Path("nowhere")}, "--text nowhere: cannot be read (No such file"),
        ({"needles": 11_000}, "--needles 11000: these words make 10388 keys, and up to 11001 are needed"),
        ({"tokens": 256}, "--tokens is 256 and --tokenizer None; documents of one length need both, others neither"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(sentence)):
        texts(**settings)


def test_near_misses_of_a_text_that_has_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("Nothing was said at 10:30. It was late. " * 9)
    with pytest.raises(
        EvaluationError, match=r"--near-misses: --text .*plain.txt has no colon, question mark or hyphen"
    ):
        texts(tasks=("n",), text=tmp_path / "plain.txt", near_misses=1.0)


def test_another_ending_than_jsonl_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"end it with \.jsonl"):
        TrainingDataSettings(Path("recall.txt"))
