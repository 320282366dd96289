"""What the tests of cluster files share: where the files are, and what Ray's scheduler would launch."""

import re
from pathlib import Path
from typing import Any

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
AWS, DOCKERFILE = ROOT / "ray_cluster.yaml", CLUSTER / "Dockerfile"
CLUSTER_YAML, JOB_YAML = CLUSTER / "kuberay" / "raycluster.yaml", CLUSTER / "kuberay" / "rayjob.yaml"
FILES = [AWS, CLUSTER / "local.yaml", CLUSTER_YAML, JOB_YAML, DOCKERFILE]
README = (CLUSTER / "README.md").read_text()
BUILD = {"pyproject.toml", "README.md", "LICENSE", "mlprune", "sweeps"}  # what pip needs to build us


def to_launch(config: dict[str, Any], shards: int, kind: str = "GPU", **scarce: float) -> dict[str, int]:
    """What Ray's autoscaler starts for so many shards of one GPU (or CPU) each, on a cluster of the head alone.

    `scarce` says of a kind of node how lately there was none to be had: 0 is now.
    """
    read = AutoscalingConfig(config, skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=read.get_node_type_configs(),
        max_num_nodes=read.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({kind: 1})] * shards),
        recoverable_resource_availabilities={name.replace("_", "-"): score for name, score in scarce.items()},
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}


def shell_lines() -> list[str]:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    return [line.strip() for line in blocks.splitlines()]
