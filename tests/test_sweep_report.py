"""What a sweep reports: tables, notes, and the description in MLflow."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import unquote

import pytest

from mlprune import console
from mlprune.evaluation.estimates import Estimate
from mlprune.report.page import description, escaped
from mlprune.report.ranking import language_cells, ranking_cells
from mlprune.report.sweep import agreement_notes, forecast_notes, show_outcome
from mlprune.spec.loading import parse_spec
from mlprune.storage.results import Result
from mlprune.sweep.ranking import RankedVariant, Standing, SweepOutcome
from mlprune.sweep.verdict import task_agreements
from mlprune.tracking.tracker import TAG_LENGTH
from tests.test_pictures import CODES, MIX, trials


def ranked(results: Sequence[Result]) -> tuple[RankedVariant, ...]:
    """The best of each sparsity is confirmed, and the second trial is not significantly different from it."""
    entries, best = [], set[float]()
    for number, one in enumerate(results):
        assert one.variant
        first = one.variant.sparsity not in best
        best.add(one.variant.sparsity)
        estimates = {
            "loss": Estimate(0.1, 0.05, 0.15, 0.0),
            "to_best": None if first else Estimate(0.02, 0.01, 0.03, 0.001),
            "confirmed": Estimate(0.12, 0.06, 0.18, 0.0) if first else None,
        }
        entries.append(RankedVariant(one, (one,), Standing.EVALUATED, 48, tied=number == 1, **estimates))
    return tuple(entries)


def outcome(
    languages: Sequence[str],
    calibrations: Sequence[str],
    sparsities: Sequence[float] = (0.3, 0.5),
    **changed: object,
) -> SweepOutcome:
    spec = parse_spec(
        {
            "name": "small",
            "model": {"path": "a_model|*x*"},
            "search": {"calibration": list(calibrations), "score": ["wanda"], "sparsity": list(sparsities)},
            "evaluation": {"perplexity": {"languages": list(languages)}},
        }
    )
    dense, results = trials(languages, calibrations, sparsities)
    made = SweepOutcome(
        spec=spec,
        dense=dense,
        ranking=ranked(results),
        agreements=(),
        unknown_languages={},
        runs={one.key: f"run{one.key}" for one in results},
        parent_run="parent",
        pictures=(),
        experiment="7",
        failed={},
        nodes=(),
    )
    return replace(made, **changed)  # type: ignore[arg-type]


def tables(text: str) -> list[list[list[str]]]:
    """The rows of each table, without the header, as a reader of Markdown cuts them into cells."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in block[2:]] for block in blocks]


def test_description_answers_first_and_shows_the_ranking() -> None:
    made = outcome(["en", "fr"], ["mono:en", "mono:fr"])
    text = description(made)
    best = made.best_by_sparsity()
    first = text.split("\n\n")[0]
    assert r"4 trials on **a\_model&#124;\*x\***" in first
    assert all(f"**{one.variant.label}** (loss +12.0% [6.0, 18.0], confirmed)" in first for one in best)
    assert "English and French" in first
    runs = [f"run{one.key}" for one in made.ranking]
    page = re.search(r"\(#/compare-runs\?runs=(.*)&experiments=(.*)\)", first)
    assert page
    assert [json.loads(unquote(part)) for part in page.groups()] == [runs, ["7"]]
    of_best, ranking = tables(text)
    assert [row[0] for row in ranking] == [r"1\*", r"2\~", *(row[0] for row in ranking[2:])]
    assert sum(r"\*" in row[0] for row in ranking) == 2
    assert of_best == [row for row in ranking if row[0].endswith("*")]
    cells = [cell.removesuffix("&emsp;&emsp;") for cell in ranking[0][4:]]
    assert cells == [f"{100 * made.ranking[0].metrics['loss.mean']:+.1f}%", "", r"+12.0% \[6.0, 18.0\]"]
    assert ranking[1][5].startswith(r"+2.0 \[1.0, 3.0\]")
    for one in best:
        assert re.search(rf"mlprune prune \\\n  --run run{one.key} \\\n  --output small-", text)


def test_description_has_as_many_rows_as_there_is_room_for() -> None:
    calibrations = [f"translation:en-{code}" for code in CODES[1:]] + [f"mono:{code}" for code in CODES]
    made = outcome(["en", "fr"], calibrations)
    text = description(made)
    (_, ranking) = tables(text)
    assert len(ranking) == 30
    assert "... and 24 more" in text
    rest = "mono:sw=0.1,mono:th=0.1,translation:en-hi=0.1,translation:en-sw=0.1,translation:en-th=0.1"
    mixes = [f"mix:code=0.{n},mono:hi=0.{500 - n},{rest}" for n in range(100, 150)]
    made = outcome(CODES[:5], mixes)
    text = description(made)
    (_, ranking) = tables(text)
    assert 10 < len(ranking) < 30
    assert f"... and {100 - len(ranking)} more" in text
    assert len(text) <= TAG_LENGTH
    assert text.split("&experiments")[0].count("%22run") == 50, "a link to all would leave no room"


def test_description_tells_what_failed() -> None:
    cause = "layer 1: sums | of\nsquares <b>are</b> *not* finite " + 1000 * "x"
    failed = {f"wanda 0.5 {MIX} {n}": cause for n in range(12)}
    text = description(outcome(["en", "fr"], ["mono:en", "mono:fr"], failed=failed))
    assert "16 trials" in text
    assert "**12 trials failed**" in text
    assert text.count("layer 1: sums &#124; of squares &lt;b&gt;are&lt;/b&gt; ") == 10
    assert "... and 2 more" in text
    assert len(text) <= TAG_LENGTH
    assert "failed" not in description(outcome(["en", "fr"], ["mono:en", "mono:fr"]))


