"""Everything that needs a GPU, in three parts of a few minutes each: `bash launch/gpu_check.sh --part right`.

A part is a plan of commands. Most are evals.efficiency.gpu_jobs, which says on its standard output what it has found, a
line of JSON for each result; of the others the status, the seconds and the last lines are the result. Each result is
shown and appended to OUTPUT/PART.jsonl as it comes, so that a run that is cut off has lost nothing. A command that
takes too long is ended and the next one begins.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from evals.command_line import EvaluationError, python_path

SECONDS = {"right": 240, "fast": 270, "endurance": 200}
"""Of each part, all in all: the minutes of a machine that is lent are counted."""
_SPARE_SECONDS = 5.0  # of a part's, to write what was found
_ROOT = Path(__file__).parents[2]
_PYTHON = ("python", "-m")
_JOBS = (*_PYTHON, "evals.efficiency.gpu_jobs")
_LINES_KEPT = 5
_OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
SCANS = (
    "B1-T4096-H24-D64-L2-F256-b16",  # of the paper's sizes
    "B1-T4096-H4-D64-L2-F256-b32-keeping",  # of recall
    "B1-T4096-H4-D128-L1-F128-b32-plain-keeping",  # of the quickstart
    "B1-T4096-H24-D64-L1-F64-b16",
    "B1-T4096-H24-D64-L2-F64-b64",
    "B1-T4096-H8-D128-L2-F256-b16",
)
_TINY_SCANS = ("B1-T32-H1-D16-L2-F64-b16", "B1-T32-H1-D16-L1-F16-b16-plain-keeping")
_TIMED = (
    *(f"B{batch}-T4096-H16-D64-L2-F256-b16" for batch in (1, 4, 8)),
    *(f"B{batch}-T4096-H24-D64-L2-F256-b16" for batch in (1, 5)),
    "B1-T32768-H16-D64-L2-F256-b16",
)
_OURS, _THEIRS = "titans-mcore layer auto", "titans-pytorch layer chunk_size=16 batch_size=16"
_SMALL_SCAN = "B1-T64-H2-D64-L2-F256-b16"  # for tools that slow everything down
# What is compared most comes first; models of one preset stand together, they are built once.
_TRAINED = tuple(
    f"{preset}-B{batch}"
    for preset in ("transformer_340m", "mag_340m", "transformer_760m", "mag_760m", "lmm_340m", "mac_340m")
    for batch in (1, 4)
)


@dataclass(frozen=True)
class GpuSettings:
    """Checks one part of what needs a GPU: whether results are right, how fast they come, whether they last.

    right: the fused kernels in bfloat16 against float32, with and without wgmma, their times and tests. fast: tokens a
    second of models of 340M and 760M, and beside titans-pytorch. endurance: two million tokens through a memory, and
    a run that is stopped and goes on. Writes OUTPUT/PART.jsonl, a line for each result.
    """

    part: Literal["right", "fast", "endurance"]
    """Which one. They take 240, 270 and 200 seconds at most."""
    output: Path = Path("gpu_check")
    """Folder for results and logs."""
    rehearse: bool = False
    """Run every command at a tiny size on the CPU: shows that it runs, its numbers mean nothing."""
    dry_run: bool = False
    """Print the commands and do nothing."""


@dataclass(frozen=True)
class Step:
    """A command of the plan.

    Attributes:
        name: In results and of its log.
        words: The command; `python` is this interpreter.
        seconds: What it may take at most.
        results: Names of what it is to find, the last words of its command; empty where its status is the result. Where
            it ends before all are found, it is started again with those behind the one it ended at.
        variables: Of its environment.
    """

    name: str
    words: tuple[str, ...]
    seconds: float
    results: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def command(self, results: Sequence[str]) -> list[str]:
        """What is run to find these results."""
        return [sys.executable if word == "python" else word for word in (*self.words, *results)]

    def text(self) -> str:
        """The command as one may type it."""
        assigned = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.variables.items())
        return f"{assigned} {shlex.join([*self.words, *self.results])}".strip()


def plan(part: str, output: Path, work: Path, *, tiny: bool) -> list[list[Step]]:
    """The steps of a part, in groups that run side by side.

    Args:
        part: Which one.
        output: For what the commands write and is kept.
        work: For what they write and is not: a run has gigabytes.
        tiny: Whether to rehearse on a CPU: the same commands, small.
    """
    if part == "right":
        return _right(tiny)
    return _fast(output, tiny) if part == "fast" else _endurance(work, tiny)


def _right(tiny: bool) -> list[list[Step]]:
    """What helps against wrong code is chosen from the second group, and the later ones run with it."""
    interpreted = {"TRITON_INTERPRET": "1"} if tiny else {}
    compared = [
        Step(f"gradients, {without} wgmma", (*_JOBS, "gradients"), 120, scans, {"DISABLE_MMA_V3": value} | interpreted)
        for value, without in (("1", "without"), ("0", "with"))
        # On a GPU most of the time goes into compiling, on one core each.
        for scans in ([_TINY_SCANS] if tiny else [(scan,) for scan in SCANS])
    ]
    checker = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *_JOBS, "gradients")
    # What is only compiled there shows nothing here.
    where = ("tests/kernels", "tests/attention", "--ignore", "tests/kernels/test_compile.py")
    tests = (*_PYTHON, "pytest", "-v", "-p", "no:cacheprovider", "-n", "1" if tiny else "12", *where, "-k")
    chosen = "products_in_bfloat16 and B1-T48-H1-D16-L2 and plain" if tiny else "bfloat16 or oracle or flash_equals"
    return [
        [Step("facts", (*_JOBS, "facts"), 40, ("here",))],
        compared,
        [Step("timings", (*_JOBS, "timings"), 75, _TINY_SCANS if tiny else _TIMED)],
        [Step("memcheck", (*checker, _SMALL_SCAN), 45)],
        [Step("tests", (*tests, chosen), 150)],
    ]


def _fast(output: Path, tiny: bool) -> list[list[Step]]:
    trained = ("mag_340m-B1", "mag_340m-B2", "transformer_340m-B1") if tiny else _TRAINED
    training = (*_JOBS, "training", *(("--tiny",) if tiny else ()))
    kind = ("--quick", "--device", "cpu") if tiny else ("--device", "cuda")
    size = ("--batch", "1", "--heads", "16", "--lengths", "4096", "--repeats", "5", "--limit-seconds", "45")
    only = ("--only", _OURS, _THEIRS)
    beside = (*_PYTHON, "evals.efficiency", "memory", "--output", str(output / "beside"), *size, *kind, *only)
    kernels = ("--kernel-name", "regex:walk_kernel|chain_backward_kernel", "--launch-count", "3")
    return [
        [Step("training", training, 200, trained)],
        [Step("memory beside titans-pytorch", beside, 90)],
        [Step("ncu", ("ncu", "--set", "basic", *kernels, *_JOBS, "timings", _SMALL_SCAN), 45)],
    ]


def _endurance(work: Path, tiny: bool) -> list[list[Step]]:
    shards, tokenizer, cores = work / "shards", work / "tokenizer.model", len(os.sched_getaffinity(0))
    text = ("--input", "stdlib")  # is there wherever Python is
    pieces = "2048" if tiny else "32000"
    made = (*_PYTHON, "tokenization.train", *text, "--vocab-size", pieces, "--output", str(tokenizer))
    cut = (*_PYTHON, "tokenization.encode", *text, "--tokenizer", str(tokenizer), "--output", str(shards))
    lengths = ("4096", "8192") if tiny else ("65536", "2097152")
    reading = (*_JOBS, "reading", *(("--tiny",) if tiny else ()))
    blocks = ("--model.num-layers", "1", "--model.dim", "64", "--model.num-heads", "4", "--model.ffn-dim", "64")
    rows = ("--model.window", "64", "--model.persistent-tokens", "4", "--train.sequence-length", "256")
    named = ("--config", "mag_340m", "--run-dir", str(work / "run"), "--nproc", "1", "--data.path", str(shards))
    batch = ("--train.global-batch", "4", "--train.micro-batch", "4", "--schedule.warmup-steps", "2")
    rarely = ("--evaluate.heldout-sequences", "0", "--checkpoint.every-steps", "0")
    run = ("bash", "launch/torchrun.sh", *named, *batch, *rarely, *((*blocks, *rows) if tiny else ()), "--train.steps")
    half, whole = ("2", "4") if tiny else ("10", "20")
    threads = {"OMP_NUM_THREADS": str(cores)}  # torchrun.sh takes 1, with which initial weights take a while
    return [
        [
            Step("reading", reading, 110, tuple(f"mag_340m-L4-T{length}" for length in lengths)),
            Step("tokenizer", made, 60),
        ],
        [Step("shards", (*cut, "--workers", str(min(8, cores))), 60)],
        [Step("train", (*run, half), 90, variables=threads)],
        [Step("train, resumed", (*run, whole, "--verify-resume"), 90, variables=threads)],
        [Step("its steps", (*_JOBS, "steps"), 20, (str(work / "run"),))],
    ]


def measure(settings: GpuSettings) -> int:
    """Runs a part.

    Returns:
        0, or 1 where a command failed or a result is wrong; what could not run here fails nothing.

    Raises:
        EvaluationError: There is no GPU, and it is not a rehearsal.
    """
    began = time.monotonic()  # torch, too, takes its time to be imported
    asked = partial(plan, settings.part, settings.output.resolve(), tiny=settings.rehearse)
    if settings.dry_run:
        for group in asked(Path("WORK")):
            print("\n".join(f"{step.text()}  # at most {step.seconds:g} s" for step in group))
        return 0
    if not settings.rehearse:
        import torch

        if not torch.cuda.is_available():
            raise EvaluationError(f"{sys.executable} finds no CUDA device through torch; give --rehearse or --dry-run")
    settings.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as work:
        return _CheckPart(settings, began).run(asked(Path(work)))


class _CheckPart:
    """A part that is under way."""

    def __init__(self, settings: GpuSettings, began: float) -> None:
        from evals.measure import source_commit

        self.began, self.output, self.tiny = began, settings.output, settings.rehearse
        # A rehearsal proves that commands run, on however slow a machine.
        self.deadline = self.began + SECONDS[settings.part] * (20 if self.tiny else 1) - _SPARE_SECONDS
        self.file = self.output / f"{settings.part}.jsonl"
        self.file.write_text("")
        self.commit, self.rows, self.lock = source_commit(), list[dict[str, Any]](), threading.Lock()
        self.variables: dict[str, str] = {"PYTHON": sys.executable, "PYTHONPATH": python_path()}
        if self.tiny:
            self.variables["CUDA_VISIBLE_DEVICES"] = ""
        self.device: dict[str, Any] = {}
        self.processes: set[subprocess.Popen[str]] = set()

    def run(self, groups: list[list[Step]]) -> int:
        """Runs the groups one after the other; see `measure` for what it returns."""
        for group in groups:
            pool = ThreadPoolExecutor(1 if self.tiny else len(group))
            try:
                list(pool.map(self.step, group))
            except BaseException:  # after Ctrl-C nothing may go on
                self.deadline = 0.0
                for process in list(self.processes):
                    _end(process)
                raise
            finally:
                pool.shutdown(cancel_futures=True)
            if any("wgmma" in step.name for step in group):
                self.choose_products()
        print(self.file)
        chosen = self.variables.get("DISABLE_MMA_V3")
        wrong = any(row.get("right") is False and self.products_of(row) == chosen for row in self.rows)
        return int(wrong or any(row["status"] == "failed" for row in self.rows))

    def choose_products(self) -> None:
        """From here on with wgmma if all that is right without it is so with it."""
        rows = [row for row in self.rows if row.get("right")]
        right = {value: {row["name"] for row in rows if self.products_of(row) == value} for value in "01"}
        chosen = "0" if right["1"] <= right["0"] and right["0"] else "1"
        self.variables["DISABLE_MMA_V3"] = chosen
        found = {"right_with_wgmma": len(right["0"]), "right_without": len(right["1"])}
        self.add({"name": "products", "status": "measured", **found, "DISABLE_MMA_V3": chosen})

    @staticmethod
    def products_of(row: dict[str, Any]) -> str | None:
        return row.get("variables", {}).get("DISABLE_MMA_V3")

    def step(self, step: Step) -> None:
        """Runs a step to its end, or until its time is over."""
        program = step.words[0]
        if program != "python" and shutil.which(program) is None:
            missing = {"reason": f"{program} is not installed", "command": step.text()}
            self.add({"name": step.name, "status": "not run", **missing})
            return
        self.log(step).unlink(missing_ok=True)
        over = min(time.monotonic() + step.seconds * (20 if self.tiny else 1), self.deadline)
        waiting = list(step.results)
        while True:
            if time.monotonic() >= min(over, self.deadline):
                row = {"name": step.name, "status": "not run", "reason": "no time is left", "missing": waiting}
                self.add({**row, "command": step.text()})
                return
            ended = self.process(step, waiting, over)
            if ended["status"] == "measured" or not waiting:
                if not step.results or ended["status"] != "measured":
                    self.add(ended)
                return
            self.add({**ended, "name": f"{step.name} {waiting.pop(0)}"})
            if not waiting:
                return

    def log(self, step: Step) -> Path:
        """Where a step's lines go; those that run side by side each have their own."""
        words = [step.name, *step.results] if "wgmma" in step.name else [step.name]
        return self.output / f"{re.sub('[^A-Za-z0-9]+', '-', ' '.join(words))}.log"

    def process(self, step: Step, waiting: list[str], over: float) -> dict[str, Any]:
        """One process of a step: takes from `waiting` what is found, and returns how it ended."""
        began, log = time.monotonic(), self.log(step)
        with log.open("a") as errors:
            process = subprocess.Popen(
                step.command(waiting),
                cwd=_ROOT,
                env={**os.environ, **self.variables, **step.variables},
                stdout=subprocess.PIPE,
                stderr=errors if step.results else subprocess.STDOUT,
                text=True,
                start_new_session=True,  # with all that it starts it can be ended
            )
            timer = threading.Timer(max(over - began, 0.0), _end, (process,))
            timer.start()
            self.processes.add(process)
            assert process.stdout is not None
            for line in process.stdout:
                if step.results and line.startswith("{"):
                    found = json.loads(line)
                    with self.lock:
                        waiting.pop(0)
                    self.add({**found, "command": step.text()})
                    continue
                errors.write(line)
                errors.flush()
            status = process.wait()
            in_time = timer.is_alive()
            timer.cancel()
            self.processes.discard(process)
        text = log.read_text(errors="replace")
        last = [line[:300] for line in text.splitlines()[-_LINES_KEPT:]]
        seconds = round(time.monotonic() - began, 1)
        ended: dict[str, Any] = {"name": step.name, "command": step.text(), "seconds": seconds}
        if "pytest" in step.words:  # also where it was ended before its last line
            ended |= {outcome.lower(): len(re.findall(rf"] {outcome} tests", text)) for outcome in _OUTCOMES}
        if status == 0:
            return {**ended, "status": "measured", "last_lines": last}
        reason = f"ended with status {status}" if in_time else "took too long and was ended"
        return {**ended, "status": "failed" if in_time else "not run", "reason": reason, "last_lines": last}

    def add(self, row: dict[str, Any]) -> None:
        """Writes a result and shows it in a line."""
        with self.lock:
            # What measures says what it runs on; for all other commands that is the same.
            self.device |= {name: row[name] for name in ("device", "cuda", "versions") if name in row}
            at = {"at_seconds": round(time.monotonic() - self.began, 1)}
            row = {"commit": self.commit, **self.device, **row, **at}
            self.rows.append(row)
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
            print(_shown(row), flush=True)


_UNSHOWN = ("name", "commit", "command", "versions", "variables", "device", "cuda", "at_seconds", "errors", "losses")


def _shown(row: dict[str, Any]) -> str:
    """A result in a line: what the file has beside it is the same in all."""
    parts = []
    for name, value in row.items():
        if name == "last_lines" and row["status"] == "failed":
            parts.append(" | ".join(filter(None, value)))
        elif name not in _UNSHOWN and value is not None and not isinstance(value, list | dict):
            parts.append(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}")
    return f"{row['at_seconds']:6.1f} s  {row['name']}: {', '.join(parts)}"


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends a process with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
