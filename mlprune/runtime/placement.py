"""Places on the nodes of a cluster: bundles of resources, one a shard; and room for trials beside the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mlprune.planning.machine import Machine
from mlprune.runtime.ray_cluster import resources_text, usable_nodes, wait_until

GRANULE = 10_000  # Ray counts resources in parts of so many


@dataclass(frozen=True)
class Place:
    """Bundles of resources that are alike, one a shard, each of them on one node."""

    group: PlacementGroup
    bundle: Mapping[str, float]
    shards: int

    @classmethod
    def ask(cls, shards: int, bundle: Mapping[str, float]) -> Place:
        """Reserve a bundle a shard, on as many nodes as there are; Ray, or its autoscaler, goes to work on it."""
        return cls(placement_group([dict(bundle)] * shards, strategy="SPREAD"), bundle, shards)

    def wait(self, minutes: float | None) -> None:
        """Return when all bundles have their nodes; tell what is missing. Raises SpecError after `minutes`."""
        wait_until(self._there, self._missing, minutes)

    def _there(self) -> bool:
        return bool(placement_group_table(self.group)["state"] == "CREATED")

    def _missing(self) -> str:
        free = {kind: ray.available_resources().get(kind, 0) for kind in self.bundle}
        each = resources_text(self.bundle)
        return (
            f"waiting for places of {self.shards} shard(s), {each} each; free: {resources_text(free) or 'nothing'}"
        )

    def nodes(self) -> list[str]:
        """The node of each bundle."""
        found = placement_group_table(self.group)["bundles_to_node_id"]
        return [found[number] for number in range(self.shards)]

    def order(self) -> list[int]:
        """The bundle of each shard: neighbours in the pipeline on one node, as far as that goes."""
        nodes = self.nodes()
        return sorted(range(self.shards), key=lambda bundle: (nodes[bundle], bundle))

    def strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)

    def remove(self) -> None:
        remove_placement_group(self.group)


def bundle_for(machine: Machine, workers: int, ranks: int, memory: int) -> dict[str, float]:
    """What a shard of `ranks` ranks asks for, of `workers` ranks in all; `memory`: bytes of its node's, a rank."""
    on_node = -(-workers // machine.nodes)
    cpus = min((node["Resources"].get("CPU", 0) for node in usable_nodes()), default=0)
    asked = {"CPU": ranks * _floor(min(1.0, cpus / on_node)), "memory": float(ranks * memory)}
    if machine.gpus:
        asked["GPU"] = ranks * _floor(1 / -(-on_node // machine.gpus))  # workers that share one share it evenly
    return {kind: amount for kind, amount in asked.items() if amount}


def _floor(amount: float) -> float:
    return int(amount * GRANULE) / GRANULE


def slots(count: int) -> dict[str, float]:
    """What each of `count` things that are to be on this node at once asks Ray for, beside CPUs."""
    return {f"node:{ray.util.get_node_ip_address()}": _floor(1 / count)}
