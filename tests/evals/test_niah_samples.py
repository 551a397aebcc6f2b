"""Samples: exact length, one start token, the value once, the needle where it should be, and the same every time."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.command_line import EvaluationError
from evals.models import load_tokenizer
from evals.niah import haystacks, templates
from evals.niah.haystacks import ESSAYS, read_source, sentences
from evals.niah.samples import Sample, SampleBuilder, SampleKey

ROOM = 64
TASKS = ["niah_single_1", "niah_single_2", "niah_single_3"]
SEVERAL = ["niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery"]
SEVERAL += ["niah_multikey_1_keys_9"]
ESSAY = 'He said it.  Then\nhe left! "Why?" she asked; nobody knew. It was 1999. ' + "Time went by slowly. " * 30


@pytest.fixture(scope="module")
def processor(tokenizer: Path) -> Any:
    return load_tokenizer(tokenizer).processor


@pytest.fixture(scope="module")
def builder(processor: Any) -> SampleBuilder:
    return SampleBuilder(processor, ROOM)


def key(length: int, depth: float = 50.0, sample: int = 0, seed: int = 0, task: str = TASKS[0]) -> SampleKey:
    return SampleKey(task, length, depth, sample, seed)


def text_of(sample: Sample, processor: Any) -> str:
    return processor.decode(sample.prompt.tolist())


@pytest.mark.parametrize("task", [*TASKS, *SEVERAL])
@pytest.mark.parametrize("length", [1400, 2000, 2001, 4099])
@pytest.mark.parametrize("depth", [0.0, 37.5, 100.0])
def test_prompt_and_answer_fill_the_length_exactly(
    builder: SampleBuilder, processor: Any, task: str, length: int, depth: float
) -> None:
    sample = builder.build(key(length, depth, task=task))
    prompt = sample.prompt
    assert len(prompt) + ROOM == sample.tokens + ROOM == length
    assert prompt[0] == processor.bos_id()
    assert (prompt == processor.bos_id()).sum() == 1
    assert processor.eos_id() not in prompt


@pytest.fixture
def word_lists(tmp_path: Path) -> Path:
    (tmp_path / "adjectivelist.txt").write_text("naïve\n\nhighfalutin\nquiet \nold\n", encoding="utf-8")
    (tmp_path / "nounlist.txt").write_text("ATM\nT-shirt\nbus\nice cream\nATM\n", encoding="utf-8")
    return tmp_path


def test_keys_are_made_of_the_words_that_the_user_has(processor: Any, word_lists: Path) -> None:
    words = templates.read_words(word_lists)
    assert words.adjectives == ("naïve", "highfalutin", "quiet", "old")
    assert words.nouns == ("ATM", "T-shirt", "bus", "ice cream")
    builder = SampleBuilder(processor, ROOM, words=words)
    keys = {builder.build(key(1024, sample=number)).needle_key for number in range(40)}
    assert keys <= {f"{adjective}-{noun}" for adjective in words.adjectives for noun in words.nouns}
    assert len(keys) > 8
    assert words.name != templates.read_words(None).name == "own"


def test_word_lists_that_cannot_be_read_are_named(word_lists: Path) -> None:
    (word_lists / "nounlist.txt").write_text("ATM\n")
    with pytest.raises(EvaluationError, match=r"--words .*nounlist\.txt: has 1 words, at least 4 are needed"):
        templates.read_words(word_lists)
    (word_lists / "adjectivelist.txt").write_bytes(b"\xff")
    with pytest.raises(EvaluationError, match=r"adjectivelist\.txt: cannot be read \(no UTF-8\)"):
        templates.read_words(word_lists)
    with pytest.raises(EvaluationError, match=r"No such file.*the folder assets of the package wonderwords"):
        templates.read_words(word_lists / "nowhere")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 25.0, 50.0, 75.0, 100.0])
def test_value_stands_once_in_the_needle_and_nowhere_else(
    builder: SampleBuilder, processor: Any, task: str, depth: float
) -> None:
    kind = templates.BY_NAME[task].value
    for number in range(5):
        sample = builder.build(key(1201, depth, number, task=task))
        text = text_of(sample, processor)
        assert text.count(sample.value) == text.count(sample.needle_key) - 2 == 1
        assert f"One of the special magic {kind}s for {sample.needle_key} is: {sample.value}." in text
        assert text.endswith(f"The special magic {kind} for {sample.needle_key} mentioned in the provided text is")
        assert len(sample.value) == (36 if kind == "uuid" else 7)


@pytest.mark.parametrize("task", [*TASKS, *SEVERAL])
def test_spliced_ids_are_those_of_the_whole_text(processor: Any, task: str) -> None:
    builder = SampleBuilder(processor, ROOM)
    for depth in (0.0, 30.0, 60.0, 100.0):
        sample = builder.build(key(3000, depth, task=task))
        text = text_of(sample, processor)
        assert sample.prompt.tolist() == [processor.bos_id(), *processor.encode(text)]
        assert processor.encode(f"{text} {sample.value}")[sample.tokens - 1 :] == list(sample.value_ids)


def needles_of(text: str) -> list[tuple[str, str]]:
    """Keys and values of a text's needles, in their order."""
    return re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", text)


