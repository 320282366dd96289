"""Compare a sweep that evaluates everything with racing, screening and both, in time and in the winners.

    python benchmarks/search_cost.py --work FOLDER --llmcompressor PYTHON

FOLDER keeps each finished sweep, so that an interrupted run resumes. PYTHON is an interpreter with llm-compressor
(see llmcompressor_wanda.py); without it, only the evaluation of (e) is timed. The grid has 6 calibrations x 2
rules x the sparsities. The default is reduced, to an estimated 40 minutes on two idle cores: 3 sparsities, 24
lines for selection and as many for confirmation, 3 languages. The full form takes hours:

    --sparsities 0.3,0.4,0.5,0.6,0.7 --lines 48 --languages en,fr,de,es,sw

(a) everything is evaluated
(b) `search.racing`
(c) `search.screen: 3`
(d) both
(e) one variant with other tools: llm-compressor's Wanda on the tokens of translation:en-fr (its prompts are all
    full; those of (a) to (d) are not longer), then the selection lines through plain transformers, in the same
    micro-batches

(a) to (d) are whole sweeps over Ray, each in a process and a storage of its own: they start Ray, gather moments,
confirm the best variants, log to MLflow and draw pictures. (a) to (e) take turns within a round, so that a change
in the machine's speed affects all of them alike. Ratios are of medians over the rounds. Winners of (b), (c) and
(d) that are not those of (a) are compared with them on the confirmation lines of the first round.
"""

import json
import multiprocessing
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from sweep_cost import llmcompressor
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from mlprune.evaluation.items import from_json
from mlprune.evaluation.significance import LEVEL
from mlprune.spec.loading import parse_spec
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Variant, VariantValues
from mlprune.storage.files import write_whole
from mlprune.sweep.plan import SweepPlan, plan_sweep
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.ranking import Trial, difference
from mlprune.sweep.status import SweepStatus
from mlprune.sweep.sweep import run_sweep

CALIBRATIONS = ("mono:en", "mono:fr", "mono:sw", "translation:en-fr", "translation:en-de", "translation:en-sw")
LABELS = {"a": "everything", "b": "racing", "c": "screen 3", "d": "racing, screen 3"}
SEARCHES: dict[str, dict[str, object]] = {
    "a": {},
    "b": {"racing": True},
    "c": {"screen": 3},
    "d": {"racing": True, "screen": 3},
}
AIMS = {"b": 0.5, "c": 0.3, "d": 0.3}  # of (a)
AIM_OF_ONE = 1 / 6  # (d) per variant, of (e)
CONFIRMING, OTHER = "confirming the best", "start and end"  # phases: the first one is the name of a stage


@dataclass(frozen=True)
class TimedSweep:
    """One finished sweep."""

    seconds: Mapping[str, float]  # by phase; what no status reports is OTHER
    winners: Mapping[str, VariantValues]  # sparsity -> variant

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def search(self) -> float:
        """The seconds without those of confirmation."""
        return self.total - self.seconds.get(CONFIRMING, 0.0)


@dataclass(frozen=True)
class TimedTools:
    """One variant with other tools: seconds of pruning (None without llm-compressor) and of evaluation."""

    prune: float | None
    evaluate: float


class PhaseClock:
    """Sums the seconds of each phase over the statuses of a sweep."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last: SweepStatus | None = None

    def show(self, status: SweepStatus) -> None:
        if self._last is not None:
            self.seconds[self._last.phase] += status.now - self._last.now
        self._last = status


def timed_sweep(spec: SweepSpec) -> TimedSweep:
    """Run a sweep in this process."""
    clock, started = PhaseClock(), time.perf_counter()
    outcome = run_sweep(spec, clock.show)
    total = time.perf_counter() - started
    assert not outcome.failed, outcome.failed
    winners = {
        f"{entry.variant.sparsity:g}": entry.result.variant.to_dict()
        for entry in outcome.best_by_sparsity()
        if entry.result.variant
    }
    return TimedSweep({**clock.seconds, OTHER: total - sum(clock.seconds.values())}, winners)


def in_fresh_process(spec: SweepSpec) -> TimedSweep:
    """Run a sweep in a new process, so that each sweep has the same start."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(timed_sweep, spec).result()


