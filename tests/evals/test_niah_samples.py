"""Samples: exact length, one start token, the value once, the needle where it should be, and the same every time."""

from pathlib import Path
from typing import Any

import pytest

from evals.command_line import EvaluationError
from evals.models import load_tokenizer
from evals.niah import templates
from evals.niah.samples import Sample, SampleBuilder, SampleKey

ROOM = 32


@pytest.fixture(scope="module")
def processor(tokenizer: Path) -> Any:
    return load_tokenizer(tokenizer).processor


@pytest.fixture(scope="module")
def builder(processor: Any) -> SampleBuilder:
    return SampleBuilder(processor, ROOM)


def key(length: int, depth: float = 50.0, sample: int = 0, seed: int = 0) -> SampleKey:
    return SampleKey(templates.TASK, length, depth, sample, seed)


def text_of(sample: Sample, processor: Any) -> str:
    return processor.decode(sample.prompt.tolist())


@pytest.mark.parametrize("length", [512, 777, 1000, 1001, 1024, 4099])
@pytest.mark.parametrize("depth", [0.0, 37.5, 100.0])
def test_prompt_and_answer_fill_the_length_exactly(
    builder: SampleBuilder, processor: Any, length: int, depth: float
) -> None:
    prompt = builder.build(key(length, depth)).prompt
    assert len(prompt) + ROOM == length
    assert prompt[0] == processor.bos_id()
    assert (prompt == processor.bos_id()).sum() == 1
    assert processor.eos_id() not in prompt


@pytest.mark.parametrize("depth", [0.0, 25.0, 50.0, 75.0, 100.0])
def test_value_stands_once_in_the_needle_and_nowhere_else(builder: SampleBuilder, processor: Any, depth: float) -> None:
    for number in range(5):
        sample = builder.build(key(901, depth, number))
        text = text_of(sample, processor)
        assert text.count(sample.value) == 1
        assert f"\nOne of the special magic numbers for {sample.needle_key} is: {sample.value}.\n" in text
        assert text.endswith(f"The special magic number for {sample.needle_key} mentioned in the provided text is")


def test_spliced_ids_are_those_of_the_whole_text(builder: SampleBuilder, processor: Any) -> None:
    lengths = range(600, 700)
    texts = {length: builder.build(key(length, 30.0)) for length in lengths}
    for sample in texts.values():
        text = text_of(sample, processor)
        cut = text.split("\n")[1]
        if cut == templates.NOISE:  # no line was cut short, so nothing depends on where a piece was cut
            assert sample.prompt.tolist() == [processor.bos_id(), *processor.encode(text)]
            break
    else:
        pytest.fail("no length without a cut line; widen the range")


def test_needle_moves_from_the_start_to_the_end_with_depth(builder: SampleBuilder, processor: Any) -> None:
    places = []
    for depth in range(0, 101, 10):
        text = text_of(builder.build(key(3000, float(depth))), processor)
        places.append(text.index("One of the special") / len(text))
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    lines = [text_of(builder.build(key(3000, depth)), processor).split("\n") for depth in (0.0, 100.0)]
    assert lines[0][1].startswith("One of the special")
    assert lines[1][-2].startswith("One of the special")


def test_a_sample_depends_on_its_five_names_alone(processor: Any) -> None:
    names = [key(600, depth, sample, seed) for depth in (0.0, 50.0) for sample in (0, 1) for seed in (0, 1)]
    forwards = {name: SampleBuilder(processor, ROOM).build(name) for name in names}
    alone = [SampleBuilder(processor, ROOM).build(name) for name in reversed(names)]
    for sample in alone:
        assert sample.value == forwards[sample.name].value
        assert (sample.prompt == forwards[sample.name].prompt).all()
    assert len({(sample.needle_key, sample.value) for sample in alone}) == len(names)


def test_least_length_of_the_error_is_the_least_that_works(builder: SampleBuilder) -> None:
    with pytest.raises(EvaluationError, match=r"--lengths 64: too short .* give at least (\d+)"):
        builder.build(key(64))
    # Another length draws other words, so the least length is looked for, not computed.
    works = next(length for length in range(64, 2000) if _fits(builder, length))
    with pytest.raises(EvaluationError):
        builder.check(key(works - 1))
    assert len(builder.build(key(works)).prompt) == works - ROOM


def _fits(builder: SampleBuilder, length: int) -> bool:
    try:
        builder.check(key(length))
    except EvaluationError:
        return False
    return True
