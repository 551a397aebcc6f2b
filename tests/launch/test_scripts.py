"""What can be said of launch/ without a cluster: scripts parse and are clean, the parts of the manifest fit."""

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