@pytest.mark.parametrize(
    ("task", "hidden", "question"),
    [
        ("niah_multikey_1", (4, 1), "What is the special magic number for {0} mentioned in the provided text? The "),
        ("niah_multikey_1_keys_9", (9, 1), "What is the special magic number for {0} mentioned in the provided text? "),
        ("niah_multivalue", (1, 4), "What are all the special magic numbers for {0} mentioned in the provided text? "),
        (
            "niah_multiquery",
            (4, 1),
            "What are all the special magic numbers for {0}, {1}, {2}, and {3} mentioned in the provided text? The "
            "special magic numbers for {0}, {1}, {2}, and {3} mentioned in the provided text are",
        ),
    ],
)
@pytest.mark.parametrize("depth", [0.0, 50.0, 100.0])
def test_several_needles_stand_once_each_and_are_asked_for_in_rulers_words(
    builder: SampleBuilder, processor: Any, task: str, hidden: tuple[int, int], question: str, depth: float
) -> None:
    keys, values = hidden
    for number in range(5):
        sample = builder.build(key(4000, depth, number, task=task))
        text = text_of(sample, processor)
        found = needles_of(text)
        assert len(found) == keys * values == len(set(found))
        by_key = {name: [value for other, value in found if other == name] for name, _ in found}
        assert len(by_key) == keys
        asked = sample.needle_key.replace("and ", "").split(", ")
        assert sample.values == tuple(value for name in asked for value in by_key[name])
        assert sample.value == templates.listed(sample.values)
        assert all(text.count(value) == 1 and templates.held_out(value) for _, value in found)
        assert question.format(*asked) in text.split("\n")[-1]
        several = "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        several += "I will quiz you about the numbers afterwards.\n"
        assert text.startswith(several) is (len(asked) * values > 1)
        places = [text.index(value) / len(text) for value in sample.values]
        assert min(abs(place - depth / 100) for place in places) < 0.12


def test_the_others_of_several_needles_stand_anywhere(builder: SampleBuilder, processor: Any) -> None:
    for task in ("niah_multikey_1", "niah_multivalue", "niah_multiquery"):
        texts = [text_of(builder.build(key(4000, 50.0, number, task=task)), processor) for number in range(40)]
        places = [text.index(f"{value}.") / len(text) for text in texts for _, value in needles_of(text)]
        counts = np.histogram(places, [0, 0.25, 0.45, 0.55, 0.75, 1])[0]
        assert counts.sum() == 160
        assert counts[2] > 40, "the first in the middle"
        assert all(count > 12 for count in counts), counts


