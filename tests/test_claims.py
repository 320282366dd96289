"""Claims: their text form, mistakes in one line, the arithmetic of their tests, and one sweep with them."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from mlprune.cli import main
from mlprune.errors import SpecError
from mlprune.evaluation.estimates import Estimate, estimate
from mlprune.evaluation.items import Items
from mlprune.evaluation.loss import loss_metrics, loss_samples
from mlprune.evaluation.significance import holm
from mlprune.evaluation.suite import Suite
from mlprune.report.claims import claim_notes, claims_by_language, claims_table
from mlprune.spec.calibrations import Calibration
from mlprune.spec.claims import ClaimSpec, Comparison, Side
from mlprune.spec.loading import load_spec, parse_spec, read_yaml
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Scoring, Variant
from mlprune.storage.results import Result
from mlprune.sweep import ranking, sweep
from mlprune.sweep.claims import ClaimDifference, ClaimTest, PlannedClaim, claim_tests, claim_values, plan_claims
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.plan import plan_sweep, select_variants
from mlprune.sweep.session import open_local
from mlprune.sweep.stage import Purpose, Stage
from mlprune.sweep.stage_runner import StageRunner
from mlprune.sweep.trial import run_dense, run_trial
from mlprune.sweep.trial_progress import TrialProgress
from tests.runs import likelihood
from tests.tiny_models import config, save, source

OTHER = {"claim": "other", "better": "translation:en-{xx}", "than": "mono:{xx}", "languages": ["fr", "de"]}
ENGLISH = {"claim": "English", "better": "translation:en-fr", "than": "mono:en", "metric": "loss.en"}
MAGNITUDE = {"claim": "rule", "better": "mono:en", "than": "magnitude", "metric": "loss.mean"}
HEADLINE = {"claim": "headline", "better": "translation:en-{xx}", "than": "dense", "languages": ["fr"]}


def spec(*claims: dict[str, Any], **changes: Any) -> SweepSpec:
    search = {
        "calibration": ["mono:en", "mono:fr", "mono:de", "translation:en-fr", "translation:en-de"],
        "score": ["magnitude", "wanda"],
        "sparsity": [0.3, 0.5],
        "propagation": ["dense"],
        "seed": [0, 1],
    }
    return parse_spec({"search": search | changes, "claims": list(claims)})


def planned(checked: SweepSpec, confirms: bool = True) -> tuple[PlannedClaim, ...]:
    return plan_claims(checked, select_variants(checked.search, 0), confirms)


def wanda(calibration: str) -> Side:
    return Side(Scoring("wanda"), Calibration.parse(calibration))


def test_a_claim_is_compared_in_each_language() -> None:
    first, second = spec(OTHER).claims[0].comparisons()
    assert first == Comparison("fr", "loss.fr", wanda("translation:en-fr"), wanda("mono:fr"))
    assert second == Comparison("de", "loss.de", wanda("translation:en-de"), wanda("mono:de"))
    (alone,) = spec(HEADLINE | {"metric": "loss.en", "better": "mono:{xx}"}).claims[0].comparisons()
    assert alone == Comparison("fr", "loss.en", wanda("mono:fr"), None)
    (one,) = spec(MAGNITUDE).claims[0].comparisons()
    assert one == Comparison(None, "loss.mean", wanda("mono:en"), Side(Scoring("magnitude"), None))


@pytest.mark.parametrize(
    ("text", "score", "calibration"),
    [
        ("code", "wanda", "code"),
        ("sparsegpt mix:mono:en=0.5,code=0.5", "sparsegpt", "mix:code=0.5,mono:en=0.5"),
        ("contrastive:translation:en-fr/code", "contrastive:translation:en-fr/code", "None"),
        ("random", "random", "None"),
        ("mono:fr owl", "wanda", "mono:fr"),
        ("magnitude owl", "magnitude", "None"),
        ("ria mono:fr owl", "ria", "mono:fr"),
    ],
)
def test_a_side_is_a_rule_a_calibration_or_both(text: str, score: str, calibration: str) -> None:
    side = Side.parse(text, "key")
    assert (str(side.score), str(side.calibration)) == (score, calibration)
    assert side.allocation == ("owl" if text.endswith("owl") else None)


def test_claims_about_allocations_compare_trials_of_each() -> None:
    claim = {"claim": "owl", "better": "mono:en owl", "than": "mono:en", "metric": "loss.mean"}
    (one, _) = planned(spec(claim, allocation=["uniform", "owl"]))
    ((pair,), *_) = one.pairs
    assert [variant.allocation for variant in (pair.better, pair.than) if variant] == ["owl", "uniform"]
    with pytest.raises(SpecError, match=r"'wanda 0\.3 mono:en owl': the search has no such trial"):
        planned(spec(claim))


def test_claims_survive_being_written() -> None:
    made = spec(OTHER, ENGLISH, HEADLINE)
    again = parse_spec(read_yaml(made.yaml()))
    assert again == made
    assert again.key == made.key != spec(OTHER, ENGLISH).key
    assert hash(again) == hash(made)


WRITTEN = [
    ([OTHER, ENGLISH, OTHER], "claims[2].claim: 'other': name each claim once"),
    ([{"claim": "a", "better": "mono:en"}], "claims[0].than: missing required key"),
    ([OTHER | {"bettr": "x"}], "claims[0].bettr: 'x': unknown key; did you mean better?"),
    ([OTHER | {"languages": []}], "claims[0].languages: []: name the languages that {xx} stands for"),
    ([ENGLISH | {"languages": ["fr"]}], "claims[0].languages: ['fr']: nothing in the claim contains {xx}"),
    ([OTHER | {"languages": ["fr", "qq"]}], "claims[0].languages[1]: 'qq': not an ISO 639 code"),
    ([OTHER | {"languages": ["en"]}], "claims[0].better: 'translation:en-en': a translation needs two"),
    ([ENGLISH | {"better": "mono:qq"}], "claims[0].better: 'qq': not an ISO 639 code"),
    ([ENGLISH | {"than": "di:en"}], "claims[0].than: 'di:en': write mono:fr"),
    ([ENGLISH | {"than": "mono:en wanda"}], "claims[0].than: 'mono:en wanda': write a calibration, a rule, or"),
    ([ENGLISH | {"than": ""}], "claims[0].than: '': write a calibration"),
    ([ENGLISH | {"than": "translation:en-fr"}], "claims[0].than: 'translation:en-fr': is the same as `better`"),
    ([ENGLISH | {"claim": ""}], "claims[0].claim: '': must not be empty"),
]


@pytest.mark.parametrize(("claims", "line"), WRITTEN)
def test_a_mistake_in_the_text_is_answered(claims: list[dict[str, Any]], line: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(*claims)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


PLANNED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (ENGLISH | {"than": "mono:es"}, {}, "claims[0].than: 'wanda 0.3 mono:es': the search has no such trial"),
    (ENGLISH | {"better": "ria mono:en"}, {}, "claims[0].better: 'ria 0.3 mono:en': the search has no such trial"),
    (ENGLISH | {"better": "dense"}, {}, "claims[0].better: 'dense': "),
    (ENGLISH | {"metric": "loss.es"}, {}, "claims[0].metric: 'loss.es': the evaluation does not yield it; write"),
    (ENGLISH | {"metric": "xnli.fr"}, {}, "claims[0].metric: 'xnli.fr': the evaluation does not yield it"),
    (ENGLISH, {"racing": True}, "search.racing: True: may leave out trials"),
    (ENGLISH, {"screen": 3}, "search.screen: 3: may leave out trials"),
    (ENGLISH, {"searcher": "optuna", "samples": 3, "seed": [0]}, "search.searcher: optuna: may leave out trials"),
    (ENGLISH, {"propagation": ["dense", "sequential"]}, "search.propagation: [dense, sequential]: claims compare"),
    (ENGLISH, {"pattern": ["unstructured", "2:4"]}, "search.pattern: [unstructured, 2:4]: claims compare"),
]


@pytest.mark.parametrize(("claim", "search", "line"), PLANNED)
def test_what_cannot_be_tested_is_answered(claim: dict[str, Any], search: dict[str, Any], line: str) -> None:
    with pytest.raises(SpecError) as caught:
        planned(spec(claim, **search))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_claims_need_confirmation_lines() -> None:
    with pytest.raises(SpecError, match=r"^evaluation.perplexity.confirmation_lines: claims need such lines"):
        planned(spec(ENGLISH), confirms=False)
    assert planned(spec(), confirms=False) == ()


def test_the_trials_of_a_claim_are_paired_by_seed_and_language() -> None:
    first, second = planned(spec(OTHER))
    assert (first.sparsity, second.sparsity) == (0.3, 0.5)
    names = [[(pair.metric, pair.better.label, pair.than and pair.than.label) for pair in s] for s in second.pairs]
    assert names == [
        [
            (f"loss.{code}", f"wanda 0.5 translation:en-{code}{seed}", f"wanda 0.5 mono:{code}{seed}")
            for code in ("fr", "de")
        ]
        for seed in ("", " seed 1")
    ]
    (rule, _) = planned(spec(MAGNITUDE))
    assert [pairs[0].than for pairs in rule.pairs] == [
        parse_variant(None, "magnitude", 0.3, "unstructured", "dense")
    ] * 2


# Items by hand: ten lines of 100 bytes. A loss of x on a line adds x times its nats.
DENSE_NATS = np.linspace(50.0, 140.0, 10)


def run(**losses: Any) -> list[Items]:
    """Return the items of a run whose loss on each line is given, by language."""
    return [
        likelihood(DENSE_NATS * (1 + np.broadcast_to(loss, 10)), [100] * 10, code) for code, loss in losses.items()
    ]


DENSE = run(en=0.0, fr=0.0, de=0.0)
NOISE = np.array([1, -1, 2, -2, 1, 0, -1, 2, -1, -1]) / 100


def items_of(claims: Sequence[PlannedClaim], **by_calibration: dict[str, Any]) -> dict[Variant, list[Items]]:
    """Return the items of each trial of the claims; keys are the short names of calibrations, `-` as `_`."""
    return {
        variant: run(
            **{
                "en": 0.1,
                "fr": 0.1,
                "de": 0.1,
                **by_calibration.get(variant.short.split()[0].replace("-", "_"), {}),
            }
        )
        for claim in claims
        for variant in claim.variants
    }


def test_the_difference_is_the_mean_over_languages_and_seeds() -> None:
    claims = planned(spec(OTHER, sparsity=[0.5]))
    items = items_of(
        claims, en_fr={"fr": 0.05 + NOISE}, en_de={"de": 0.08 - NOISE}, fr={"fr": 0.11}, de={"de": 0.10}
    )
    (test,) = claim_tests(claims, items, DENSE)
    weight = DENSE_NATS / DENSE_NATS.sum()
    french, german = (float(weight @ loss) for loss in (0.05 + NOISE - 0.11, 0.08 - NOISE - 0.10))
    assert test.languages["fr"].estimate.value == pytest.approx(french)
    assert test.languages["de"].estimate.value == pytest.approx(german)
    assert test.mean.estimate.value == pytest.approx((french + german) / 2)
    assert test.mean.verdict == "holds"
    assert test.seeds == 2


def test_the_languages_are_resampled_together() -> None:
    """Noise that is opposite in both languages cancels in their mean: lines are drawn for both at once."""
    claims = planned(spec(OTHER, sparsity=[0.5]))
    items = items_of(claims, en_fr={"fr": 0.05 + NOISE}, en_de={"de": 0.05 - NOISE})
    (test,) = claim_tests(claims, items, DENSE)
    assert test.mean.estimate.high - test.mean.estimate.low < 1e-6
    one = test.languages["fr"].estimate
    assert one.high - one.low > 0.01


def random_items(claims: Sequence[PlannedClaim], seed: int) -> dict[Variant, list[Items]]:
    draw = np.random.default_rng(seed)
    variants = dict.fromkeys(variant for claim in claims for variant in claim.variants)
    return {v: run(**{code: draw.normal(0.1, 0.05, 10) for code in ("en", "fr", "de")}) for v in variants}


def test_estimates_and_corrections_are_those_of_the_plain_computation() -> None:
    claims = planned(spec(OTHER, ENGLISH, MAGNITUDE, HEADLINE))
    items = random_items(claims, 5)
    tests = claim_tests(claims, items, DENSE)

    def losses(variant: str, metric: str, seed: int) -> Any:
        calibration, score, sparsity = variant.split()
        v = parse_variant(
            calibration if calibration != "-" else None, score, float(sparsity), "unstructured", "dense", seed=seed
        )
        return loss_samples(items[v], DENSE, [metric])[metric]

    expected: dict[tuple[str, float], Estimate] = {}
    alone: dict[tuple[float, str], Estimate] = {}
    for s in (0.3, 0.5):
        seeds = (0, 1)
        by_language = {
            code: [
                losses(f"translation:en-{code} wanda {s}", f"loss.{code}", n)
                - losses(f"mono:{code} wanda {s}", f"loss.{code}", n)
                for n in seeds
            ]
            for code in ("fr", "de")
        }
        alone |= {(s, code): estimate(samples, 10) for code, samples in by_language.items()}
        expected["other", s] = estimate([(fr + de) / 2 for fr, de in zip(*by_language.values(), strict=True)], 10)
        expected["English", s] = estimate(
            [losses(f"translation:en-fr wanda {s}", "loss.en", n) for n in seeds],
            10,
            [losses(f"mono:en wanda {s}", "loss.en", n) for n in seeds],
        )
        expected["rule", s] = estimate(
            [losses(f"mono:en wanda {s}", "loss.mean", n) for n in seeds],
            10,
            [losses(f"- magnitude {s}", "loss.mean", 0)],
        )
        expected["headline", s] = estimate(
            [losses(f"translation:en-fr wanda {s}", "loss.fr", n) for n in seeds], 10
        )
    order = [(name, s) for name in ("other", "English", "rule", "headline") for s in (0.3, 0.5)]
    assert [(test.claim.claim, test.sparsity) for test in tests] == order
    for test in tests:
        same = expected[test.claim.claim, test.sparsity]
        assert vars(test.mean.estimate) == pytest.approx(vars(same), rel=1e-9)
    assert [test.mean.adjusted for test in tests] == pytest.approx(holm([expected[key].p for key in order]))
    assert [(test.sparsity, code) for test in tests[:2] for code in test.languages] == list(alone)
    adjusted = [one.adjusted for test in tests[:2] for one in test.languages.values()]
    assert adjusted == pytest.approx(holm([one.p for one in alone.values()])), "corrected within the claim"
    assert tests[2].languages == tests[4].languages == {}
    assert tests[6].languages["fr"].estimate == tests[6].mean.estimate


def test_seeds_with_a_failed_trial_are_left_out() -> None:
    claims = planned(spec(OTHER, sparsity=[0.5]))
    items = random_items(claims, 6)
    del items[parse_variant("mono:de", "wanda", 0.5, "unstructured", "dense", seed=1)]
    (test,) = claim_tests(claims, items, DENSE)
    one_seed = planned(spec(OTHER, sparsity=[0.5], seed=[0]))
    (same,) = claim_tests(one_seed, items, DENSE)
    assert (test.seeds, test.mean) == (1, same.mean)
    del items[parse_variant("mono:fr", "wanda", 0.5, "unstructured", "dense", seed=0)]
    (nothing,) = claim_tests(claims, items, DENSE)
    assert (nothing.seeds, nothing.mean.verdict, nothing.languages["fr"].verdict) == (0, "unknown", "unknown")


def test_a_destroyed_model_leaves_a_claim_unknown() -> None:
    claims = planned(spec(OTHER, sparsity=[0.5]))
    items = items_of(claims, en_fr={"fr": np.inf}, fr={"fr": np.inf}, en_de={"de": 0.05 + NOISE})
    (test,) = claim_tests(claims, items, DENSE)
    assert test.mean.verdict == test.languages["fr"].verdict == "unknown"
    assert test.languages["de"].verdict == "holds"


@pytest.mark.parametrize(
    ("value", "adjusted", "verdict"),
    [(-0.1, 0.049, "holds"), (0.1, 0.049, "fails"), (-0.1, 0.05, "unknown"), (-0.1, np.nan, "unknown")],
)
def test_verdicts(value: float, adjusted: float, verdict: str) -> None:
    assert ClaimDifference(Estimate(value, -1, 1, 0.01), adjusted).verdict == verdict


def result(claim: ClaimSpec, sparsity: float, value: float, **languages: float) -> ClaimTest:
    def one(value: float) -> ClaimDifference:
        return ClaimDifference(
            Estimate(value, value - 0.01, value + 0.01, 0.001), 0.004 if abs(value) > 0.01 else 0.5
        )

    return ClaimTest(claim, sparsity, 5, one(value), {code: one(value) for code, value in languages.items()})


def test_tables_and_notes() -> None:
    claims = spec(OTHER, ENGLISH).claims
    tests = [
        result(claims[0], 0.3, -0.0234, fr=-0.04, de=-0.005),
        result(claims[0], 0.5, 0.001, fr=0.04, de=-0.038),
        result(claims[1], 0.3, 0.02),
    ]
    columns = [list(column.cells) for column in claims_table(tests).columns]
    assert columns == [
        ["1", "", "2"],
        ["other", "", "English"],
        ["0.3", "0.5", "0.3"],
        ["-2.34 [-3.34, -1.34]", "+0.10 [-0.90, 1.10]", "+2.00 [1.00, 3.00]"],
        ["holds", "unknown", "fails"],
    ]
    table = claims_by_language(tests)
    assert table
    columns = [list(column.cells) for column in table.columns]
    assert columns == [["1", ""], ["0.3", "0.5"], ["-4.00*", "+4.00*"], ["-0.50", "-3.80*"]]
    assert claims_by_language(tests[2:]) is None
    assert claim_notes(tests) == ["other: holds at 0.3; unknown at 0.5", "English: fails at 0.3"]
    values = claim_values(tests[0])
    assert values["than"] == "mono:{xx}"
    assert (values["sparsity"], values["verdict"]) == (0.3, "holds")
    assert json.loads(json.dumps(values)) == values


class InProcessRunner(StageRunner):
    """Runs trials one by one in this process, without Ray, and notes what each stage ran."""

    ran: ClassVar[list[tuple[Purpose, list[Variant]]]] = []

    def _evaluate_dense(self, suite: Suite) -> Result:
        with open_local(self._prepared) as pipeline:
            result, items = run_dense(self._prepared, pipeline, suite)
        self._store.save(result, items)
        return result

    def _run(self, stage: Stage, todo: Sequence[Variant], progress: TrialProgress) -> dict[Variant, Result]:
        self.ran.append((stage.purpose, list(todo)))
        results = {}
        with open_local(self._prepared) as pipeline:
            gather_moments(self._prepared, pipeline, todo)
            for variant in todo:
                results[variant], items = run_trial(self._prepared, pipeline, variant, stage.suite)
                self._store.save(results[variant], items)
                if stage.purpose is Purpose.SELECT:
                    self._tracker.finish_trial(results[variant], partial(str, items))
        return results


def tiny_sweep(folder: Path) -> tuple[dict[str, Any], str]:
    """Run a small sweep with claims; return its values and what it printed."""
    values = {
        "name": "tiny",
        "model": {"path": str(source().folder)},
        "calibration": {"samples": 4, "shots": 2, "max_tokens": 128},
        "search": {
            "calibration": ["mono:en", "mono:fr", "translation:en-fr", "code"],
            "score": ["magnitude", "wanda"],
            "sparsity": [0.5, 0.7],
            "propagation": ["dense"],
            "seed": [0, 1],
        },
        "evaluation": {"perplexity": {"languages": ["en", "fr"], "lines": 3, "confirmation_lines": 8}},
        "claims": [OTHER | {"languages": ["fr"]}, MAGNITUDE, HEADLINE],
        "storage": str(folder / "store"),
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(main, ["sweep", str(folder / "tiny.yaml"), "--json", str(folder / "out.json")])
    assert result.exit_code == 0, result.output
    return json.loads((folder / "out.json").read_text()), result.output


def test_a_sweep_tests_its_claims_on_the_confirmation_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "StageRunner", InProcessRunner)
    monkeypatch.setattr(ranking, "LEVEL", 1.1)  # no trial is tied with the best, so none is confirmed for that
    InProcessRunner.ran.clear()
    outcome, printed = tiny_sweep(tmp_path)
    (_, selected), (purpose, confirmed) = InProcessRunner.ran
    plan = plan_sweep(load_spec(str(tmp_path / "tiny.yaml")))
    compared = {variant for claim in plan.claims for variant in claim.variants}
    assert (len(selected), len(compared)) == (2 * (1 + 4 * 2), 2 * (1 + 3 * 2))
    assert purpose is Purpose.CONFIRM
    best = {json.dumps(one["variant"]) for one in outcome["ranking"] if one["to_best"] is None}
    assert {one for one in confirmed if json.dumps(one.without_seed.to_dict()) not in best} <= compared
    assert compared <= set(confirmed)
    assert len(set(confirmed)) == len(confirmed), "each is evaluated once"
    assert plan.passes["confirmation, for claims"] == 0
    assert [(one["claim"], one["sparsity"]) for one in outcome["claims"]] == [
        (name, sparsity) for name in ("other", "rule", "headline") for sparsity in (0.5, 0.7)
    ]

    def loss(calibration: str | None, score: str, seed: int, metric: str) -> float:
        variant = parse_variant(calibration, score, 0.7, "unstructured", "dense", seed=seed)
        assert plan.prepared.evaluation
        suite, store = plan.prepared.evaluation.confirmation, plan.prepared.result_store()
        own, dense = (store.load(plan.prepared.result_key(which, suite)) for which in (variant, None))
        assert own
        assert dense
        return loss_metrics(own.metrics, dense.metrics)[metric]

    expected = [
        fmean(
            loss("translation:en-fr", "wanda", n, "loss.fr") - loss("mono:fr", "wanda", n, "loss.fr")
            for n in (0, 1)
        ),
        fmean(loss("mono:en", "wanda", n, "loss.mean") - loss(None, "magnitude", 0, "loss.mean") for n in (0, 1)),
        fmean(loss("translation:en-fr", "wanda", n, "loss.fr") for n in (0, 1)),
    ]
    assert [one["difference"]["value"] for one in outcome["claims"][1::2]] == pytest.approx(expected)
    client = MlflowClient(outcome["tracking_uri"])
    artifact = Path(client.download_artifacts(outcome["parent_run"], "claims.json")).read_text()
    assert json.loads(artifact) == outcome["claims"]
    notes = client.get_run(outcome["parent_run"]).data.tags["mlflow.note.content"]
    verdicts = [one["verdict"] for one in outcome["claims"][-2:]]
    assert all(f"{verdict} at " in notes.split("- headline: ")[1].splitlines()[0] for verdict in verdicts)
    assert "claims by language" in printed
    monkeypatch.setattr(InProcessRunner, "_run", None)
    assert tiny_sweep(tmp_path)[0]["claims"] == outcome["claims"], "read from stored results"


def test_the_shipped_claims_can_be_tested() -> None:
    shipped = load_spec("claims")
    claims = planned(shipped)
    assert len(claims) == 3 * len(shipped.claims)
    variants = select_variants(shipped.search, 0)
    assert {variant for claim in claims for variant in claim.variants} == set(variants), "all trials are compared"
    assert shipped.evaluation.perplexity.confirmation_lines


def test_a_dry_run_of_the_shipped_claims_goes_through(tmp_path: Path) -> None:
    # a byte of Hindi is a token of the tests' tokenizer, so lines are long
    save(config("llama", max_position_embeddings=8192), tmp_path / "model")
    settings = {"model.path": tmp_path / "model", "calibration.samples": 2, "storage": tmp_path / "store"}
    words = [f"--set={key}={value}" for key, value in settings.items()]
    result = CliRunner().invoke(main, ["sweep", "claims", "--dry-run", "--json", "-", *words])
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert len(plan["trials"]) == 3 * (1 + 5 * 18)
    assert plan["passes"]["confirmation, for claims"] == len(plan["trials"])
