"""launch/slurm.sbatch under a SLURM of three scripts: what it asks of srun, and when it puts the job back."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.pretrain.jobs import ROOT, Job

SCRIPT = ROOT / "launch" / "slurm.sbatch"
# One task a host, each with its number; signals go on to the tasks, as srun hands them on.
SRUN = """#!/usr/bin/env bash
while [[ ${1:-} == --* ]]; do echo "$1" >>"$NOTES/srun"; shift; done
pids=()
for number in 0 1; do SLURM_NODEID=$number "$@" & pids+=($!); done
for name in USR1 TERM; do trap "kill -$name ${pids[*]} 2>/dev/null; signalled=1" "$name"; done
status=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || status=$?; done
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
"show hostnames "*) printf 'node7\\nnode8\\n' ;;
"show job "*) printf 'JobId=4711 JobName=titans\\n   JobState=%s Reason=None\\n' "$JOB_STATE" ;;
*) echo "$*" >>"$NOTES/scontrol" ;;
esac
"""
# Stands for the launcher: notes what it got, and after a signal saves as host 0 does, and ends as torchrun may, with 1.
PYTHON = """#!/usr/bin/env bash
echo "$NODE_RANK $RUN_ID $*" >>"$NOTES/started-$NODE_RANK"
stop() {
    if [[ $NODE_RANK == 0 ]]; then echo "{\\"reason\\": \\"$1\\", \\"step\\": 7}" >"$RUN/requeue.json"; fi
    exit 1
}
trap 'stop SIGUSR1' USR1
trap 'stop SIGTERM' TERM
for ((i = 0; i < SECONDS_TO_RUN * 20; i++)); do sleep 0.05; done
exit "$STATUS"
"""


@pytest.fixture
def submit(tmp_path: Path):
    """Runs the script as a job of two hosts."""
    notes, run = tmp_path / "notes", tmp_path / "run"
    notes.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        file = tmp_path / name
        file.write_text(text)
        file.chmod(0o755)

    def start(*, seconds: int, status: int = 0, state: str = "RUNNING") -> Job:
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(ROOT)}
        fake = {"NOTES": str(notes), "RUN": str(run), "SECONDS_TO_RUN": str(seconds), "STATUS": str(status)}
        settings = slurm | fake | {"JOB_STATE": state, "SLURM_RESTART_COUNT": "2"}
        words = [f"{name}={value}" for name, value in settings.items()]
        command = ["bash", "-c", f'PATH={tmp_path}:$PATH PYTHON={tmp_path}/python exec bash "$@"', "_", str(SCRIPT)]
        return Job(
            ["env", *words, *command, "--config", "a.toml", "--run-dir", str(run), "--train.steps", "9"], tmp_path
        )

    start.notes, start.run = notes, run
    return start


def requeued(submit) -> str:
    file = submit.notes / "scontrol"
    return file.read_text() if file.exists() else ""


def wait_until_started(submit, job: Job) -> None:
    deadline = time.monotonic() + 300
    while not all((submit.notes / f"started-{number}").exists() for number in (0, 1)):
        assert time.monotonic() < deadline, job.process.communicate()
        time.sleep(0.05)
    time.sleep(0.3)  # until the script waits


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["time limit", "preemption"])
def test_a_stopped_run_is_put_back_into_the_queue_whatever_status_its_processes_had(submit, number):
    job = submit(seconds=60)
    wait_until_started(submit, job)
    job.process.send_signal(number)
    status, out, err = job.wait(60)
    assert (status, err) == (0, "")
    assert requeued(submit) == "requeue 4711\n"
    assert f'stopped before its end: {{"reason": "{number.name}", "step": 7}}' in out


def test_a_finished_run_is_not_put_back(submit):
    status, out, _ = submit(seconds=0).wait(60)
    assert (status, out, requeued(submit)) == (0, "", "")


def test_a_run_that_failed_is_not_put_back_and_its_status_is_the_jobs(submit):
    status, _, _ = submit(seconds=0, status=2).wait(60)
    assert (status, requeued(submit)) == (2, "")


def test_a_cancelled_job_is_saved_and_not_put_back(submit):
    job = submit(seconds=60, state="CANCELLED")
    wait_until_started(submit, job)
    job.process.send_signal(signal.SIGTERM)
    status, out, _ = job.wait(60)
    assert (status, requeued(submit)) == (0, "")
    assert json.loads((submit.run / "requeue.json").read_text())["reason"] == "SIGTERM"
    assert out.endswith("not requeued: the job was cancelled\n")


def test_every_host_gets_its_number_the_first_ones_name_and_a_log(submit):
    submit(seconds=0).wait(60)
    for number in (0, 1):
        started = (submit.notes / f"started-{number}").read_text()
        assert started.startswith(f"{number} 4711.2 -m pretrain.launch --nnodes 2 --node-rank {number} ")
        assert "--rdzv-id 4711.2 --rdzv-endpoint node7:24711 " in started
        assert "--max-restarts 3 " in started
        assert started.endswith(f"-- --config a.toml --run-dir {submit.run} --train.steps 9\n")
    assert f"--output={submit.run}/logs/4711.2-%n-%N.log" in (submit.notes / "srun").read_text()
    assert (submit.run / "logs").is_dir()


def test_slurm_is_asked_for_a_signal_in_time_and_for_a_job_that_may_come_again():
    directives = [line.split(maxsplit=1)[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} < set(directives)


def test_outside_a_job_it_says_what_to_do():
    result = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: slurm.sbatch runs inside a SLURM job; submit it with sbatch")
