"""launch/gpu_check.sh where there is no GPU: what it would run, what it refuses, and all of it at a tiny size."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.efficiency.gpu import SCANS, SECONDS, GpuSettings, Step, _CheckPart, plan
from evals.efficiency.gpu_jobs import KINDS
from pretrain.config.command_line import parse
from pretrain.config.files import preset_names

ROOT = Path(__file__).parents[1]
# Of this project's packages those that a lent machine lacks.
ABSENT = ("zstandard", "datasets", "wandb", "matplotlib", "accelerate", "lm_eval", "sklearn", "titans_pytorch")


def gpu_check(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=3600, env=os.environ | variables)


def rows_of(output: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"{part}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("part", SECONDS)
def test_every_command_is_one_that_there_is(part: str, tiny: bool, tmp_path: Path) -> None:
    for step in (step for group in plan(part, tmp_path, tmp_path, tiny=tiny) for step in group):
        assert 0 < step.seconds < SECONDS[part]
        if "evals.efficiency.gpu_jobs" in step.words:
            kind, *names = [*step.words, *step.results][step.words.index("evals.efficiency.gpu_jobs") + 1 :]
            assert kind in KINDS
            for name in names if kind in ("training", "reading") else ():
                assert name == "--tiny" or name.split("-")[0] in preset_names()
        for word in step.words:
            assert not word.startswith("launch/") or (ROOT / word).is_file()


def test_every_memory_of_a_preset_is_compared() -> None:
    for preset in preset_names():
        model = parse(["--config", preset, "--run-dir", "-", "--model.vocab-size", "32000"]).config.model
        if any(mixer.memory for mixer in model.mixers):
            width, depth = model.memory_shape.width, model.memory_depth
            sizes = f"-D{width}-L{depth}-F{model.memory_widths[1]}-b{model.chunk_size}"
            kind = "-plain" * (model.memory_network == "plain") + "-keeping" * (not model.memory_forgetting)
            assert any(scan.endswith(sizes + kind) for scan in SCANS), preset


def test_the_printed_plan_is_what_would_run() -> None:
    planned = gpu_check("--part", "right", "--dry-run").stdout
    for words in (
        "DISABLE_MMA_V3=1 python -m evals.efficiency.gpu_jobs gradients B1-T4096-H24-D64-L2-F256-b16 ",
        "DISABLE_MMA_V3=0 python -m evals.efficiency.gpu_jobs gradients B1-T4096-H24-D64-L2-F256-b16 ",
        "python -m pytest -v -p no:cacheprovider -n 12 tests/kernels tests/attention ",
    ):
        assert f"\n{words}" in planned
    fast = gpu_check("--part", "fast", "--dry-run").stdout
    for preset in ("transformer_340m", "mag_340m", "lmm_340m", "mac_340m", "transformer_760m", "mag_760m"):
        assert f" {preset}-B1 {preset}-B4 " in fast
    assert "mag_340m-L4-T2097152" in gpu_check("--part", "endurance", "--dry-run").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = gpu_check("--part", "right", "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [(), ("--part", "speed"), ("--part", "fast", "--steps", "3")])
def test_a_mistake_ends_with_2(words: tuple[str, ...]) -> None:
    assert gpu_check(*words).returncode == 2


ANSWER = """
import json, os, sys
for name in sys.argv[1:]:
    if name == "dies":
        os.kill(os.getpid(), 11)
    print(json.dumps({"name": name, "status": "measured", "right": name != "wrong"}), flush=True)
    if name == "hangs":
        import time
        time.sleep(60)
