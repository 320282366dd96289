"""Small jobs on tiny models, for tests of pipelines, trials and commands."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mlprune.models.source import ModelSource
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.loading import parse_spec
from mlprune.spec.variants import Variant
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import open_local, open_replicas
from tests.tiny_models import source

needs_libaio = pytest.mark.skipif(
    not Path("/usr/include/libaio.h").exists(), reason="nvme needs libaio's headers: apt install libaio-dev"
)

WANDA = parse_variant("translation:en-fr", "wanda", 0.5, "unstructured", "dense")
SEQUENTIAL = parse_variant("translation:en-fr", "wanda", 0.5, "unstructured", "sequential")
SPARSE_2_4 = parse_variant("mono:hi", "wanda", 0.5, "2:4", "dense")
MIXED = parse_variant("mix:translation:en-fr=0.25,mono:hi=0.75", "wanda", 0.3, "unstructured", "dense")
MIXED_SEQUENTIAL = parse_variant(
    "mix:translation:en-fr=0.25,mono:hi=0.75", "wanda", 0.3, "unstructured", "sequential"
)
RANDOM = parse_variant(None, "random", 0.4, "unstructured", "dense")
CONTRASTIVE = parse_variant(None, "contrastive:translation:en-fr/mono:hi", 0.4, "unstructured", "dense")
LARGEST = parse_variant("max:translation:en-fr,mono:hi", "ria", 0.4, "unstructured", "dense")
RANKED = parse_variant("rank:translation:en-fr=0.4,mono:hi=0.6", "wanda", 0.5, "unstructured", "sequential", "owl")
OWL = parse_variant("mono:hi", "wanda", 0.5, "unstructured", "sequential", "owl")
SPARSEGPT = parse_variant("translation:en-fr", "sparsegpt", 0.5, "unstructured", "sequential")
VARIANTS = (
    WANDA,
    SEQUENTIAL,
    SPARSE_2_4,
    MIXED,
    MIXED_SEQUENTIAL,
    RANDOM,
    CONTRASTIVE,
    LARGEST,
    RANKED,
    OWL,
    SPARSEGPT,
)


def ready(
    storage: Path,
    model: ModelSource | None = None,
    shards: int = 1,
    pipeline: Any = None,
    variants: Sequence[Variant] = VARIANTS,
    **changes: Any,
) -> Prepared:
    """Return a prepared job on a tiny model: 24 prompts of up to 300 tokens, some padded."""
    values = {
        "name": "tiny",
        "model": {"path": str((model or source()).folder)},
        "pipeline": {"shards": shards, **(pipeline or {})},
        "calibration": {"samples": 24, "shots": 1, "max_tokens": 300, "seed": 0},
        "search": {"calibration": ["mono:en"], "score": ["wanda"], "sparsity": [0.5]},
        "evaluation": {"perplexity": {"languages": ["en", "hi"], "lines": 20}},
        "storage": str(storage),
    }
    spec = parse_spec({**values, **changes})
    return prepare(spec, [seeded(variant, spec.calibration.seed) for variant in variants])


def seeded(variant: Variant, seed: int) -> Variant:
    """Return the variant with another seed, if it depends on one."""
    values = variant.to_dict()
    values["seed"] = seed
    return parse_variant(**values)


@contextmanager
def opened(prepared: Prepared, over_ray: bool = False) -> Iterator[Pipeline]:
    """Open the pipeline of any number of shards, in this process or over the running Ray."""
    if over_ray:
        with open_replicas(prepared) as replicas:
            yield replicas.pipelines[0]
        return
    with open_local(prepared) as pipeline:
        yield pipeline


def masks_of(prepared: Prepared, pipeline: Pipeline, variant: Variant) -> dict[str, Tensor]:
    """Return every weight of the masked model, by name."""
    return {name: data for piece in pipeline.weights(variant.key) for name, data in piece.items()}
