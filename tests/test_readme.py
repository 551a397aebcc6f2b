"""The commands of the READMEs are run as they stand there, with small numbers in place of large ones."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .evals.babi import write_babi, write_books
from .tokenization.test_adopt import make_documents, write_pair

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tokenization", "pretrain", "titans_mcore", "evals", "launch", "tests")
PAGES = [ROOT / "README.md", *(page for room in ROOMS for page in sorted((ROOT / room).rglob("README.md")))]
# The project's own comes first: it makes the shards, the run and the exported folder that the rooms' commands read.

# What a reader fills in, and what would take too long. Everything else is run to the letter.
FILLED_IN = {
    "FILES_OR_FOLDERS": "stdlib",
    "PATH": "text",
    "--vocab-size 32000": "--vocab-size 400",
    "--workers 8": "--workers 2",
    "--lengths 1024 16384": "--lengths 512 1024",
    "--tokens 256 --tokenizer": "--tokens 4096 --tokenizer",  # four hundred pieces are few
    "--tokens 1024 --tokenizer": "--tokens 8192 --tokenizer",
    "--text book.txt --length 2097152 --tokens 2097152": "--text text/argparse.txt --length 512 --tokens 512",
    "--text book.txt --question": "--text text/argparse.txt --question",
    "--pg19 pg19/test": "--pg19 pg19/test --lengths 0 500 --samples 1",
    "mac=runs/mac lmm=runs/lmm": "mac=runs/mine",
    "MAG=runs/a/eval/niah.jsonl MAC=runs/b/eval/niah.jsonl": "MAC=runs/mine/eval/niah.jsonl",
}
SMALL = {
    "launch/quickstart.sh --input": " --steps 2 --lengths 512",
    "launch/quickstart.sh": " --steps 2 --lengths 512 --input text",
    "launch/torchrun.sh": " --train.steps 2 --train.global-batch 4",
    "evals.efficiency memory": " --quick",
    "evals.efficiency context": " --lengths 512 1024",
    "evals.niah --checkpoint": " --samples 1 --depths 2",
    "evals.niah.training_data": " --documents 20",
    "evals.babilong.training_data": " --documents 20",
    "evals.finetune": " --steps 2 --validation 2",
    "launch/recall.sh": " --train.steps 2 --steps 2 --lengths 256 --samples 1",
    "evals.forecasting": " --steps 2 --seeds 0 --systems repeat lmm",
    "evals.genomics": " --steps 2 --seeds 0 --systems lmm cnn",
    "evals.recommendation": " --steps 2 --systems popularity lmm",
    "evals.comparison": " --steps 2 --recall-steps 2 --systems transformer lmm --seeds 0",
}
# The longest that write nothing a later one reads: the whole chain again for another variant and for a whole library in
# place of a few files, training in stages, two systems of the comparison, a process for each case of the benchmark, the
# export's proof again. And those that the quickstart starts too, or a test of their room starts or calls: each loads
# torch and Megatron-core once more.
SLOW = (
    "bash launch/quickstart.sh --",
    "python -m tokenization.encode",
    "bash launch/torchrun.sh --config quickstart",
    "python -m evals.position_perplexity --checkpoint runs/mine --data",
    "python -m evals.niah --checkpoint runs/mine",
    "python -m titans_mcore.hf.convert",
    "bash launch/recall.sh",
    "python -m evals.comparison",
    "python -m evals.efficiency",
    "python -m titans_mcore.hf.verify",
    "python -m titans_mcore.hf.to_native",
    "python -m tokenization.verify",
    "python -m tokenization.trace",
    "python -m pretrain.data.batch_documents",
    "python -m pretrain.plan --config mac_760m --gpus 16",
    "python -m evals.position_perplexity --checkpoint runs/mine --text",
    "python -m evals.niah --checkpoint evals/results",
    "python -m evals.ask",
    "python -m evals.genomics",
    "python -m tokenization.adopt",
    "python -m evals.babilong",
    "python -m evals.niah.training_data",
    "python -m evals.finetune",
    "python -m evals.niah.comparison",
    "python -m evals.forecasting",
    "python -m evals.recommendation",
)
# What runs this test, what needs a network, what needs a GPU, what needs a cluster.
NOT_RUN_HERE = ("launch/test.sh", "HuggingFaceFW", "evals.harness", "launch/gpu_check.sh", "gpu_wheels.sh", "sbatch")


def readme_blocks(language: str) -> list[str]:
    return [block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.S)]


def readme_commands() -> list[str]:
    """Lines of bash blocks and cells of tables, page by page, each once."""
    commands: list[str] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        commands += [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
        commands += re.findall(r"^\|[^|]*\| `((?:bash|python) [^`]*)`", text, re.M)
    return list(dict.fromkeys(commands))


@pytest.fixture(scope="module")
def fresh_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a user has it, with the environment that runs this test."""
    if not (Path(sys.prefix) / "installed-dev").exists():
        pytest.skip("needs the environment that launch/test.sh makes")
    copy = tmp_path_factory.mktemp("readme") / "titans"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / ".venv").symlink_to(sys.prefix)
    text = copy / "text"
    text.mkdir()
    for name in ("argparse", "ast", "heapq", "json/decoder", "random", "shutil", "textwrap", "typing"):
        source = Path(os.__file__).parent / f"{name}.py"
        (text / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    rows = (f"{row},{math.sin(row / 9):.4f},{math.cos(row / 5):.4f}" for row in range(14_700))
    (copy / "ETTh1.csv").write_text("\n".join(["date,HUFL,OT", *rows]), encoding="utf-8")
    dna = copy / "GUE" / "prom" / "prom_core_tata"
    dna.mkdir(parents=True)
    for part in ("train", "dev", "test"):
        (dna / f"{part}.csv").write_text("sequence,label\n" + "ACGTACGTAA,0\nTTGACCGTAA,1\n" * 40, encoding="utf-8")
    log = [f"{user}\t{(user + event) % 9}\t{event}" for user in range(9) for event in range(5)]
    write_pair(copy / "corpus_text_document", make_documents(400))
    write_babi(copy / "tasks_1-20_v1-2" / "en-10k")
    write_books(copy / "pg19")
    (copy / "LOG.tsv").write_text("\n".join(["user_id\titem_id\ttimestamp", *log]), encoding="utf-8")
    return copy


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{folder / '.venv/bin'}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def readme_cases() -> list[Any]:
    """The commands in the order of the READMEs: one may read what an earlier one wrote."""
    wanted = [command for command in readme_commands() if not any(word in command for word in NOT_RUN_HERE)]
    slow = pytest.mark.slow
    return [pytest.param(command, marks=[slow] if command.startswith(SLOW) else [], id=command) for command in wanted]


def with_a_run(text: str, folder: Path) -> str:
    """The same with the quickstart's run where the README's own, which is slow, was not made."""
    made = "--run-dir runs/mine" in text or (folder / "runs" / "mine").exists()
    return text if made else text.replace("runs/mine", "runs/quickstart")


@pytest.mark.parametrize("written", readme_cases())
def test_a_command_of_the_readme_runs(fresh_copy: Path, written: str) -> None:
    command = written
    for placeholder, value in FILLED_IN.items():
        command = command.replace(placeholder, value)
    command = with_a_run(command, fresh_copy)
    command += next((more for script, more in SMALL.items() if script in command), "")
    folder = fresh_copy / "runs" / ("quickstart-lmm" if "--variant lmm" in command else "quickstart")
    if "quickstart.sh" in command and "--input" in command:
        shutil.rmtree(folder, ignore_errors=True)  # another text asks for another folder
    result = run(command, fresh_copy)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    if "quickstart.sh" in command:
        for name in ("config.toml", "metrics.jsonl", "tokenizer/tokenizer.model", "summary.json", "report.html"):
            assert (folder / name).is_file(), name


def test_the_readmes_have_commands_to_run() -> None:
    assert len(readme_cases()) > 24


@pytest.mark.parametrize("block", [pytest.param(block, id=block.split("\n")[0]) for block in readme_blocks("python")])
def test_python_of_the_readmes_runs(fresh_copy: Path, block: str) -> None:
    block = with_a_run(block, fresh_copy)
    for made in re.findall(r'"(runs/[^"]+)"', block):
        if not (fresh_copy / made).exists():
            pytest.skip(f"{made} is made by the commands before, which did not run")
    done = subprocess.run([sys.executable, "-c", block], cwd=fresh_copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_every_path_a_readme_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = [page.parent / path for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
    named = [ROOT / path for path in re.findall(r"`((?:tests|titans_mcore|evals/results)/[\w/.]+)`", text)]
    assert [str(path) for path in [*linked, *named] if not path.exists()] == []


def test_every_room_has_a_readme_and_the_projects_own_stays_short() -> None:
    assert {page.parent for page in PAGES} >= {ROOT / room for room in ROOMS}
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("script", ["quickstart", "test", "torchrun"])
def test_scripts_explain_themselves(script: str) -> None:
    result = run(f"bash {ROOT}/launch/{script}.sh --help", Path("/"))
    assert result.returncode == 0
    assert result.stdout.startswith("usage: bash launch/")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--variant gpt", "--variant is 'gpt'; it must be one of deltanet, gated_deltanet, lmm, mac, "),
        ("--steps many", "--steps is 'many'; it must be a whole number above 0"),
        ("--steps", "--steps needs a value"),
        ("--input", "--input needs at least one path"),
        ("--input no/such/file.txt", "no/such/file.txt does not exist"),
        ("--tokenizer no.model", "no.model does not exist"),
        ("--epochs 3", "--epochs is not an option"),
    ],
)
def test_quickstart_refuses_what_it_cannot_do_in_one_sentence(arguments: str, sentence: str) -> None:
    result = run(f"bash {ROOT}/launch/quickstart.sh {arguments}", Path("/"))
    assert result.returncode == 2
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
