"""Planted models get the scores they were made for, whatever the pieces."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.niah import NiahSettings
from evals.niah.run import evaluate
from evals.niah.templates import score

from .planted import PlantedModel, other, plant

UUID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
PLANTED: dict[str, tuple[Callable[[str], str], tuple[float, float, float]]] = {
    "oracle": (lambda value: f"{value}.", (1.0, 1.0, 0.0)),
    "wrong value": (lambda value: f"{other(value)}.", (0.0, 0.0, 1.0)),
    "listing": (lambda value: f"{other(value)}, {other(other(value)[::-1])}, {value}", (1.0, 0.0, 1.0)),
    "silent": (lambda value: "unknown to me", (0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize(("task", "piece"), [("pk", 1), ("pk", 97), ("pk", 4096), ("n", 500), ("w", 500)])
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
