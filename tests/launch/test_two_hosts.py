"""Runs over two hosts, network namespaces joined by a virtual cable: what they compute, and what they survive."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pretrain.jobs import ROOT, Job, read_metrics
from tests.pretrain.tiny_shards import write_shards

from .hosts import Host, cut_cable, two_hosts, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 60
RUN = ["--train.steps", str(STEPS), "--checkpoint.every-steps", "4", "--evaluate.heldout-sequences", "0"]
COLLECTIVE_SECONDS = 30
OUTAGE_SECONDS = COLLECTIVE_SECONDS + 15
IMPATIENT = ["--parallel.timeout-seconds", "120", "--parallel.step-timeout-seconds", str(COLLECTIVE_SECONDS)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as pair:
        yield pair


@pytest.fixture
def start(hosts, tiny_toml, tmp_path) -> Iterator[Callable[..., list[Job]]]:
    """Starts launch/torchrun.sh on both hosts, one process each; `second` changes what the second host gets."""

    def run(run_dir: Path, *arguments: str, second: dict | None = None, only: int = 2, **environment: str) -> list[Job]:
        settings = {"NNODES": "2", "MASTER_ADDR": hosts[0].address, "JOIN_SECONDS": "300", "MAX_RESTARTS": "6"}
        jobs = []
        for number, host in enumerate(hosts[:only]):
            other = (second or {}) if number else {}
            root, more = other.get("root", ROOT), other.get("arguments", [])
            command = ["bash", str(root / "launch" / "torchrun.sh"), "--config", str(tiny_toml), "--nproc", "1"]
            command += ["--run-dir", str(run_dir), *arguments, *more]
            variables = settings | environment | {"NODE_RANK": str(number)} | other.get("environment", {})
            jobs.append(host.start(command, tmp_path, **variables))
        return jobs

    yield run
    for host in hosts:
        host.signal_all(signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory) -> list[float]:
    """Losses of one process that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("alone")
    status, _, err = train(run_dir, *RUN).wait()
    assert status == 0, err
    return losses(run_dir)


def losses(run_dir: Path) -> list[float]:
    records = read_metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


def wait_for_step(jobs: list[Job], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not any(record["step"] >= step for record in read_metrics(run_dir)):
        if time.monotonic() > deadline or any(job.process.poll() is not None for job in jobs):
            for job in jobs:
                job.kill()
            pytest.fail(f"step {step} was not reached: {[job.process.communicate() for job in jobs]}")
        time.sleep(0.01)


def test_hosts_that_share_the_batch_or_the_rows_have_the_losses_of_one_process(start, alone, tmp_path):
    for name, layout in {"data": [], "context": ["--parallel.context", "2"]}.items():
        ends = [job.wait(400) for job in start(tmp_path / name, *RUN, *layout)]
        assert [(status, err) for status, _, err in ends] == [(0, ""), (0, "")]
        assert losses(tmp_path / name) == pytest.approx(alone, rel=1e-4)
        assert f"{name} 2" in ends[0][1]


def kill_a_worker(hosts: tuple[Host, Host]) -> None:
    assert hosts[1].signal_all(signal.SIGKILL, "pretrain.train") > 0


def stop_a_host(hosts: tuple[Host, Host]) -> None:
    hosts[1].signal_all(signal.SIGSTOP)
    time.sleep(OUTAGE_SECONDS)
    hosts[1].signal_all(signal.SIGCONT)


def stop_the_first_host(hosts: tuple[Host, Host]) -> None:
    stop_a_host((hosts[1], hosts[0]))


def cut_the_cable(hosts: tuple[Host, Host]) -> None:
    with cut_cable(hosts[0], OUTAGE_SECONDS):
        pass


@pytest.mark.parametrize("disturb", [kill_a_worker, stop_a_host, stop_the_first_host, cut_the_cable])
def test_a_run_that_is_disturbed_ends_with_the_losses_of_one_that_is_not(start, hosts, alone, tmp_path, disturb):
    jobs = start(tmp_path / "run", *RUN, *IMPATIENT)
    wait_for_step(jobs, tmp_path / "run", 6)
    disturb(hosts)
    ends = [job.wait(600) for job in jobs]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert any("all go on from the last checkpoint (restart 1 of 6)" in err for _, _, err in ends)
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-4)
    assert [host.processes() for host in hosts] == [[], []]


def test_an_elastic_run_goes_on_without_a_lost_host(start, hosts, alone, tmp_path):
    jobs = start(tmp_path / "run", *RUN, *IMPATIENT, NNODES="1:2")
    wait_for_step(jobs, tmp_path / "run", 6)
    hosts[1].signal_all(signal.SIGKILL)
    status, out, err = jobs[0].wait(600)
    assert status == 0, err
    assert "data 2" in out or "data 2" in jobs[1].wait()[1]
    assert "data 1" in out
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-4)


def other_code(tmp_path: Path) -> dict:
    copy = tmp_path / "copy"
    for name in ("launch", "pretrain", "titans_mcore", "tokenization"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "pretrain" / "schedule.py").open("a") as file:
        file.write("\n# changed here alone\n")
    return {"root": copy, "environment": {"PYTHONPATH": ""}}


def other_version(tmp_path: Path) -> dict:
    folder = tmp_path / "site" / "deepspeed-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1.0\n")
    return {"environment": {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder.parent}"}}


def other_data(tmp_path: Path) -> dict:
    return {"arguments": ["--data.path", str(write_shards(tmp_path / "other", seed=5))]}


def other_settings(tmp_path: Path) -> dict:
    return {"arguments": ["--optimizer.lr", "1e-2"]}


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (other_code, "has other code of titans_mcore, pretrain, tokenization than host 0 (host-a); check out the same"),
        (other_version, "has deepspeed 0.1.0 where host 0 (host-a) has "),
        (other_data, "has data "),
        (
            other_settings,
            "has optimizer.lr 0.01 where host 0 (host-a) has optimizer.lr 0.003; start the same command on every host",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_both_hosts_end_with_one_sentence_that_names_the_one_that_differs(start, tmp_path, second, sentence):
    ends = [job.wait(300) for job in start(tmp_path / "run", second=second(tmp_path))]
    assert [(status, out) for status, out, _ in ends] == [(2, ""), (2, "")]
    assert ends[0][2].startswith(f"error: host 1 (host-b) {sentence}")
    assert ends[0][2] == ends[1][2]
    assert ends[0][2].count("\n") == 1
    assert list((tmp_path / "run").iterdir()) == []


def test_a_host_that_does_not_come_is_named_in_time(start, hosts, tmp_path):
    (job,) = start(tmp_path / "run", only=1, JOIN_SECONDS="3")
    status, out, err = job.wait(300)
    assert (status, out) == (2, "")
    assert err.startswith(
        f"error: host 1 did not come to {hosts[0].address}, port 29400, within 3 s; there: host 0 (host-"
    )


def test_a_host_that_reaches_nobody_says_whom(start, hosts, tmp_path):
    with cut_cable(hosts[0], 0):
        _, job = start(tmp_path / "run", JOIN_SECONDS="3")
        status, out, err = job.wait(300)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: host 1 (host-b) does not reach host 0 at {hosts[0].address}, port 29400, within 3 s")
