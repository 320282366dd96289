"""Where workers run: bundles of resources on the nodes of a cluster, one a shard, and slots for trial processes.

The processes themselves are started in `actors` and, for trials, by Ray Tune.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mlprune.planning.machine import Machine
from mlprune.runtime.nodes import resources_text, usable_nodes, wait_until

GRANULARITY = 10_000  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Placement:
    """Equal bundles of resources, one a shard, each of them on a single node."""

    group: PlacementGroup
    bundle: Mapping[str, float]
    shards: int

    @classmethod
    def request(cls, shards: int, bundle: Mapping[str, float]) -> Placement:
        """Reserve a bundle a shard, spread over nodes. Returns before Ray or its autoscaler has found nodes."""
        return cls(placement_group([dict(bundle)] * shards, strategy="SPREAD"), bundle, shards)

    def wait(self, minutes: float | None) -> None:
        """Wait until all bundles have their nodes. Raises SpecError after `minutes`; None means no limit."""
        wait_until(self._is_created, self._missing, minutes)

    def _is_created(self) -> bool:
        return bool(placement_group_table(self.group)["state"] == "CREATED")

    def _missing(self) -> str:
        free = resources_text({kind: ray.available_resources().get(kind, 0) for kind in self.bundle})
        each = resources_text(self.bundle)
        return f"waiting for resources for {self.shards} shard(s), {each} each; free: {free or 'nothing'}"

    def nodes(self) -> list[str]:
        """Return the node id of each bundle."""
        by_bundle = placement_group_table(self.group)["bundles_to_node_id"]
        return [by_bundle[number] for number in range(self.shards)]

    def order(self) -> list[int]:
        """Return the bundle of each shard, so that neighbours in the pipeline share a node where possible."""
        nodes = self.nodes()
        return sorted(range(self.shards), key=lambda bundle: (nodes[bundle], bundle))

    def strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)

    def remove(self) -> None:
        remove_placement_group(self.group)


def bundle_for(machine: Machine, workers: int, ranks: int, memory: int) -> dict[str, float]:
    """Return the resources of a shard with `ranks` ranks.

    `workers`: worker processes of the whole job. `memory`: host memory of a rank, in bytes.
    """
    on_node = -(-workers // machine.nodes)
    cpus = min((node.resources.get("CPU", 0) for node in usable_nodes()), default=0)
    bundle = {"CPU": ranks * _rounded_down(min(1.0, cpus / on_node)), "memory": float(ranks * memory)}
    if machine.gpus:
        # workers that share a GPU get equal parts of it
        bundle["GPU"] = ranks * _rounded_down(1 / -(-on_node // machine.gpus))
    return {kind: amount for kind, amount in bundle.items() if amount}


def _rounded_down(amount: float) -> float:
    return int(amount * GRANULARITY) / GRANULARITY


def trial_slots(count: int) -> dict[str, float]:
    """Return the resources that a trial process reserves, such that `count` of them fit on this node."""
    return {f"node:{ray.util.get_node_ip_address()}": _rounded_down(1 / count)}
