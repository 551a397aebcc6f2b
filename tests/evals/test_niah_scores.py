"""Planted models get the scores they were made for, whatever the pieces."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals.niah import NiahSettings
from evals.niah.run import evaluate
from evals.niah.templates import score
from evals.report import wilson_interval

from .planted import PlantedModel, other, plant

UUID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
PLANTED: dict[str, tuple[Callable[[str], str], tuple[float, float, float]]] = {
    "oracle": (lambda value: f"{value}.", (1.0, 1.0, 0.0)),
    "wrong value": (lambda value: f"{other(value)}.", (0.0, 0.0, 1.0)),
    "listing": (lambda value: f"{other(value)}, {other(other(value)[::-1])}, {value}", (1.0, 0.0, 1.0)),
    "silent": (lambda value: "unknown to me", (0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize(
    ("task", "piece", "name"),
    [
        *itertools.product(["pk", "w"], [97], PLANTED),
        *itertools.product(["pk"], [1, 4096], ["oracle", "wrong value"]),
        *itertools.product(["n"], [500], ["oracle", "wrong value"]),
    ],
)
def test_planted_model_gets_its_scores(tokenizer: Path, tmp_path: Path, name: str, piece: int, task: str) -> None:
    reply, expected = PLANTED[name]
    if task == "w" and name == "listing":
        reply = lambda value: f"{other(value)}, {UUID}, {value}"  # noqa: E731
    lengths = (420,) if piece == 1 else (520, 1001)
    room = 48 if task != "w" else 128
    settings = NiahSettings(
        Path(),
        tmp_path,
        (task,),
        lengths,
        depths=3,
        samples=2,
        piece=piece,
        max_new_tokens=room,  # type: ignore[arg-type]
    )
    report = evaluate(plant(tokenizer, reply), settings)
    assert report is not None
    assert len(report["by_length"]) == len(lengths)
    for row in [*report["by_length"], *report["cells"]]:
        assert (row["accuracy"], row["first_value_accuracy"], row["wrong_value_rate"]) == expected
        assert (row["value_loss_per_token"] < 1e-6) is (name == "oracle"), "the value fed as it stands"
    (by_length,) = report["accuracy_by_length"].values()
    assert by_length == {str(length): expected[0] for length in lengths}
    assert {row["n"] for row in report["by_length"]} == {6}
    assert {row["n"] for row in report["cells"]} == {2}


# What is said of the values; accuracy, first value and wrong value with one value and with four of them.
SAID: dict[str, tuple[Callable[[str], str], tuple[float, float, float], tuple[float, float, float]]] = {
    "oracle": (lambda value: f"{value}.", (1, 1, 0), (1, 1, 0)),
    "oracle in another order": (
        lambda value: f"{', '.join(reversed(value.replace('and ', '').split(', ')))}.",
        (1, 1, 0),
        (1, 1, 0),
    ),
    "the last of them": (lambda value: f"{value.split(', ')[-1]}.", (1, 1, 0), (0.25, 1, 0)),
    "first one wrong": (lambda value: f"{other(value)}.", (0, 0, 1), (0.75, 0, 1)),
    "last one cut": (lambda value: f"{value[:-3]}.", (0, 0, 1), (0.75, 1, 0)),
    "silent": (lambda value: "unknown to me", (0, 0, 0), (0, 0, 0)),
}
SCORED_ALIKE = {"mk2": "mk1", "mk3": "mk1", "mq": "mv"}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        *itertools.product(["mk1", "mv"], SAID),
        *itertools.product(SCORED_ALIKE, ["oracle", "first one wrong"]),
        *(
            pytest.param(task, said, marks=pytest.mark.slow)
            for task, said in itertools.product(SCORED_ALIKE, SAID)
            if said not in ("oracle", "first one wrong")
        ),
    ],
)
def test_planted_model_gets_the_share_of_values_that_it_says(
    tokenizer: Path, tmp_path: Path, task: Any, said: str
) -> None:
    reply, of_one, of_four = SAID[said]
    expected = of_four if task in ("mv", "mq") else of_one
    settings = NiahSettings(Path(), tmp_path, (task,), (2_500,), depths=3, samples=2, piece=500)
    report = evaluate(plant(tokenizer, reply), settings)
    assert report is not None
    (row,) = report["by_length"]
    assert (row["accuracy"], row["first_value_accuracy"], row["wrong_value_rate"]) == expected
    assert row["n"] == 6
    assert row["interval"] == list(wilson_interval(6 * expected[0], 6))
    assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]


def test_each_number_of_keys_is_a_task_of_its_own(tokenizer: Path, tmp_path: Path) -> None:
    settings = NiahSettings(Path(), tmp_path, ("mk1", "pk"), (2_000,), keys=(2, 4, 6), depths=2)
    model = plant(tokenizer, lambda value: value)
    report = evaluate(model, settings)
    assert report is not None
    names = ["niah_multikey_1", "niah_multikey_1_keys_2", "niah_multikey_1_keys_6", "niah_single_1"]
    assert [(row["task"], row["n"], row["accuracy"]) for row in report["by_length"]] == [(n, 2, 1.0) for n in names]
    again = evaluate(model, replace(settings, tasks=("pk",), keys=(4,), seed=1))
    assert again is not None
    assert [(row["task"], row["n"]) for row in again["by_length"]] == [
        *((name, 2) for name in names[:3]),
        (names[3], 4),
    ]


def test_haystack_is_read_once_for_all_depths_and_its_samples_side_by_side(tokenizer: Path, tmp_path: Path) -> None:
    model = plant(tokenizer, lambda value: value)
    settings = NiahSettings(
        Path(), tmp_path, lengths=(2_032,), depths=11, samples=3, piece=256, max_new_tokens=32, batch=8
    )
    report = evaluate(model, settings)
    assert report is not None
    assert isinstance(model.network, PlantedModel)
    assert max(tokens for _, tokens in model.network.pieces) == 256
    assert {rows for rows, tokens in model.network.pieces if tokens > 8} == {1, 3}
    # Eleven depths of three samples are 33 prompts of 2,000 tokens; read: one beginning, and on average half of each.
    assert report["by_length"][0]["tokens_read_over_prompts"] == pytest.approx(0.5 + 1 / 33, abs=0.04)


def test_an_answer_ends_at_its_end_token_while_others_go_on(tokenizer: Path, tmp_path: Path) -> None:
    replies = iter(["1", "12 and more text", "123"])
    model = plant(tokenizer, lambda value: next(replies) if value else "")
    settings = NiahSettings(Path(), tmp_path, lengths=(700,), depths=1, samples=3, max_new_tokens=32)
    evaluate(model, settings)
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
def test_verdicts_on_a_number(answer: str, verdicts: tuple[bool, bool, bool]) -> None:
    result = score(answer, "1234567")
    assert (result.substring, result.first_value, result.wrong_value) == verdicts


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        (f" {UUID}.", (True, True, False)),
        (f" {UUID.upper()}", (True, True, False)),
        (f" it is {UUID}, 7 letters", (True, True, False)),
        (f" 00000000{UUID[8:]} or {UUID}", (True, False, True)),
        (f" {UUID[:-1]}", (False, False, True)),
        (f" {UUID[:23]}", (False, False, True)),
        (" 1234567, a well-known number", (False, False, False)),
        ("", (False, False, False)),
    ],
)
def test_verdicts_on_a_uuid(answer: str, verdicts: tuple[bool, bool, bool]) -> None:
    result = score(answer, UUID)
    assert (result.substring, result.first_value, result.wrong_value) == verdicts


@pytest.mark.parametrize(
    ("answer", "share"), [("1, 22 and 333", 1), ("333, 1", 2 / 3), ("A1B", 1 / 3), ("", 0), ("4444", 0)]
)
def test_score_of_several_values_is_the_share_in_the_answer(answer: str, share: float) -> None:
    assert score(answer, "1", "22", "333").substring == pytest.approx(share)
    assert score(answer.lower(), "A1b").substring == ("a1b" in answer.lower())