@pytest.mark.parametrize(("task", "length"), [("niah_multikey_2", 200_000), ("niah_multikey_3", 60_000)])
def test_a_haystack_of_needles_has_the_one_asked_for_once(processor: Any, task: str, length: int) -> None:
    builder = SampleBuilder(processor, ROOM)
    kind = templates.by_name(task)
    for depth in (0.0, 40.0, 100.0):
        sample = builder.build(key(length, depth, task=task))
        text = text_of(sample, processor)
        opening, *lines, question = text.split("\n")
        assert opening == kind.opening
        assert question == kind.question(sample.needle_key)
        found = needles_of("\n".join(lines))
        assert len(found) >= len(lines) - 1 > 300, "needles all, but for the last, which may be cut"
        assert len(found) == len(set(found))
        assert found.count((sample.needle_key, sample.value)) == text.count(sample.value) == 1
        assert text.count(sample.needle_key) == 3
        assert found.index((sample.needle_key, sample.value)) / len(found) == pytest.approx(depth / 100, abs=0.01)
        assert len(sample.value) == (36 if kind.value == "uuid" else 7)
        assert (len(sample.needle_key) == 36) is (kind.key == "uuid")
    other = builder.build(key(length, 40.0, seed=1, task=task))
    assert len(set(needles_of(text_of(other, processor))) & set(found)) == 0


def test_more_keys_than_the_words_make_are_refused(processor: Any, word_lists: Path) -> None:
    builder = SampleBuilder(processor, ROOM, words=templates.read_words(word_lists))
    assert len(builder.build(key(6000, task="niah_multikey_1_keys_8")).values) == 1
    with pytest.raises(EvaluationError, match=r"--keys 9: too many for these words; give at most 8, or more --words"):
        builder.build(key(6000, task="niah_multikey_1_keys_9"))


@pytest.mark.parametrize("task", TASKS)
def test_needle_moves_from_the_start_to_the_end_with_depth(builder: SampleBuilder, processor: Any, task: str) -> None:
    places = []
    for depth in range(0, 101, 10):
        text = text_of(builder.build(key(6000, float(depth), task=task)), processor)
        places.append(text.index("One of the special") / len(text))
        assert places[-1] == pytest.approx(depth / 100, abs=0.06)
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    text = text_of(builder.build(key(6000, 0.0, task=task)), processor)
    assert text.split("\n")[1].startswith("One of the special")


@pytest.mark.parametrize("task", [*TASKS, *SEVERAL])
def test_samples_of_a_length_share_what_stands_before_the_needle(processor: Any, task: str) -> None:
    builder = SampleBuilder(processor, ROOM)
    samples = [builder.build(key(5000, float(depth), n, task=task)) for depth in range(0, 101, 10) for n in range(3)]
    longest = max(samples, key=lambda sample: sample.shared).prompt
    of_needles = templates.by_name(task).haystack == "needles"
    for sample in samples:
        assert (sample.prompt[: sample.shared] == longest[: sample.shared]).all()
        before = processor.decode(sample.prompt[: sample.shared + 1].tolist())
        assert (sample.value if of_needles else "One of the") not in before
    if task in TASKS or of_needles:
        assert samples[-1].shared > 0.9 * samples[-1].question_at - 100
    else:  # the first of several needles ends what is shared
        assert len({sample.shared for sample in samples}) > 8


def test_a_sample_depends_on_its_names_alone(processor: Any) -> None:
    names = [
        key(1600, depth, sample, seed, task)
        for depth in (0.0, 50.0)
        for sample in (0, 1)
        for seed in (0, 1)
        for task in [*TASKS, *SEVERAL]
    ]
    forwards = {name: SampleBuilder(processor, ROOM).build(name) for name in names}
    shared = SampleBuilder(processor, ROOM)
    alone = [shared.build(name) for name in reversed(names)]
    for sample in alone:
        assert sample.value == forwards[sample.name].value
        assert sample.sha256 == forwards[sample.name].sha256
    assert len({(sample.needle_key, sample.value) for sample in alone}) == len({s.sha256 for s in alone}) == len(names)


def test_pieces_of_a_prompt_are_the_prompt(builder: SampleBuilder) -> None:
    sample = builder.build(key(1500, task=TASKS[1]))
    for size in (1, 7, 64, 5000):
        pieces = [sample.piece(start, start + size) for start in range(0, sample.tokens, size)]
        np.testing.assert_array_equal(np.concatenate(pieces), sample.prompt)


