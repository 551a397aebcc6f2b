"""Several models beside each other: what is counted, and what is written."""

import json
import re
from pathlib import Path

import pytest

from evals.niah import comparison
from evals.niah.comparison import main, rows_of
from evals.niah.templates import score
from evals.report import accuracy_plot
from tests.commands import status_of


def line(
    answer: str, *, length: int = 256, control: str = "none", task: str = "niah_single_1", value: str = "1234567"
) -> str:
    record = {"control": control, "task": task, "length": length, "value": value, "answer": answer, "value_loss": 2.0}
    found = score(answer, *re.split(", (?:and )?", value)).substring
    return json.dumps({**record, "value_tokens": 8, "substring": found})


def test_rows_count_whole_values_and_the_digits_before_the_first_wrong_one() -> None:
    answers = ["1234567.", "1234067.", "no number", "7234567"]
    row, reset = rows_of("mag", [*map(line, answers), line("12", control="memory_reset")])
    assert (row["model"], row["n"], row["accuracy"]) == ("mag", 4, 0.25)
    assert row["leading"] == (7 + 4 + 0 + 0) / 4
    assert row["nats_per_token"] == 0.25
    assert row["interval"][0] < 0.25 < row["interval"][1]
    assert (reset["model"], reset["n"], reset["leading"]) == ("mag, memory_reset", 1, 2)


def test_shares_of_several_values_and_characters_of_a_uuid_count() -> None:
    several, uuid = "1234567, 2222222, 3333333, and 4444444", "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
    lines = [line("1234567 or 3333333", task="niah_multivalue", value=several)]
    lines += [line("1234999", task="niah_multivalue", value=several)]
    lines += [line(f"a fact: {uuid[:20]}", task="niah_single_3", value=uuid)]
    shares, of_uuid = rows_of("mac", lines)
    assert (shares["task"], shares["n"], shares["accuracy"], shares["leading"]) == ("MV-NIAH", 2, 0.25, (7 + 4) / 2)
    assert (of_uuid["task"], of_uuid["accuracy"], of_uuid["leading"]) == ("S-NIAH-W", 0, 20)


def test_tasks_are_apart_on_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "niah.jsonl"
    lines = [
        line("1234567"),
        line("1", task="niah_multiquery"),
        line("1", task="niah_multiquery", control="memory_off"),
    ]
    file.write_text("\n".join(lines))
    drawn = []
    monkeypatch.setattr(comparison, "accuracy_plot", lambda *all: drawn.append(all) or accuracy_plot(*all))
    assert status_of(main, "--results", f"one={file}", "--output", tmp_path) == 0
    ((title, points, _),) = drawn
    assert title == "MQ-NIAH, S-NIAH-PK"
    assert sorted(points) == ["one MQ-NIAH", "one MQ-NIAH, memory_off", "one S-NIAH-PK"]


def test_command_writes_a_table_and_a_plot(tmp_path: Path) -> None:
    file = tmp_path / "niah.jsonl"
    file.write_text("\n".join([line("1234567"), line("1", length=1_024)]))
    words = ("--results", f"one={file}", f"two={file}", "--output", tmp_path / "out", "--trained-length", 256)
    assert status_of(main, *words) == 0
    table = (tmp_path / "out" / "accuracy.md").read_text().splitlines()
    assert len(table) == 2 + 4
    assert table[2].startswith("| one | S-NIAH-PK | 256 | 1 | 1.000 |")
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_are_not_there_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, "--results", "mag", "--output", tmp_path) == 2
    assert "write NAME=FILE" in capsys.readouterr().err
