"""The quickstart's parts: lanes of commands, how far they are, and the page. tests/test_readme.py runs it whole."""

import base64
import json
import os
import re
import sys
from pathlib import Path

import pytest

from evals.command_line import EvaluationError
from evals.models import load_model
from evals.niah import NiahSettings
from evals.niah import run as niah
from evals.position_perplexity import PositionPerplexitySettings, evaluate
from evals.quickstart import stages
from evals.quickstart.__main__ import RECALL, TEXT_SHARE, made
from evals.quickstart.page import Page, Results
from evals.quickstart.stages import SECONDS_FILE, Lanes, Show, Stage, niah_progress, training_progress
from pretrain.report.records import METRICS_FILE, line_of, make_record

from .conftest import MakeRun


def python(*codes: str) -> list[list[str]]:
    return [[sys.executable, "-c", code] for code in codes]


def test_lanes_run_side_by_side_and_a_stage_behind_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wait = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)\n"
    touch = "import pathlib; pathlib.Path({!r}).touch()\n"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    there = Stage("there", "There", python("raise SystemExit(9)"), lambda: True)
    first = [
        Stage("first", "First", python(wait.format(b))),
        Stage("second", "Second", python(f"open({b!r})", "print(7)")),
    ]
    Lanes(
        [[there, *first], [Stage("other", "Other", python(touch.format(a) + touch.format(b)))]], Show(tmp_path, False)
    ).finish()
    assert sorted(line.split()[0] for line in (tmp_path / SECONDS_FILE).read_text().splitlines()) == [
        *("first", "other", "second")
    ]
    assert (tmp_path / "log" / "second.txt").read_text() == "7\n"
    out = capsys.readouterr().out
    assert "There: done already" in out
    assert out.index("First: done in") < out.index("Second: done in")


def test_commands_have_the_environment_of_the_start_and_lanes_a_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_ENVIRONMENT", {"PATH": os.environ["PATH"]})
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    asked = python("import os; print(os.environ.get('OMP_NUM_THREADS'))")
    Lanes([[Stage("alone", "Alone", asked)]], Show(tmp_path, False)).finish()
    Lanes([[Stage("one", "One", asked)], [Stage("two", "Two", asked)]], Show(tmp_path, False)).finish()
    said = [(tmp_path / "log" / f"{name}.txt").read_text().strip() for name in ("alone", "one", "two")]
    assert said == ["None", *[str(max(len(os.sched_getaffinity(0)) // 2, 1))] * 2]


def test_a_stage_that_fails_is_named_with_its_first_error_and_those_behind_it_do_not_run(tmp_path: Path) -> None:
    bad = Stage("bad", "Bad", python("import sys; print('much\\nerror: no room'); sys.exit('error: others stopped')"))
    never = Stage("never", "Never", python(f"open({str(tmp_path / 'never')!r}, 'w')"))
    with pytest.raises(EvaluationError, match=r"^Bad ended with status 1: no room; all it said is in .*log/bad.txt$"):
        Lanes([[bad, never]], Show(tmp_path, False)).finish()
    assert not (tmp_path / "never").exists()
    assert not (tmp_path / SECONDS_FILE).exists()


def test_what_was_made_before_the_newest_checkpoint_is_made_again(mac_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert not made(file, mac_run)()
    file.touch()
    assert made(file, mac_run)()
    (mac_run / "checkpoints" / "step-00000001" / "checkpoint.json").touch()
    assert not made(file, mac_run)()


def test_a_training_is_shown_by_its_steps_and_losses(tmp_path: Path) -> None:
    progress = training_progress(tmp_path, lambda: 5.29)
    assert progress() == (0.0, "")
    records = [make_record("attempt", "x", 1, 0, {"resumed_step": 0, "steps": 8})]
    records += [make_record("step", "x", 1, n, {"loss": 8.0 / n, "tokens_per_second": 1234.0}) for n in (1, 2)]
    (tmp_path / METRICS_FILE).write_bytes(b"".join(map(line_of, records)) + b'{"kind": "st')
    share, words = progress()
    assert share == 0.25
    assert words == "loss 4.00 (counting words: 5.29) 1,234 tokens/s"


def test_documents_of_recall_fill_whole_rows() -> None:
    from pretrain.config.files import read_config

    row = read_config("quickstart")[0]["train"]["sequence_length"]
    assert all(row % tokens == 0 for _, tokens, _, _ in RECALL)
    assert TEXT_SHARE + sum(share for _, _, share, _ in RECALL) == pytest.approx(1)


def test_the_page_has_the_numbers_of_the_files(make_run: MakeRun, shards: Path, tmp_path: Path) -> None:
    models = []
    for name, variant in (("Titans & sons", "mag"), ("Transformer++", "transformer")):
        run = make_run(variant)
        model, out, memory = load_model(run), run / "eval", variant == "mag"
        for off in (False, True)[: 1 + memory]:
            output = out / "memory_off" if off else out
            evaluate(model, PositionPerplexitySettings(run, output, shards, length=300, memory_off=off))
        controls: tuple[str, ...] = ("memory_reset",) if memory else ()
        niah.evaluate(
            model,
            NiahSettings(run, out, lengths=(450, 700), depths=2, max_new_tokens=8, controls=controls),  # type: ignore[arg-type]
        )
        done = {"loss": 3.0, "tokens": 9, "tokens_per_second": 5.0}
        (run / METRICS_FILE).write_bytes(line_of(make_record("step", "x", 1, 1, done)))
        models.append(Results(name, run))
    (tmp_path / SECONDS_FILE).write_text("train 3\ntrain 4\n")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "proof.json").write_text('{"max_abs_error": 1e-6}')
    page = Page(tmp_path, models, 6.0, 5.0, [("Said", "a < b & c")])
    page.write()

    content = (tmp_path / "report.html").read_text()
    assert "a &lt; b &amp; c" in content
    image = re.search(r'base64,([^"]+)"', content)
    assert image is not None
    assert base64.b64decode(image[1]).startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in page.figure().axes]
    assert titles[:2] == ["Needles found, Titans & sons", "Needles found, Transformer++"]

    losses = [json.loads((model.run / "eval/position_perplexity.json").read_text())["loss"] for model in models]
    without = json.loads((models[0].run / "eval/memory_off/position_perplexity.json").read_text())["loss"]
    assert without != losses[0]
    head, first, *_ = page.table().splitlines()
    assert [word.strip() for word in head.split("  ")][-3:] == ["Titans & sons", "without its memory", "Transformer++"]
    assert first.split()[-3:] == [f"{loss:.3f}" for loss in (losses[0], without, losses[1])]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["heldout_loss"] == {"Titans & sons": losses[0], "Transformer++": losses[1]}
    assert summary["heldout_loss_memory_off"] == without
    assert set(summary["niah_memory_reset"]) == {"450", "700"}
    assert summary["seconds"] == {"train": 7}

    samples = sum(1 for _ in (models[0].run / "eval/niah.jsonl").open())
    tokens = 2 * 2 * (450 + 700)
    share, words = niah_progress(models[0].run / "eval/niah.jsonl", tokens)()
    assert (samples, share) == (8, 1.0)
    assert words.endswith(" of 4 needles found")
    (tmp_path / "hf" / "proof.json").unlink()
    with pytest.raises(EvaluationError, match=r"proof.json is missing; run the same command again, which writes it"):
        page.write()