def test_least_length_of_the_error_is_the_least_that_works(builder: SampleBuilder) -> None:
    with pytest.raises(EvaluationError, match=r"--lengths 64: too short .* give at least (\d+)"):
        builder.build(key(64))
    # Another length draws other words, so the least length is looked for, not computed.
    works = next(length for length in range(64, 2000) if _fits(builder, length))
    with pytest.raises(EvaluationError):
        builder.check(key(works - 1))
    assert len(builder.build(key(works)).prompt) == works - ROOM


def _fits(builder: SampleBuilder, length: int, task: str = TASKS[0]) -> bool:
    try:
        builder.check(key(length, task=task))
    except EvaluationError:
        return False
    return True


class CountedProcessor:
    """A processor that counts the characters it encodes."""

    def __init__(self, processor: Any) -> None:
        self._processor, self.characters = processor, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def encode(self, text: Any, **options: Any) -> Any:
        self.characters += sum(map(len, text))
        return self._processor.encode(text, **options)


def test_two_million_tokens_are_encoded_once(processor: Any) -> None:
    counted = CountedProcessor(processor)
    builder = SampleBuilder(counted, ROOM)
    builder.build(key(2**21, 50.0, task=TASKS[1]))
    counted.characters = 0
    samples = [builder.build(key(2**21, depth, task=TASKS[1])) for depth in (0.0, 40.0, 100.0)]
    assert 0 < counted.characters < 10_000
    assert {sample.tokens for sample in samples} == {2**21 - ROOM}
    parts = {id(part.base) for sample in samples for part in sample.parts if len(part) > 1000}
    assert len(parts) == 1, "samples hold views of one haystack"


def test_synthetic_prose_has_no_digits_and_a_seed_of_its_own() -> None:
    texts = [" ".join(next(own) for _ in range(2000)) for own in (sentences(0), sentences(0), sentences(1))]
    assert texts[0] == texts[1] != texts[2]
    assert not any(letter.isdigit() or letter in "-\n" for letter in texts[0])
    assert len(set(texts[0].split(". "))) > 1500


def test_a_users_text_is_the_haystack_and_begins_again_at_its_end(processor: Any, tmp_path: Path) -> None:
    (tmp_path / "essay.txt").write_text(ESSAY)
    (tmp_path / "essay.json").write_text(json.dumps({"text": ESSAY}))
    for name in ("essay.txt", "essay.json"):
        source = read_source(tmp_path / name)
        assert source.label == "file"
        builder = SampleBuilder(processor, ROOM, text=source)
        text = text_of(builder.build(key(3000, 50.0, task=TASKS[1])), processor)
        assert text.split("\n")[1].startswith('He said it. Then he left! "Why?" she asked; nobody knew. It was 1999.')
        assert text.count("It was 1999.") > 1
        assert builder.source(TASKS[0]).label == "noise"


def test_a_file_is_called_essay_only_if_it_is_rulers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "PaulGrahamEssays.json"
    file.write_text(json.dumps({"text": ESSAY}))
    assert read_source(file).label == "file"
    monkeypatch.setattr(haystacks, "ESSAYS", {*ESSAYS, read_source(file).sha256})
    assert read_source(file).label == "essay"


def test_a_value_or_key_that_stands_in_the_text_is_drawn_again(processor: Any, tmp_path: Path) -> None:
    plain = SampleBuilder(processor, ROOM, text=_source(tmp_path, ESSAY)).build(key(1500, task=TASKS[1]))
    for word in (plain.value, plain.needle_key):
        builder = SampleBuilder(processor, ROOM, text=_source(tmp_path, f"{ESSAY} There was {word} again."))
        sample = builder.build(key(1500, task=TASKS[1]))
        assert (sample.value, sample.needle_key) != (plain.value, plain.needle_key)
        assert word not in (sample.value, sample.needle_key)


def _source(folder: Path, text: str) -> haystacks.Source:
    (folder / "text.txt").write_text(text)
    return read_source(folder / "text.txt")


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"--text .*nowhere.txt: cannot be read \(No such file"):
        read_source(tmp_path / "nowhere.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="UnicodeDecodeError"):
        read_source(tmp_path / "bytes.txt")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(EvaluationError, match="TypeError"):
        read_source(tmp_path / "list.json")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(EvaluationError, match="no text in it"):
        read_source(tmp_path / "empty.txt")
