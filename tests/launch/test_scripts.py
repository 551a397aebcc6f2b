"""What can be said of launch/ without a cluster: scripts parse and are clean, the parts of the manifest fit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.config.files import preset_names
from tests.pretrain.jobs import ROOT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"])


@pytest.fixture(scope="module")
def manifest() -> tuple[dict, dict]:
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text(encoding="utf-8"))
    return service, job


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    path = f"{Path(sys.executable).parent}:{Path(sys.prefix) / 'bin'}"
    shellcheck = shutil.which("shellcheck", path=path) or shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (the extra dev has it); bash accepts the script")
    result = subprocess.run([shellcheck, "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def sourced(commands: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs commands behind launch/environment.sh, with the programs of one folder alone."""
    script = f"source {ROOT / 'launch' / 'environment.sh'}; {commands}"
    return subprocess.run(
        [shutil.which("bash"), "-c", script], env={"PATH": str(path), **environment}, capture_output=True, text=True
    )


@pytest.fixture
def no_python(tmp_path: Path) -> Path:
    """A folder of programs in which python3 is too new."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "mkdir"):
        (folder / name).symlink_to(shutil.which(name))
    (folder / "python3").write_text("#!/bin/bash\nexit 1\n")
    (folder / "python3").chmod(0o755)
    return folder


def test_without_a_python_that_fits_one_sentence_has_the_command_that_brings_one(no_python, tmp_path):
    result = sourced(f"root={tmp_path}; make_venv", no_python)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no Python 3.11, 3.12 or 3.13 was found")
    assert "curl -LsSf https://astral.sh/uv/install.sh | sh" in line


def test_uv_makes_the_environment_where_no_python_fits(no_python, tmp_path):
    (no_python / "uv").write_text('#!/bin/bash\necho "uv $*"; mkdir "${@: -1}"\n')
    (no_python / "uv").chmod(0o755)
    result = sourced(f"root={tmp_path}; make_venv", no_python)
    assert result.returncode == 0, result.stderr
    assert f"uv venv --seed --python >=3.11,<3.14 {tmp_path}/.venv" in result.stdout
    assert (tmp_path / ".venv").is_dir()


def test_what_pip_does_is_shown_a_line_in_twenty_and_its_failure_is_kept():
    pip = "for n in {1..45}; do echo Collecting package$n; echo '  Using cached package'; done; exit 3"
    result = sourced(f"({pip}) | show_progress", Path(shutil.which("bash")).parent)
    assert result.returncode == 3
    assert result.stdout.split() == ["Collecting", "package1", "Collecting", "package21", "Collecting", "package41"]


def wheels(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/gpu_wheels.sh with a pip that makes a wheel of whatever it is asked for, but for what it lacks."""
    python = folder / "python"
    python.write_text(
        """#!/bin/bash
package=${@: -1} && name=${package%%==*}
if [[ $name == "$LACKS" ]]; then exit 1; fi
while (($#)); do case $1 in --dest | --wheel-dir) dest=$2 ;; --python-version) echo "$2" >>"$ASKED" ;; esac; shift; done
truncate -s "${BYTES:-1024}" "$dest/$name.whl"
"""
    )
    python.chmod(0o755)
    named = {"PYTHON": str(python), "ASKED": str(folder / "asked"), "LACKS": "", "PATH": os.environ["PATH"]}
    command = ["bash", str(ROOT / "launch" / "gpu_wheels.sh"), *arguments]
    return subprocess.run(command, env=named | environment, capture_output=True, text=True)


def test_wheels_for_a_gpu_machine_are_weighed(tmp_path):
    done = wheels(tmp_path, str(tmp_path / "wheels"), "3.13")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"25 wheels in {tmp_path / 'wheels'}, 0.0 of 64 MiB\n"
    assert set((tmp_path / "asked").read_text().split()) == {"3.13"}
    too_large = wheels(tmp_path, str(tmp_path / "wheels"), BYTES="4194304")
    assert too_large.returncode == 1
    assert "100.0 of 64 MiB" in too_large.stdout
    assert "more than the 64 MiB that can be carried" in too_large.stderr


@pytest.mark.parametrize("package", ["tyro", "deepspeed"])
def test_a_wheel_that_is_missing_is_named(tmp_path, package):
    done = wheels(tmp_path, str(tmp_path / "wheels"), LACKS=package)
    assert done.returncode == 1
    assert f"pip found no wheel of {package}==" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [((), "give a folder for the wheels"), (("--dir",), "give a folder"), (("wheels", "312"), "write it as 3.12")],
)
def test_wheels_want_a_folder_and_a_version(tmp_path, arguments, sentence):
    done = wheels(tmp_path, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "asked").exists()


def test_the_manifest_is_a_headless_service_and_an_indexed_job(manifest):
    service, job = manifest
    assert [(one["apiVersion"], one["kind"]) for one in manifest] == [("v1", "Service"), ("batch/v1", "Job")]
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert (job["spec"]["completionMode"], job["spec"]["podReplacementPolicy"]) == ("Indexed", "Failed")
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # what a podFailurePolicy needs


def test_the_parts_of_the_manifest_fit_each_other(manifest):
    service, job = manifest
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert int(environment["NNODES"]) == spec["parallelism"] == spec["completions"]
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert int(environment["MASTER_PORT"]) == service["spec"]["ports"][0]["port"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert (ROOT / container["command"][1]).is_file()
    assert container["args"][0].removeprefix("--config=") in preset_names()


def test_a_preempted_pod_has_time_to_save_and_what_it_stopped_comes_again(manifest):
    spec, pod = manifest[1]["spec"], manifest[1]["spec"]["template"]["spec"]
    environment = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] >= int(environment["SHUTDOWN_SECONDS"]) + 60
    rules = spec["podFailurePolicy"]["rules"]
    codes = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules if "onExitCodes" in rule}
    assert codes == {2: "FailJob", int(environment["REQUEUE_STATUS"]): "Ignore"}
    assert [rule["action"] for rule in rules if "onPodConditions" in rule] == ["Ignore"]


def test_every_variable_of_the_manifest_is_explained_by_the_script(manifest):
    usage = subprocess.run(
        ["bash", str(ROOT / "launch/torchrun.sh"), "--help"], capture_output=True, text=True, check=True
    )
    for variable in manifest[1]["spec"]["template"]["spec"]["containers"][0]["env"]:
        assert re.search(rf"^  {variable['name']} ", usage.stdout, re.M)
