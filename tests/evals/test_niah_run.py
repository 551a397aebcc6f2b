"""Real tiny models: pieces, constant state, resuming after any interruption, what is kept apart."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.command_line import EvaluationError
from evals.models import EvalModel, load_model
from evals.niah import NiahSettings
from evals.niah.run import evaluate
from evals.niah.summary import NeedleResult
from evals.record_file import RecordFile

from .conftest import MakeRun
from .planted import plant

REPOSITORY = Path(__file__).parents[2]
COSTS = {
    *("batch", "prefill_tokens", "prefill_seconds", "decode_ms_per_token", "seconds"),
    *("peak_bytes", "state_bytes_per_sample"),
}


def results(folder: Path) -> list[dict[str, Any]]:
    """Records without what differs between machines and batches, sorted."""
    lines = [json.loads(line) for line in (folder / "niah.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in COSTS} for line in lines]
    for line in kept:
        line["value_loss"] = round(line["value_loss"], 3)  # sums of other orders
    return sorted(kept, key=lambda line: (line["control"], *(line[n] for n in ("task", "length", "depth", "sample"))))


def report_of(model: EvalModel, settings: NiahSettings) -> dict[str, Any]:
    report = evaluate(model, settings)
    assert report is not None
    return report


@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_answers_do_not_depend_on_the_pieces(make_run: MakeRun, tmp_path: Path, variant: str) -> None:
    model = load_model(make_run(variant))
    common = NiahSettings(Path(), tmp_path / "0", lengths=(420,), depths=2, max_new_tokens=12)
    for piece in (64, 37, 4096):
        evaluate(model, replace(common, output=tmp_path / str(piece), piece=piece))
    assert results(tmp_path / "64") == results(tmp_path / "37") == results(tmp_path / "4096")
    assert len({line["answer"] for line in results(tmp_path / "64")} - {""}) > 0


@pytest.mark.parametrize(("variant", "window", "constant"), [("mac", 64, True), ("mag", 64, True), ("mag", 0, False)])
def test_state_is_as_large_after_8k_tokens_as_after_1k(
    make_run: MakeRun, tmp_path: Path, variant: str, window: int, constant: bool
) -> None:
    run = make_run(variant, window=window)
    settings = NiahSettings(run, tmp_path, lengths=(1024, 8192), depths=1, piece=512, max_new_tokens=2)
    short, long = report_of(load_model(run), settings)["by_length"]
    assert short["state_bytes_per_sample"] > 0
    assert (short["state_bytes_per_sample"] == long["state_bytes_per_sample"]) is constant
    assert short["peak_bytes"] > 0
    assert short["prefill_tokens_per_second"] > 0


def test_killed_run_goes_on_to_the_same_results(mac_run: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    settings = NiahSettings(mac_run, whole, lengths=(450, 600), depths=3, samples=4, max_new_tokens=12, batch=1)
    evaluate(load_model(mac_run), settings)
    grid = ["--lengths", "450", "600", "--depths", "3", "--samples", "4", "--max-new-tokens", "12", "--batch", "1"]
    command = [sys.executable, "-m", "evals.niah", "--checkpoint", mac_run, "--output", killed, *grid]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    file = killed / "niah.jsonl"
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 2):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = file.read_bytes()
    assert 2 <= finished.count(b"\n") < 24, "killed too late to show anything"
    with file.open("ab") as stream:
        stream.write(finished.splitlines()[0][:40])
    evaluate(load_model(mac_run), replace(settings, output=killed, batch=16))
    assert file.read_bytes().startswith(finished[: finished.rindex(b"\n") + 1]), "finished lines were run again"
    assert results(killed) == results(whole)


def test_finished_samples_are_not_run_again_and_new_ones_are_added(tokenizer: Path, tmp_path: Path) -> None:
    first = plant(tokenizer, lambda value: value)
    settings = NiahSettings(Path(), tmp_path, lengths=(420,), depths=2, max_new_tokens=32)
    evaluate(first, settings)
    again = plant(tokenizer, lambda value: "never asked")
    assert report_of(again, settings)["accuracy_by_length"] == {"niah_single_1": {"420": 1.0}}
    assert again.network.pieces == []  # type: ignore[attr-defined]
    report = report_of(again, replace(settings, seed=1))
    assert report["accuracy_by_length"] == {"niah_single_1": {"420": 0.5}}
    assert report["by_length"][0]["n"] == 4
    assert report["seeds"] == [0, 1]


def test_results_of_other_weights_are_left_out(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = NiahSettings(Path(), tmp_path, lengths=(420,), depths=2, max_new_tokens=32)
    evaluate(plant(tokenizer, lambda value: value), settings)
    other = replace(plant(tokenizer, lambda value: "nothing"), checkpoint_sha256="1" * 64)
    report = report_of(other, settings)
    assert report["accuracy_by_length"] == {"niah_single_1": {"420": 0.0}}
    assert report["by_length"][0]["n"] == 2
    assert "2 results of other weights" in capsys.readouterr().err


def test_results_of_another_text_or_filling_are_left_out(tokenizer: Path, tmp_path: Path) -> None:
    oracle = plant(tokenizer, lambda value: value)
    settings = NiahSettings(Path(), tmp_path, ("pk", "n"), lengths=(4500,), depths=2, max_new_tokens=32)
    report = report_of(oracle, settings)
    assert [(row["task"], row["n"]) for row in report["by_length"]] == [("niah_single_1", 2), ("niah_single_2", 2)]
    (tmp_path / "text.txt").write_text("Somebody wrote this. Somebody else read it. " * 20)
    of_text = report_of(oracle, replace(settings, tasks=("n",), depths=1, text=tmp_path / "text.txt"))
    assert [(row["task"], row["n"]) for row in of_text["by_length"]] == [("niah_single_1", 2), ("niah_single_2", 1)]
    assert of_text["haystacks"]["niah_single_2"]["label"] == "file"
    file = tmp_path / "niah.jsonl"
    file.write_text(file.read_text().replace('"fill": "exact"', '"fill": "ruler_2024"', 1))  # an earlier version's
    other = report_of(oracle, replace(settings, tasks=("n",), depths=1))
    assert [(row["task"], row["n"]) for row in other["by_length"]] == [("niah_single_1", 1), ("niah_single_2", 3)]


def test_results_of_other_words_are_left_out_and_the_report_names_them(tokenizer: Path, tmp_path: Path) -> None:
    oracle = plant(tokenizer, lambda value: value)
    settings = NiahSettings(Path(), tmp_path / "out", lengths=(700,), depths=1)
    assert report_of(oracle, settings)["words"] == "own"
    for name in ("adjectivelist.txt", "nounlist.txt"):
        (tmp_path / name).write_text("\n".join(f"{name[0]}word{number}" for number in range(9)))
    of_lists = report_of(oracle, replace(settings, words=tmp_path, seed=1))
    assert of_lists["by_length"][0]["n"] == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "niah.jsonl").read_text().splitlines()]
    assert [record["words"] for record in records] == ["own", of_lists["words"]]
    assert records[1]["needle_key"].startswith("aword")
    assert of_lists["words"] in (tmp_path / "out" / "niah.md").read_text()


def test_interrupt_keeps_finished_batches(tokenizer: Path, tmp_path: Path) -> None:
    model = plant(tokenizer, lambda value: value)
    replies = iter([lambda value: value] * 3)

    def interrupt(value: str) -> str:
        reply = next(replies, None) if value else str
        if reply is None:
            raise KeyboardInterrupt
        return reply(value)

    model.network.reply = interrupt  # type: ignore[attr-defined]
    settings = NiahSettings(Path(), tmp_path, lengths=(1000,), depths=5, batch=1, max_new_tokens=32)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, settings)
    assert len(results(tmp_path)) == 3
    assert report_of(plant(tokenizer, lambda value: value), settings)["by_length"][0]["n"] == 5


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "niah.jsonl"
    with RecordFile(path, NeedleResult), pytest.raises(EvaluationError, match="another evaluation is writing"):
        RecordFile(path, NeedleResult)
    with RecordFile(path, NeedleResult):
        pass


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "niah.jsonl"
    path.write_text('{"length": 3}\n')
    with pytest.raises(EvaluationError, match=r"niah.jsonl, line 1: not a result"):
        RecordFile(path, NeedleResult)
    assert path.read_text() == '{"length": 3}\n'


def test_results_of_an_earlier_version_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    model, settings = plant(tokenizer, str), NiahSettings(Path(), tmp_path, lengths=(700,), depths=1, max_new_tokens=32)
    evaluate(model, settings)
    record = json.loads((tmp_path / "niah.jsonl").read_text())
    earlier = {name: value for name, value in record.items() if name not in ("control", "fill", "prompt_sha256")}
    (tmp_path / "niah.jsonl").write_text(json.dumps(earlier) + "\n")
    with pytest.raises(EvaluationError, match=r"its fields are not those of this version.* give another --output"):
        evaluate(model, settings)


def test_results_that_a_stopped_process_left_are_taken_over(tokenizer: Path, tmp_path: Path) -> None:
    model = plant(tokenizer, lambda value: value)
    settings = NiahSettings(Path(), tmp_path, lengths=(700,), depths=4, max_new_tokens=32)
    evaluate(model, settings)
    lines = (tmp_path / "niah.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "niah.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "niah.rank-1.jsonl").write_text("".join(lines[1:]))  # one of them taken over already
    again = plant(tokenizer, lambda value: "never asked")
    report = report_of(again, settings)
    assert (report["by_length"][0]["n"], report["by_length"][0]["accuracy"]) == (4, 1.0)
    assert again.network.pieces == []  # type: ignore[attr-defined]
    assert not (tmp_path / "niah.rank-1.jsonl").exists()


def test_logits_that_are_not_finite_are_no_answer(tokenizer: Path, tmp_path: Path) -> None:
    class Broken:
        def stream(self, tokens: torch.Tensor, states: Any, last: int | None = None) -> tuple[torch.Tensor, Any]:
            return torch.full((len(tokens), 1, 360), torch.nan), []

    model = replace(plant(tokenizer, str), network=Broken())
    with pytest.raises(EvaluationError, match="not finite"):
        evaluate(model, NiahSettings(Path(), tmp_path, lengths=(420,), max_new_tokens=32))
    assert (tmp_path / "niah.jsonl").read_bytes() == b""
