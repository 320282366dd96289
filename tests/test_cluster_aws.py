"""ray_cluster.yaml against moto, a stand-in for AWS.

Launcher, node provider and scheduler are Ray's own. A runner that only notes commands stands in for ssh and rsync;
such commands run over a real ssh in tests/test_hosts.py.
"""

import json
import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore import xform_name
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count
from moto.ec2.models.instance_types import InstanceTypeBackend
from ray.autoscaler._private import commands
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from mlprune.spec.loading import read_yaml
from tests.clusters import AWS, BUILD, CLUSTER, FILES, README, ROOT, shell_lines, to_launch

REGION, WORKERS = "us-west-2", ("gpu-spot", "gpu-on-demand")
# Ray's launcher does not close the files that it reads
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@dataclass
class Launched:
    """The effects of `ray up`, of the autoscaler's launches, and of `ray down`."""

    said: list[str] = field(default_factory=list)  # shell commands, as they went to the head
    files: dict[str, str] = field(default_factory=dict)  # path on the head to the file's text
    config: dict[str, Any] = field(default_factory=dict)  # what the autoscaler on the head reads
    machines: list[dict[str, Any]] = field(default_factory=list)  # the head, then a worker of each kind
    refused: list[str] = field(default_factory=list)  # what the head has no right to
    groups: set[str] = field(default_factory=set)  # security groups of the account
    down: set[str] = field(default_factory=set)  # states of all machines at the end

    def check_call(self, command: list[str], *_: Any, **__: Any) -> None:
        if command[0] == "rsync":
            source, target = Path(command[-2]), command[-1].partition(":")[2]
            self.files[target] = source.read_text() if source.is_file() else ""
        else:
            self.said.append(command[-1])

    call = check_call

    def check_output(self, command: list[str], *_: Any, **__: Any) -> bytes:
        self.said.append(command[-1])
        return b""


def node_types() -> dict[str, Any]:
    return dict(read_yaml(AWS.read_text())["available_node_types"])


def instances(ec2: Any) -> list[dict[str, Any]]:
    return [i for reservation in ec2.describe_instances()["Reservations"] for i in reservation["Instances"]]


def prepare_account(ec2: Any) -> tuple[str, str]:
    """Do what the README has done once; returns the security group and an image."""
    iam, s3 = boto3.client("iam"), boto3.client("s3", "us-east-1")
    for node in ("head", "worker"):
        name = f"mlprune-{node}"
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=(CLUSTER / "aws" / "trust.json").read_text())
        for policy in {"worker", node}:
            text = (CLUSTER / "aws" / f"{policy}.json").read_text()
            iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=text)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    for bucket in ("mlprune-me", "elses"):
        s3.create_bucket(Bucket=bucket)
    group = ec2.create_security_group(GroupName="mlprune", Description="mlprune cluster")
    return group["GroupId"], ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]


def rights_of_head() -> dict[str, str]:
    arn = "arn:aws:iam::123456789012:role/mlprune-head"
    role = boto3.client("sts", REGION).assume_role(RoleArn=arn, RoleSessionName="head")["Credentials"]
    names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
    return {f"aws_{xform_name(name)}": role[name] for name in names}


@set_initial_no_auth_action_count(0)
def act_as_head(seen: Launched, rights: dict[str, str]) -> None:
    """Launch and end workers with only the head's permissions, and try what they do not allow."""
    provider = _get_node_provider({**seen.config["provider"], "aws_credentials": rights}, "mlprune")
    for kind in WORKERS:
        tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: kind, TAG_RAY_LAUNCH_CONFIG: "hash"}
        provider.create_node(seen.config["available_node_types"][kind]["node_config"], tags, 1)
    seen.machines = [machine.meta.data for machine in provider.ec2.instances.all()]
    (spot,) = provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: "gpu-spot"})
    provider.set_node_tags(spot, {TAG_RAY_LAUNCH_CONFIG: "other"})
    provider.terminate_node(spot)
    s3 = boto3.client("s3", REGION, **rights)
    s3.list_objects_v2(Bucket="mlprune-me")
    for attempt in (partial(s3.list_objects_v2, Bucket="elses"), boto3.client("iam", **rights).list_users):
        try:
            attempt()
        except ClientError as error:
            seen.refused.append(error.response["Error"]["Code"])


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    home, seen = tmp_path_factory.mktemp("home"), Launched()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("the token")
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(home))
        patch.setattr(tempfile, "tempdir", str(home))
        patch.chdir(ROOT)
        patch.setattr(commands, "get_or_create_head_node", partial(commands.get_or_create_head_node, _runner=seen))
        patch.setattr(commands, "exec_cluster", lambda _, cmd, **__: seen.said.append(cmd))
        # only the requested ones of the thousand types that moto knows: describing all takes half a minute
        requested = {kind["node_config"]["InstanceType"] for kind in node_types().values()}
        types = [kind for kind in InstanceTypeBackend.instance_types if kind["InstanceType"] in requested]
        patch.setattr(InstanceTypeBackend, "instance_types", types)
        ec2 = boto3.client("ec2", REGION)
        group, image = prepare_account(ec2)
        file = home / "ray_cluster.yaml"
        file.write_text(re.sub(r"\bami-0+\b", image, re.sub(r"\bsg-0+\b", group, AWS.read_text())))
        unset = dict.fromkeys(("override_min_workers", "override_max_workers", "override_cluster_name"))
        off = dict.fromkeys(("no_restart", "restart_only", "redirect_command_output"), False)
        commands.create_or_update_cluster(str(file), yes=True, no_config_cache=True, **unset, **off)
        seen.config = json.loads(seen.files["~/ray_bootstrap_config.yaml"])
        act_as_head(seen, rights_of_head())
        seen.groups = {group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]}
        commands.teardown_cluster(str(file), True, False, None, False)
        seen.down = {machine["State"]["Name"] for machine in instances(ec2)}
    return seen