@torch.inference_mode()
def plain_likelihoods(model: PreTrainedModel, prepared: Prepared) -> Tensor:
    """Return the negative log-likelihood of each selection row by plain transformers, in nats."""
    rows = prepared.suite.rows
    nll_R = torch.zeros(rows.count)
    for batch in rows.batches:
        logits_BTV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        nll_BT = cross_entropy(logits_BTV.transpose(1, 2).float(), batch.input_ids[:, 1:], reduction="none")
        nll_R[list(batch.rows)] = (nll_BT * batch.scored_mask[:, :-1]).sum(1)
    return nll_R


def timed_tools(python: str | None, prepared: Prepared, work: Path) -> TimedTools:
    """Time the other tools, and check that plain transformers computes what the sweep does."""
    prune = None
    if python:
        ids = torch.tensor([prompt.ids for prompt in prepared.set_of("translation:en-fr").prompts])
        save_file({"input_ids": ids}, work / "ids.safetensors")
        prune = llmcompressor(python, prepared.source.folder, work / "ids.safetensors")
    model = AutoModelForCausalLM.from_pretrained(prepared.source.folder).eval()
    started = time.perf_counter()
    nll_R = plain_likelihoods(model, prepared)
    evaluate = time.perf_counter() - started
    items = from_json(prepared.result_store().items(prepared.result_key(None)))
    assert np.isclose(sum(sum(part.columns["nll"]) for part in items), float(nll_R.sum()), rtol=0.01)
    return TimedTools(prune, evaluate)


def spec_of(values: Mapping[str, object], search: Mapping[str, object], storage: Path) -> SweepSpec:
    grid = {"calibration": list(CALIBRATIONS), "score": ["wanda", "ria"], "propagation": ["dense"]}
    own = values["search"]
    assert isinstance(own, dict)
    return parse_spec({**values, "search": {**grid, **own, **search}, "storage": str(storage)})


class Benchmark:
    """The sweeps of one folder: those that are stored there are not run again."""

    def __init__(self, values: Mapping[str, object], names: str, work: Path, python: str | None) -> None:
        self._values, self._work, self._python = values, work, python
        self.count = len(self.plan("a").variants)  # planning also hashes the model, once for all sweeps
        self.sweeps: dict[str, list[TimedSweep]] = {name: [] for name in SEARCHES if name in names}
        self.tools: list[TimedTools] = []

    def plan(self, name: str, number: int = 0) -> SweepPlan:
        """Return the plan of a sweep of that round."""
        return plan_sweep(spec_of(self._values, SEARCHES[name], self._storage(name, number)))

    def _storage(self, name: str, number: int) -> Path:
        return self._work / f"{number}-{name}-store"

    def run_round(self, number: int) -> None:
        """Run what the folder lacks of a round, and print each result on standard error."""
        for name in self.sweeps:
            file = self._work / f"{number}-{name}.json"
            if not file.exists():
                shutil.rmtree(self._storage(name, number), ignore_errors=True)
                sweep = in_fresh_process(spec_of(self._values, SEARCHES[name], self._storage(name, number)))
                write_whole(file, json.dumps(asdict(sweep)).encode())
            self.sweeps[name].append(TimedSweep(**json.loads(file.read_bytes())))
            click.echo(f"round {number + 1}, ({name}): {self.sweeps[name][-1].total:.1f} s", err=True)
        file = self._work / f"{number}-e.json"
        if not file.exists():
            tools = timed_tools(self._python, self.plan("a", number).prepared, self._work)
            write_whole(file, json.dumps(asdict(tools)).encode())
        self.tools.append(TimedTools(**json.loads(file.read_bytes())))
        click.echo(f"round {number + 1}, (e): {self.tools[-1]}", err=True)


def confirmed(prepared: Prepared, variant: Variant | None) -> Trial:
    """Return a variant's result on the confirmation lines; None: the dense model."""
    assert prepared.evaluation is not None
    store, key = prepared.result_store(), prepared.result_key(variant, prepared.evaluation.confirmation)
    result = store.load(key)
    assert result is not None
    return Trial(result, from_json(store.items(key)))


