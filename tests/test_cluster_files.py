"""The other cluster files: Kubernetes' are checked by schema, the Dockerfile by hadolint.

No package on PyPI or npm has KubeRay's schema (as of November 2026), so Ray's keys are checked against a list.
Pods, volumes and network policies are checked against Kubernetes' own schemas, and Ray's own autoscaler reads the
RayCluster.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import kubernetes_validate
import pytest
import yaml
from click import Command, Context
from jsonschema import Draft202012Validator, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config

from mlprune.cli import main
from mlprune.spec.loading import parse_spec, read_yaml
from tests.clusters import BUILD, CLUSTER_YAML, DOCKERFILE, FILES, JOB_YAML, README, ROOT, shell_lines, to_launch

# Ray's keys, of KubeRay 1.6: docs.ray.io, "KubeRay CRD API reference"; kuberay/ray-operator/apis/ray/v1/*_types.go


def fields(required: str, **properties: Any) -> dict[str, Any]:
    return {"properties": properties, "required": required.split(), "additionalProperties": False}


WORDS, WHOLE, TRUTH, ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
PARAMS = {"type": "object", "additionalProperties": WORDS}  # text, also where Ray then reads a number
RAY_CLUSTER = fields(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=WORDS,
    authOptions=fields("mode", mode={"enum": ["disabled", "token"]}, secretName=WORDS),
    enableInTreeAutoscaling=TRUTH,
    autoscalerOptions=fields(
        "", version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=WHOLE, securityContext=ANY, resources=ANY
    ),
    headGroupSpec=fields("rayStartParams template", rayStartParams=PARAMS, template=ANY),
    workerGroupSpecs={
        "items": fields(
            "groupName minReplicas maxReplicas rayStartParams template",
            **{"groupName": WORDS, "rayStartParams": PARAMS, "template": ANY},
            **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), WHOLE),
        )
    },
)
RAY_JOB = fields(
    "entrypoint rayClusterSpec",
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
    rayClusterSpec=RAY_CLUSTER,
    **{"entrypoint": WORDS, "shutdownAfterJobFinishes": TRUTH},
    **dict.fromkeys(("backoffLimit", "ttlSecondsAfterFinished"), WHOLE),
)


def manifests(file: Path) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(file.read_text())}


def spec_of(file: Path) -> dict[str, Any]:
    """The spec of the RayCluster in the file."""
    found = manifests(file)
    spec: dict[str, Any] = (found.get("RayJob") or found["RayCluster"])["spec"]
    return cast("dict[str, Any]", spec.get("rayClusterSpec", spec))


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def check(document: dict[str, Any], kubernetes: str) -> None:
    """Raise ValidationError unless that version of Kubernetes accepts the document."""
    ray = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}.get(document["kind"])
    if ray is None:
        kubernetes_validate.validate(document, kubernetes, strict=True)
        return
    Draft202012Validator(ray).validate(document["spec"])
    for pod in pods(document["spec"].get("rayClusterSpec", document["spec"])):
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": pod}
        kubernetes_validate.validate(whole, kubernetes, strict=True)


@pytest.mark.parametrize("kubernetes", ["1.29", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("file", [CLUSTER_YAML, JOB_YAML], ids=lambda file: file.stem)
def test_kubernetes_accepts_the_manifests(file: Path, kubernetes: str) -> None:
    for document in manifests(file).values():
        check(document, kubernetes)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda spec: spec.update(authOption={}),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: pods(spec)[0]["spec"].update(securityContxt={}),
        lambda spec: pods(spec)[1]["spec"]["containers"][0].update(volumeMounts=[{"name": "data"}]),
        lambda spec: pods(spec)[0]["spec"]["initContainers"][0].update(restartPolicy=1),
    ],
)
def test_mistakes_are_noticed(wrong: Any) -> None:
    document = deepcopy(manifests(CLUSTER_YAML)["RayCluster"])
    wrong(document["spec"])
    with pytest.raises(ValidationError):
        check(document, "1.29")


def test_ray_reads_the_cluster_as_meant() -> None:
    document = manifests(CLUSTER_YAML)["RayCluster"]
    document["metadata"]["namespace"] = "mlprune"
    config = _derive_autoscaling_config_from_ray_cr(document)
    validate_config(config)
    kinds = config["available_node_types"]
    assert (kinds["headgroup"]["resources"]["CPU"], kinds["gpu"]["resources"]["GPU"]) == (0, 1)
    assert to_launch(config, 0) == {}
    assert to_launch(config, 9) == {"gpu": 4}
    assert f"\nray=={document['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_the_job_runs_on_the_same_cluster_with_its_spec() -> None:
    job, cluster, spec = manifests(JOB_YAML), manifests(CLUSTER_YAML), deepcopy(spec_of(JOB_YAML))
    head = spec["headGroupSpec"]["template"]["spec"]
    mount, volume = head["containers"][0]["volumeMounts"].pop(), head["volumes"].pop(0)
    assert spec == spec_of(CLUSTER_YAML)
    assert all(job[kind] == cluster[kind] for kind in ("PersistentVolumeClaim", "NetworkPolicy"))
    assert mount["name"] == volume["name"]
    assert volume["configMap"]["name"] == job["ConfigMap"]["metadata"]["name"]
    (name, text), *others = job["ConfigMap"]["data"].items()
    assert job["RayJob"]["spec"]["entrypoint"] == f"mlprune sweep {mount['mountPath']}/{name}"
    assert not others
    assert parse_spec(read_yaml(text)).storage.startswith(head["containers"][0]["volumeMounts"][0]["mountPath"])


def test_pods_are_closed() -> None:
    cluster, policy = spec_of(CLUSTER_YAML), manifests(CLUSTER_YAML)["NetworkPolicy"]["spec"]
    assert cluster["authOptions"]["mode"] == "token"
    for pod in pods(cluster):
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    (mlflow,) = pods(cluster)[0]["spec"]["initContainers"]
    assert "--host 127.0.0.1 --port 5000" in mlflow["args"][0]
    assert "serviceType" not in cluster["headGroupSpec"]  # none: ClusterIP


# the image, and the README


def test_the_dockerfile_is_clean_and_copies_existing_files() -> None:
    linted = subprocess.run([Path(sys.prefix, "bin", "hadolint"), DOCKERFILE], capture_output=True, text=True)
    assert (linted.returncode, linted.stdout) == (0, "")
    text = DOCKERFILE.read_text()
    sources = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    assert BUILD | {"constraints.txt"} == sources
    assert all((ROOT / source).exists() for source in sources)
    assert "pip install --no-cache-dir -c constraints.txt" in text
    user = pods(spec_of(CLUSTER_YAML))[0]["spec"]["securityContext"]["runAsUser"]
    assert re.findall(r"^USER (.*)", text, re.MULTILINE)[-1] == str(user)


def test_what_pip_builds_from_is_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    read = [project["project"]["readme"], *project["project"]["license-files"]]
    read += [*wheel["packages"], *wheel["force-include"]]
    assert {path.split("/")[0] for path in read} | {"pyproject.toml"} == BUILD


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_readme_lists_what_must_be_changed(file: Path) -> None:
    rows = dict(re.findall(r"^\| `([\w./_]+)` \| (.*) \|$", README, re.MULTILINE))
    row = rows[str(file.relative_to(ROOT))]
    row += rows["cluster/kuberay/raycluster.yaml"] if file == JOB_YAML else ""
    marked = [line for line in file.read_text().splitlines() if "# CHANGE" in line]
    assert marked
    for line in marked:
        key = re.findall(r"CHANGE: the (\w+)|^[\s-]*(\w+):", line)[0]
        assert f"`{''.join(key)}`" in row, line


def test_commands_of_mlprune_are_valid() -> None:
    pattern = r"\bmlprune (?:sweep|status|prune) [^']*"
    lines = [command for line in shell_lines() for command in re.findall(pattern, line)]
    assert len(lines) >= 8
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        command = main.commands[name]
        assert isinstance(command, Command)
        command.make_parser(Context(command)).parse_args(words)