def test_the_head_starts_closed_and_with_mlflow(launched: Launched) -> None:
    (start,) = (said for said in launched.said if "ray start" in said)
    assert "RAY_AUTH_MODE=token" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "RAY_OVERRIDE_RESOURCES='{\"CPU\":0}'" in shlex.split(start)[0]
    (mlflow,) = (i for i, said in enumerate(launched.said) if "mlflow-server.sh" in said)
    assert mlflow < launched.said.index(start)
    assert "--host 127.0.0.1" in (CLUSTER / "mlflow-server.sh").read_text()
    (worker,) = (said for said in launched.config["worker_start_ray_commands"] if "ray start" in said)
    assert "RAY_AUTH_MODE=token" in worker
    assert launched.files["~/.ray/auth_token"] == "the token"


def test_files_that_the_commands_name_are_copied_to_the_nodes(launched: Launched) -> None:
    there = {target.removeprefix("~/mlprune/").rstrip("/") for target in launched.files}
    assert BUILD | {"cluster", "constraints.txt"} <= there
    named = {path for said in launched.said for path in re.findall(r"~/mlprune/([\w./-]+)", said)}
    assert {path for path in named if not (ROOT / path).exists()} == set()
    assert {path.split("/")[0] for path in named} <= there
    for said in launched.said:
        assert "pip install" not in said or "-c ~/mlprune/constraints.txt" in said
        subprocess.run(["bash", "-n", "-c", said], check=True)


def test_the_head_has_the_permissions_that_it_needs_and_no_others(launched: Launched) -> None:
    kinds = [(machine["InstanceType"], machine.get("InstanceLifecycle")) for machine in launched.machines]
    assert kinds == [("m7i.xlarge", None), ("g6.2xlarge", "spot"), ("g6.2xlarge", None)]
    profiles = [machine["IamInstanceProfile"]["Arn"].partition("/")[2] for machine in launched.machines]
    assert profiles == ["mlprune-head", "mlprune-worker", "mlprune-worker"]
    assert launched.refused == ["AccessDenied", "AccessDenied"]
    # moto asks nobody for iam:PassRole, so that is only read here
    for file in (CLUSTER / "aws").glob("*.json"):
        for statement in json.loads(file.read_text())["Statement"]:
            assert "*" not in str(statement["Action"])
            assert "PassRole" not in str(statement["Action"]) or statement["Resource"].endswith(
                ":role/mlprune-worker"
            )


def test_all_machines_are_in_the_users_security_group_and_ray_creates_none(launched: Launched) -> None:
    for machine in launched.machines:
        assert [group["GroupName"] for group in machine["SecurityGroups"]] == ["mlprune"]
    assert launched.groups == {"default", "mlprune"}
    assert not any(word in file.read_text() for file in FILES for word in ("0.0.0.0", "::/0", "IpPermissions"))
    (rules,) = re.findall(r"--ip-permissions \\\n((?:  \".*\n)+)", README)
    assert re.findall(r"FromPort=(\d+),ToPort=(\d+)", rules) == [("22", "22")]
    assert re.findall(r"CidrIp=(.*?)}", rules) == ["$(curl -s https://checkip.amazonaws.com)/32"]


def test_nothing_is_left_after_ray_down(launched: Launched) -> None:
    assert launched.said[-1] == "ray stop"
    assert launched.down == {"terminated"}


def test_workers_come_from_zero_spot_first(launched: Launched) -> None:
    config = {**launched.config, "auth": {}}  # without the ssh key, whose file is on the head
    assert to_launch(config, 0) == {}
    assert to_launch(config, 3) == {"gpu-spot": 3}
    assert to_launch(config, 2, gpu_spot=0.0) == {"gpu-on-demand": 2}
    assert to_launch(config, 9) == {"gpu-spot": 4, "gpu-on-demand": 2}
    assert to_launch(config, 1, "CPU") == {"gpu-spot": 1}  # never the head


def test_aws_accepts_the_node_configs() -> None:
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in node_types().values():
        requested = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(requested, shape).has_errors()
        assert ParamValidator().validate({**requested, "InstanceTyp": "x"}, shape).has_errors()


def test_aws_commands_are_valid() -> None:
    session = botocore.session.get_session()
    lines = [line.partition("$(")[2] if line.startswith("GROUP=") else line for line in shell_lines()]
    lines = [line for line in lines if line.startswith("aws ")]
    assert len(lines) == 10
    for line in lines:
        _, service, name, *words = line.split("#")[0].split()
        model = session.get_service_model("s3" if service == "s3api" else service)
        (operation,) = (model.operation_model(o) for o in model.operation_names if xform_name(o, "-") == name)
        known = {xform_name(member, "-") for member in operation.input_shape.members} | {"query", "output"}
        assert {word.removeprefix("--") for word in words if word.startswith("--")} <= known, line
        for file in re.findall(r"file://(\S+)", line):
            assert json.loads((ROOT / file).read_text())
