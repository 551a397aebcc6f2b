"""Several models beside each other: what is counted, and what is written."""

import json
import sys
from pathlib import Path

import pytest

from evals.command_line import EvaluationError
from evals.niah.comparison import main, rows_of


def line(answer: str, *, length: int = 256, control: str = "none") -> str:
    record = {"control": control, "length": length, "value": "1234567", "answer": answer, "value_loss": 2.0}
    return json.dumps({**record, "value_tokens": 8, "substring": "1234567" in answer})


def test_rows_count_whole_values_and_the_digits_before_the_first_wrong_one() -> None:
    answers = ["1234567.", "1234067.", "no number", "7234567"]
    row, reset = rows_of("mag", [*map(line, answers), line("12", control="memory_reset")])
    assert (row["model"], row["n"], row["accuracy"]) == ("mag", 4, 0.25)
    assert row["leading_digits"] == (7 + 4 + 0 + 0) / 4
    assert row["nats_per_token"] == 0.25
    assert row["interval"][0] < 0.25 < row["interval"][1]
    assert (reset["model"], reset["n"], reset["leading_digits"]) == ("mag, memory_reset", 1, 2)


def test_command_writes_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "niah.jsonl"
    file.write_text("\n".join([line("1234567"), line("1", length=1_024)]))
    words = ["comparison", "--results", f"one={file}", f"two={file}", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*words, "--trained-length", "256"])
    main()
    table = (tmp_path / "out" / "accuracy.md").read_text().splitlines()
    assert len(table) == 2 + 4
    assert table[2].startswith("| one | 256 | 1 | 1.000 |")
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_are_not_there_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["comparison", "--results", "mag", "--output", str(tmp_path)])
    with pytest.raises(EvaluationError, match="write NAME=FILE"):
        main()