def test_the_worst_language_is_named_where_it_ranks() -> None:
    made = outcome(CODES, ["mono:en", "mono:fr"])
    search = made.spec.search.model_copy(update={"objective": "worst"})
    headers, rows = ranking_cells(replace(made, spec=made.spec.model_copy(update={"search": search})))
    assert headers == ["", "score", "sparsity", "calibration", "loss", "worst", "to the best", "confirmed"]
    code, value = rows[0][5].split()
    metrics = made.ranking[0].metrics
    assert metrics[f"loss.{code}"] == metrics["loss.worst"]
    assert value == f"{100 * metrics['loss.worst']:+.1f}%"


def test_bits_per_byte_stay_beside_the_losses_of_few_languages() -> None:
    headers, rows = language_cells(outcome(["en", "fr"], ["mono:en", "mono:fr"]))
    assert headers == ["", "en", "fr"]
    assert [row[0] for row in rows[:3]] == ["dense model", "1*", "2~"]
    made = outcome(["en", "fr"], ["mono:en", "mono:fr"])
    metrics = made.ranking[0].metrics
    assert rows[1][1] == f"{metrics['bits_per_byte.en']:.3f} {100 * metrics['loss.en']:+.1f}%"
    assert language_cells(outcome(CODES, ["mono:en"]))[1][1][1].endswith("%")
    assert " " not in language_cells(outcome(CODES, ["mono:en"]))[1][1][1]


def test_what_markdown_would_take_for_its_own_is_escaped() -> None:
    assert escaped("a|b") == "a&#124;b"
    assert escaped("a_b*c`d~e[f](g)\\") == r"a\_b\*c\`d\~e\[f\](g)" + "\\\\"
    assert escaped("<b>&") == "&lt;b&gt;&amp;"
    assert escaped("wanda 0.5 translation:en-fr") == "wanda 0.5 translation:en-fr"


@pytest.mark.parametrize(("count", "objective"), [(5, "worst"), (9, "mean"), (14, "mean")])
def test_tables_of_a_sweep_fit_a_hundred_columns(
    count: int, objective: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.results, "stderr", False)  # a command with --json - has left it True
    made = outcome(CODES[:count], ["mono:en", "translation:en-fr", "mix:mono:hi=0.5,translation:en-fr=0.5"])
    search = made.spec.search.model_copy(update={"objective": objective})
    entries = [
        replace(
            entry,
            result=replace(entry.result, metrics={**entry.metrics, "forecast.mean": 0.0123}),
            seeds=(entry.result, entry.result),
            to_best=entry.to_best and Estimate(0.1234, 0.1111, 0.1356, 0.001),
            confirmed=Estimate(0.2134, 0.1898, 0.2365, 0.0),
        )
        for entry in made.ranking
    ]
    entries[-1] = replace(entries[-1], standing=Standing.SCREENED, confirmed=None)
    made = replace(made, ranking=tuple(entries), spec=made.spec.model_copy(update={"search": search}))
    show_outcome(made)
    printed = capsys.readouterr().out
    ranking, languages = printed.split("In brackets")
    assert "…" not in printed
    rows = [line.rstrip() for line in printed.splitlines() if line[:1] in " 0123456789"]
    assert max(map(len, rows)) <= 100
    assert ranking.count("+21.3% [19.0, 23.6]") == 5, "numbers are not folded"
    assert "not evaluated" in ranking
    assert len(re.findall(r"^ *dense model( +\d\.\d+){" + str(count) + "}", languages, re.MULTILINE)) == 1


def test_tasks_are_compared_with_the_loss() -> None:
    made = outcome(["en", "fr"], ["mono:en", "mono:fr", "mono:de", "mono:es"], [0.3, 0.5])
    entries = []
    for entry in made.ranking:
        loss = entry.metrics["loss.mean"]
        tasks = {"xnli.en": 1 - loss, "chrf.fr-en": loss, "wikitext.word_perplexity": loss, "constant.acc": 0.5}
        entries.append(replace(entry, result=replace(entry.result, metrics={**entry.metrics, **tasks})))
    agreements = task_agreements(entries)
    assert {one.metric: round(one.tau, 9) for one in agreements} == {
        **{"xnli.en": 1.0, "chrf.fr-en": -1.0, "wikitext.word_perplexity": 1.0},
    }
    xnli, chrf, _ = agreement_notes(replace(made, agreements=agreements))
    assert xnli.startswith("xnli.en: agrees with")
    assert chrf.startswith("chrf.fr-en: disagrees with")
    assert task_agreements(entries[:3]) == ()


def test_forecasts_are_compared_with_losses_within_each_sparsity() -> None:
    made = outcome(["en", "fr"], ["mono:en", "mono:fr", "mono:de"], [0.3, 0.5])
    signs = {0.3: 1, 0.5: -1}  # the forecast orders the variants of 0.3 as the loss does, those of 0.5 in reverse
    entries = []
    for entry in made.ranking:
        forecast = {"forecast.mean": signs[entry.variant.sparsity] * entry.metrics["loss.mean"]}
        entries.append(replace(entry, result=replace(entry.result, metrics={**entry.metrics, **forecast})))
    (note,) = forecast_notes(replace(made, ranking=tuple(entries)))
    assert note.endswith("is 1.00 at 0.3, -1.00 at 0.5")
    assert forecast_notes(made) == []  # of an earlier version
