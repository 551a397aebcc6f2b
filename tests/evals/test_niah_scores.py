"""Planted models get the scores they were made for, whatever the pieces."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.niah.run import evaluate
from evals.niah.scores import score
from evals.niah.settings import NiahSettings

from .planted import PlantedModel, other, plant

PLANTED: dict[str, tuple[Callable[[str], str], tuple[float, float, float]]] = {
    "oracle": (lambda value: f"{value}.", (1.0, 1.0, 0.0)),
    "wrong value": (lambda value: f"{other(value)}.", (0.0, 0.0, 1.0)),
    "listing": (lambda value: f"{other(value)}, 1234567, {value}", (1.0, 0.0, 1.0)),
    "silent": (lambda value: "unknown to me", (0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("piece", [1, 97, 4096])
def test_planted_model_gets_its_scores(tokenizer: Path, tmp_path: Path, name: str, piece: int) -> None:
    reply, expected = PLANTED[name]
    lengths = (420,) if piece == 1 else (420, 1001)
    settings = NiahSettings(Path(), tmp_path, lengths=lengths, depths=3, samples=2, piece=piece, max_new_tokens=48)
    report = evaluate(plant(tokenizer, reply), settings)
    assert len(report["by_length"]) == len(lengths)
    for row in [*report["by_length"], *report["cells"]]:
        assert (row["accuracy"], row["first_value_accuracy"], row["wrong_value_rate"]) == expected
    assert report["accuracy_by_length"] == {str(length): expected[0] for length in lengths}
    assert {row["n"] for row in report["by_length"]} == {6}
    assert {row["n"] for row in report["cells"]} == {2}


def test_prompt_is_read_in_pieces_and_the_answer_token_by_token(tokenizer: Path, tmp_path: Path) -> None:
    model = plant(tokenizer, lambda value: value)
    settings = NiahSettings(Path(), tmp_path, lengths=(700,), depths=2, piece=256, max_new_tokens=32)
    evaluate(model, settings)
    assert isinstance(model.network, PlantedModel)
    assert model.network.pieces[-11:-8] == [256, 256, 700 - 32 - 512]
    assert set(model.network.pieces[-8:]) == {1}  # seven digits, their prefix and the end token


def test_an_answer_ends_at_its_end_token_while_others_go_on(tokenizer: Path, tmp_path: Path) -> None:
    replies = iter(["1", "12 and more text", "123"])
    model = plant(tokenizer, lambda value: next(replies))
    evaluate(model, NiahSettings(Path(), tmp_path, lengths=(700,), depths=3))
    records = [json.loads(line) for line in (tmp_path / "niah.jsonl").read_text().splitlines()]
    assert [record["answer"].strip() for record in records] == ["1", "12 and more text", "123"]


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        (" 1234567.", (True, True, False)),
        ("1234567", (True, True, False)),
        (" the number 1234567, not 7654321", (True, True, False)),
        (" 7654321 or 1234567", (True, False, True)),
        (" 12345678", (True, False, True)),
        (" 123456", (False, False, True)),
        (" no idea", (False, False, False)),
        ("", (False, False, False)),
    ],
)
def test_verdicts_on_an_answer(answer: str, verdicts: tuple[bool, bool, bool]) -> None:
    result = score(answer, "1234567")
    assert (result.substring, result.first_value, result.wrong_value) == verdicts


def test_letter_case_does_not_count() -> None:
    assert score("it is ABC-1f", "abc-1F").substring
