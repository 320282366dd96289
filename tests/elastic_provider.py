"""Ray's provider of nodes that are processes of this machine, which fails where a node's memory is told."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):  # type: ignore[misc]
    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> Any:
        told = {kind: amount for kind, amount in resources.items() if kind != "memory"}
        return super().create_node_with_resources_and_labels(node_config, tags, count, told, labels)