def report(benchmark: Benchmark) -> Iterator[str]:
    """Yield the table, line by line; columns are separated by two spaces or more."""
    for name, sweeps in benchmark.sweeps.items():
        phases = {phase: _median([one.seconds.get(phase, 0.0) for one in sweeps]) for phase in sweeps[0].seconds}
        parts = ", ".join(f"{phase.replace(',', ':')} {value:.0f}" for phase, value in phases.items())
        yield f"({name}) {LABELS[name]:16}  {_seconds([one.total for one in sweeps])} ({parts})"
    pruned = [one.prune for one in benchmark.tools if one.prune is not None]
    evaluated = [one.evaluate for one in benchmark.tools]
    if pruned:
        yield f"(e) llm-compressor    {_seconds(pruned)}"
    yield f"(e) plain evaluation  {_seconds(evaluated)}"
    yield from _ratios(benchmark, _median(pruned) + _median(evaluated) if pruned else None)
    prepared = {name: benchmark.plan(name).prepared for name in benchmark.sweeps}
    for name in [name for name in AIMS if name in prepared]:
        for sparsity, expected in benchmark.sweeps["a"][0].winners.items():
            own = Variant.from_dict(benchmark.sweeps[name][0].winners[sparsity])
            verdict = _verdict(prepared["a"], Variant.from_dict(expected), prepared[name], own)
            yield f"({name}) at {sparsity}  {verdict}"


def _ratios(benchmark: Benchmark, one_variant: float | None) -> Iterator[str]:
    total = {name: _median([one.total for one in sweeps]) for name, sweeps in benchmark.sweeps.items()}
    search = {name: _median([one.search for one in sweeps]) for name, sweeps in benchmark.sweeps.items()}
    for name in [name for name in AIMS if name in total]:
        ratio, unconfirmed, aim = total[name] / total["a"], search[name] / search["a"], AIMS[name]
        yield f"({name}) / (a)  {ratio:.3f}, without confirmation {unconfirmed:.3f}  aim: at most {aim}"
    if one_variant is not None:
        for name, seconds in total.items():
            aim_text = f"  aim: at most {AIM_OF_ONE:.3f}" if name == "d" else ""
            yield f"({name}) / {benchmark.count} (e)  {seconds / benchmark.count / one_variant:.3f}{aim_text}"


def _verdict(everything: Prepared, expected: Variant, prepared: Prepared, own: Variant) -> str:
    """Return whether a sweep's winner is that of (a), or how they differ on the confirmation lines."""
    if own == expected:
        return f"the same winner: {own.label}"
    trials = confirmed(prepared, own), confirmed(everything, expected)
    one = difference([trials[0]], [trials[1]], confirmed(prepared, None), "loss.mean")
    verdict = "significantly different" if one.p < LEVEL else "not significantly different"
    points = f"{100 * one.value:+.2f} points [{100 * one.low:.2f}, {100 * one.high:.2f}], p {one.p:.2g}"
    return f"{own.label} instead of {expected.label}: {points}: {verdict}"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _seconds(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values) + " s"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="A folder for finished sweeps.")
@click.option("--llmcompressor", "python", metavar="PYTHON", help="An interpreter with llm-compressor.")
@click.option("--model", default="demo", help="A model folder, a Hugging Face model id, or demo (the default).")
@click.option("--sweeps", default="abcd", help="Which to run; a is needed.")
@click.option("--sparsities", default="0.3,0.5,0.7")
@click.option("--languages", default="en,fr,sw", help="Languages of the evaluation.")
@click.option("--lines", default=24, help="Held-out lines per language for selection, and for confirmation.")
@click.option("--rounds", default=2)
@click.option("--prompts", default=32, help="Prompts of each calibration set.")
@click.option("--tokens", default=256, help="Tokens of each prompt, at most.")
def main(
    work: Path,
    python: str | None,
    model: str,
    sweeps: str,
    sparsities: str,
    languages: str,
    lines: int,
    rounds: int,
    prompts: int,
    tokens: int,
) -> None:
    """Run all sweeps that are missing, and print seconds, ratios and winners."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    values = {
        "name": "search_cost",
        "model": {"path": model},
        "calibration": {"samples": prompts, "shots": 6, "max_tokens": tokens},
        "search": {"sparsity": [float(ratio) for ratio in sparsities.split(",")]},
        "evaluation": {"perplexity": {"languages": languages.split(","), "lines": lines}},
    }
    benchmark = Benchmark(values, sweeps, work, python)
    for number in range(rounds):
        benchmark.run_round(number)
    for line in report(benchmark):
        click.echo(line)


if __name__ == "__main__":
    main()
