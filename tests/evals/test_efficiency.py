"""The efficiency command end to end on tiny shapes, and its faults. No times are asserted."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.command_line import EvaluationError
from evals.efficiency import MemorySettings
from evals.efficiency import __main__ as efficiency
from evals.efficiency.memory import markdown, plan, run_cases
from evals.efficiency.worker import BOTH, OURS, TITANS_PYTORCH, Case, Limits
from tests.commands import help_of, status_of

REPOSITORY = Path(__file__).parents[2]
LIMITS = Limits(repeats=2, repeat_seconds=0.05, threads=1, seconds=60.0, gigabytes=4.0)


def tiny(implementation: str = OURS, **changes: Any) -> Case:
    """A case of the quick run, changed."""
    cases = plan(MemorySettings(Path(), quick=True), "cpu")
    found = next(case for case in cases if case.implementation == implementation and case.direction == BOTH)
    return replace(found, **changes)


@pytest.fixture
def without_titans_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes started from here on find no such package, whether or not it is installed."""
    package = tmp_path / "absent" / "titans_pytorch.py"
    package.parent.mkdir()
    package.write_text("raise ModuleNotFoundError('hidden by a test', name='titans_pytorch')")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


@pytest.mark.usefixtures("without_titans_pytorch")
def test_quick_run_reports_ours_and_says_why_the_other_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("titans-mcore layer auto", "chunk_size=16 batch_size=None T=64 forward+")
    assert status_of(efficiency.main, "memory", "--output", tmp_path, "--quick", "--threads", 1, "--only", *only) == 0
    report = json.loads((tmp_path / "memory.json").read_text())
    ours = [row for row in report["rows"] if row["implementation"] == OURS]
    others = [row for row in report["rows"] if row["implementation"] == TITANS_PYTORCH]
    assert {row["direction"] for row in ours} == {"forward", "forward+backward"}
    for row in ours:
        assert row["status"] == "measured"
        assert row["finite"]
        numbers = [row[name] for name in ("seconds", "tokens_per_second")]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert row["peak_bytes"] >= 0
        assert len(row["all_seconds"]) == 2
    assert others
    for row in others:
        assert row["status"] == "not run"
        assert row["reason"] == "titans_pytorch is not installed; install this project's extra `bench`"
        assert "seconds" not in row
    out = capsys.readouterr().out
    assert out == (tmp_path / "memory.md").read_text() + "\n"
    assert "not measured: no GPU" in out or report["device_kind"] == "cuda"


def test_titans_pytorch_runs_with_gates_per_token_and_pooled() -> None:
    pytest.importorskip("titans_pytorch", reason="needs the extra `bench`")
    settings = ({"gates": 1, "chunk": 16}, {"gates": 16, "chunk": 0})
    rows = run_cases([tiny(TITANS_PYTORCH, **setting) for setting in settings], LIMITS)
    assert [row["status"] for row in rows] == ["measured", "measured"]
    assert all(row["seconds"] > 0 and row["version"] for row in rows)


def test_a_case_that_does_not_run_says_why() -> None:
    wrong = run_cases([tiny(setting="nothing")], LIMITS)[0]
    assert (wrong["status"], wrong["reason"][:11]) == ("failed", "ValueError:")
    large = run_cases([tiny(length=1_000_000, part="scan")], replace(LIMITS, gigabytes=0.2))[0]
    assert large["status"] == "out of memory"
    assert large["reason"].endswith("would pass --limit-gigabytes")
    assert "seconds" not in large


@pytest.mark.parametrize(("seconds", "words"), [(0.01, "takes more than --limit-seconds 0.01"), (60.0, None)])
def test_a_case_over_its_time_gives_no_number(seconds: float, words: str | None) -> None:
    slow = tiny(part="scan", setting="oracle", length=2_048 if words else 64)
    row = run_cases([slow], replace(LIMITS, seconds=seconds))[0]
    assert (row["status"], row["reason"]) == ("not run" if words else "measured", words)


def test_cases_in_turn_end_each_by_itself() -> None:
    """One that fails and one that is too slow leave the others their repeats."""
    cases = [tiny(), tiny(setting="nothing"), tiny(part="scan", setting="native")]
    rows = run_cases(cases, LIMITS)
    assert [row["status"] for row in rows] == ["measured", "failed", "measured"]
    assert [len(row["all_seconds"]) for row in rows[::2]] == [LIMITS.repeats] * 2


def test_targets_are_judged_by_repeats_taken_in_turn() -> None:
    def row(implementation: str, setting: str, seconds: list[float], peak: float) -> dict[str, Any]:
        case = tiny(implementation, length=256, setting=setting, device="cpu", part="layer")
        measured = {"status": "measured", "finite": True, "reason": None, "peak_bytes": peak, "version": None}
        median = sorted(seconds)[len(seconds) // 2]
        speed = {"seconds": median, "tokens_per_second": 1.0, "all_seconds": seconds}
        return {"name": case.name, **asdict(case), **measured, **speed}

    ours = row(OURS, "auto", [1.0, 3.0, 1.0], 20e6)  # the second repeats met a busy machine
    theirs = row(TITANS_PYTORCH, "chunk_size=1 batch_size=16", [120.0, 330.0, 90.0], 400e6)
    facts = dict.fromkeys(("device", "threads", "torch", "commit", "date", "command"), "x")
    said = markdown({**facts, "device_kind": "cpu", "rows": [ours, theirs]}).partition("## Targets")[2]
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "T = 256, chunk_size=1 batch_size=16 time >= 100x 110.0x reached" in lines
    assert "T = 256, chunk_size=1 batch_size=16 peak memory >= 30x 20.0x missed" in lines
    assert any(line.startswith("T = 256 peak memory <= 26.7 MB") and line.endswith("reached") for line in lines)


def test_a_process_that_dies_is_a_failed_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif 'torch' not in sys.modules: os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = run_cases([tiny()], LIMITS)[0]
    assert (row["status"], row["reason"]) == ("failed", "the process ended with status 7: no message")


def test_each_fault_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*words: object) -> str:
        assert status_of(efficiency.main, *words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    here = ("memory", "--output", tmp_path / "out")
    commands = "memory, context, gpu"
    assert says("speed") == f"error: there is no command 'speed'; give one of {commands}"
    assert "--lengths is (0,)" in says(*here, "--lengths", 0)
    assert "--repeats is 0" in says(*here, "--repeats", 0)
    assert "--limit-seconds is 0.0" in says(*here, "--limit-seconds", 0)
    assert "--depth is 5" in says(*here, "--depth", 5)
    assert "--width is 33" in says(*here, "--width", 33)
    assert "--only nothing-like-it matches no case" in says(*here, "--only", "nothing-like-it")
    if not torch.cuda.is_available():
        assert "torch finds no GPU" in says(*here, "--device", "cuda")
    assert not (tmp_path / "out").exists(), "a fault left files behind"


def test_help_is_quick_and_documents_every_setting() -> None:
    for words, said in (((), "memory"), (("memory",), "--limit-gigabytes")):
        text, imported = help_of("evals.efficiency", *words)
        assert said in text
        assert "torch" not in imported


def test_settings_refuse_an_empty_list_of_lengths() -> None:
    with pytest.raises(EvaluationError, match="--lengths is empty"):
        MemorySettings(Path(), lengths=())