"""


def run_part(tmp_path: Path, *steps: Step, deadline_seconds: float = 30.0) -> tuple[int, list[tuple[str, str]]]:
    """Status of a part of these steps, rehearsed, and its results with what became of them."""
    part = _CheckPart(GpuSettings("right", tmp_path), time.monotonic())
    part.deadline = part.began + deadline_seconds
    status = part.run([[step] for step in steps])
    return status, [(row["name"], row["status"]) for row in rows_of(tmp_path, "right")]


def answering(*names: str, seconds: float = 20.0) -> Step:
    return Step("job", ("python", "-c", ANSWER), seconds, names)


def test_a_process_that_dies_costs_one_result(tmp_path: Path) -> None:
    status, found = run_part(tmp_path, answering("a", "dies", "b", "c"))
    assert found == [("a", "measured"), ("job dies", "failed"), ("b", "measured"), ("c", "measured")]
    assert status == 1


def test_what_takes_too_long_is_ended_and_the_next_begins(tmp_path: Path) -> None:
    steps = (Step("long", ("sleep", "60"), 0.5), answering("a", "hangs", "b", seconds=5.0), answering("c"))
    status, found = run_part(tmp_path, *steps)
    ended = [("long", "not run"), ("a", "measured"), ("hangs", "measured"), ("job b", "not run"), ("c", "measured")]
    assert found == ended
    assert status == 0


def test_nothing_begins_when_the_part_is_over(tmp_path: Path) -> None:
    _, found = run_part(tmp_path, Step("long", ("sleep", "60"), 40.0), answering("a"), deadline_seconds=1.0)
    assert found == [("long", "not run"), ("job", "not run")]
    assert "no time is left" in (tmp_path / "right.jsonl").read_text()


def test_a_command_that_fails_says_why_and_a_missing_one_fails_nothing(tmp_path: Path) -> None:
    failing = Step("failing", ("python", "-c", "raise SystemExit('no such thing')"), 20.0)
    assert run_part(tmp_path, failing) == (1, [("failing", "failed")])
    assert "no such thing" in (tmp_path / "right.jsonl").read_text()
    assert run_part(tmp_path, Step("missing", ("no-such-program",), 20.0)) == (0, [("missing", "not run")])


@pytest.mark.parametrize(("with_wgmma", "chosen", "status"), [("a", "0", 0), ("wrong", "1", 0), ("dies", "1", 1)])
def test_wgmma_is_left_out_unless_all_is_right_with_it(
    with_wgmma: str, chosen: str, status: int, tmp_path: Path
) -> None:
    code = ANSWER.replace('"right"', '"variables": {"DISABLE_MMA_V3": os.environ["DISABLE_MMA_V3"]}, "right"')
    words = ("python", "-c", code)
    steps = [
        Step("gradients, with wgmma", words, 20.0, (with_wgmma,), {"DISABLE_MMA_V3": "0"}),
        Step("gradients, without wgmma", words, 20.0, ("a",), {"DISABLE_MMA_V3": "1"}),
        Step("later", ("python", "-c", ANSWER.replace('"measured"', 'os.environ["DISABLE_MMA_V3"]')), 20.0, ("after",)),
    ]
    part = _CheckPart(GpuSettings("right", tmp_path), time.monotonic())
    assert part.run([steps[:2], steps[2:]]) == status
    found = rows_of(tmp_path, "right")
    assert (found[-1]["name"], found[-1]["status"]) == ("after", chosen)


def test_what_it_runs_is_imported_without_packages_that_a_lent_machine_lacks(absent: str) -> None:
    modules = "evals.efficiency.gpu_jobs, evals.efficiency.memory, evals.efficiency.worker, evals.efficiency.context"
    modules += ", tokenization.train, tokenization.encode, pretrain.train, pretrain.launch.__main__"
    command = [sys.executable, "-c", f"import {modules}"]
    path = os.pathsep.join([str(ROOT), absent])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def absent(tmp_path: Path) -> str:
    """A folder in front of the packages where those of ABSENT are not installed."""
    folder = tmp_path / "absent"
    folder.mkdir()
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('hidden by a test', name={name!r})")
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kernels_compiled_beforehand_are_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evals.efficiency.gpu_cache", str(tmp_path), "B1-T32-H1-D16-L1-F16-b16"]
    written = []
    for _ in range(2):
        subprocess.run(command, check=True, cwd=ROOT, timeout=3000)
        written.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")})
    assert len(written[0]) == 2 * 6  # with wgmma and without
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", SECONDS)
def test_a_rehearsal_runs_every_command_and_writes_every_result(part: str, absent: str, tmp_path: Path) -> None:
    done = gpu_check("--part", part, "--rehearse", "--output", str(tmp_path / "out"), PYTHONPATH=absent)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "out", part)
    asked = [step for group in plan(part, tmp_path, tmp_path, tiny=True) for step in group]
    elsewhere = {step.name for step in asked if step.words[0] in ("compute-sanitizer", "ncu")}
    measured = [row for row in rows if row["status"] == "measured"]
    assert {row["name"] for row in rows} - {row["name"] for row in measured} <= elsewhere
    chosen = 1 if part == "right" else 0
    assert len(rows) == sum(len(step.results) or 1 for step in asked) + chosen
    for row in rows:
        assert {"commit", "device", "versions", "at_seconds"} <= row.keys()
        assert "command" in row or row["name"] == "products"
