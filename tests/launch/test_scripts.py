"""What can be said of launch/ without a cluster: scripts parse and are clean, the manifest is what Kubernetes takes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from pretrain.presets import preset_names
from tests.pretrain.jobs import ROOT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"])
TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}


def fields(required: dict, **optional: dict) -> dict:
    """An object of these fields and no other: a misspelled one is ignored by nobody."""
    known = {"type": "object", "additionalProperties": False, "required": list(required)}
    return known | {"properties": {**required, **optional}}


def many(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1}


NAMED = fields({"name": TEXT}, labels={"type": "object"})
VALUE_FROM = fields({"fieldRef": fields({"fieldPath": TEXT})})
ENVIRONMENT = {"oneOf": [fields({"name": TEXT, "value": TEXT}), fields({"name": TEXT, "valueFrom": VALUE_FROM})]}
CONTAINER = fields(
    {
        "name": TEXT,
        "image": TEXT,
        "workingDir": TEXT,
        "command": many(TEXT),
        "args": many(TEXT),
        "env": many(ENVIRONMENT),
        "resources": fields({"limits": {"type": "object", "additionalProperties": COUNT}}),
        "volumeMounts": many(fields({"name": TEXT, "mountPath": TEXT}, readOnly={"type": "boolean"})),
    }
)
CLAIM = fields({"claimName": TEXT}, readOnly={"type": "boolean"})
VOLUME = {
    "oneOf": [
        fields({"name": TEXT, "emptyDir": fields({"medium": {"const": "Memory"}})}),
        fields({"name": TEXT, "persistentVolumeClaim": CLAIM}),
    ]
}
POD = fields(
    {
        "subdomain": TEXT,
        "restartPolicy": {"const": "Never"},  # what a podFailurePolicy needs
        "terminationGracePeriodSeconds": COUNT,
        "affinity": {"type": "object"},
        "containers": many(CONTAINER),
        "volumes": many(VOLUME),
    }
)
EXIT_CODES = fields({"containerName": TEXT, "operator": {"enum": ["In", "NotIn"]}, "values": many(COUNT)})
CONDITION = fields({"type": {"const": "DisruptionTarget"}, "status": {"const": "True"}})
ACTION = {"enum": ["FailJob", "Ignore", "Count", "FailIndex"]}
RULE = {
    "oneOf": [
        fields({"action": ACTION, "onExitCodes": EXIT_CODES}),
        fields({"action": ACTION, "onPodConditions": many(CONDITION)}),
    ]
}
JOB = fields(
    {
        "apiVersion": {"const": "batch/v1"},
        "kind": {"const": "Job"},
        "metadata": NAMED,
        "spec": fields(
            {
                "completionMode": {"const": "Indexed"},
                "parallelism": COUNT,
                "completions": COUNT,
                "backoffLimit": COUNT,
                "podReplacementPolicy": {"const": "Failed"},
                "podFailurePolicy": fields({"rules": many(RULE)}),
                "template": fields({"metadata": fields({"labels": {"type": "object"}}), "spec": POD}),
            }
        ),
    }
)
SERVICE = fields(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "Service"},
        "metadata": NAMED,
        "spec": fields(
            {
                "clusterIP": {"const": "None"},
                "publishNotReadyAddresses": {"const": True},
                "selector": {"type": "object"},
                "ports": many(fields({"name": TEXT, "port": COUNT})),
            }
        ),
    }
)


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
    for document, schema in zip(manifest, (SERVICE, JOB), strict=True):
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(document, schema)


def test_the_schema_refuses_a_field_that_kubernetes_does_not_know(manifest):
    job = manifest[1] | {"spec": manifest[1]["spec"] | {"completionsMode": "Indexed"}}
    with pytest.raises(jsonschema.ValidationError, match="completionsMode"):
        jsonschema.validate(job, JOB)


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
