"""The pipeline over Ray: one actor a shard. The only door to Ray core.

Hidden states go from actor to actor as Ray objects, in shared memory on one node. What arrives that way is
read-only; a layer never writes to its input (tests/test_replay.py holds every family to that).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from mlprune.errors import MlpruneError
from mlprune.models.hollow import Span
from mlprune.models.source import ModelSource
from mlprune.shards.pipeline import Pipeline
from mlprune.shards.worker import ShardWorker
from mlprune.store import MomentStore

TRIAL_SLOT = "trial_slot"  # trials take no CPU of their own: this many talk to the pipeline at once


@contextmanager
def local_ray(trial_slots: int) -> Iterator[None]:
    """Ray on this machine, for as long as the block runs; a Ray that already runs in this process is used."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # every shard uses all cores (see ShardWorker); threads that wait must not spin on them
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ray.init(
        address="local",
        resources={TRIAL_SLOT: trial_slots},
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    # what comes out of the object store is read-only, and is only read
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
    try:
        yield
    finally:
        ray.shutdown()


class RayPipeline(Pipeline):
    """All shards as actors. May be pickled to a trial, which then talks to the same actors."""

    def __init__(self, actors: Sequence[Any], spans: Sequence[Span], token_bytes: int) -> None:
        super().__init__(spans, token_bytes)
        self._actors = list(actors)

    @classmethod
    def launch(
        cls, source: ModelSource, spans: Sequence[Span], dtype: str, store: MomentStore, token_bytes: int
    ) -> RayPipeline:
        """Start an actor a span and wait until all have loaded; if one cannot, none stays."""
        gpus = torch.cuda.device_count()
        cpus = ray.cluster_resources().get("CPU", 1)
        a_gpu = math.ceil(len(spans) / gpus) if gpus else 0  # shards that share one
        options = {"num_cpus": min(1, cpus / len(spans)), "num_gpus": 1 / a_gpu if gpus else 0}
        worker = ray.remote(ShardWorker).options(**options)
        device = "cuda" if gpus else "cpu"
        actors = [worker.remote(source, span, dtype, device, store) for span in spans]
        pipeline = cls(actors, spans, token_bytes)
        try:
            pipeline.get([actor.ready.remote() for actor in actors])
        except BaseException:
            pipeline.close()
            raise
        return pipeline

    def call(self, shard: int, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._actors[shard], method).remote(*args, **kwargs)

    def get(self, promise: Any) -> Any:
        try:
            return ray.get(promise)
        except RayTaskError as error:
            if isinstance(error.cause, MlpruneError):
                raise error.cause from None  # the user's mistake, without the worker's traceback around it
            raise

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
