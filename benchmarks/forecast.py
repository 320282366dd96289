"""Hold forecasts of damage to the measured loss of many variants, and compare the forecast with other forms.

    python benchmarks/forecast.py --work FOLDER

FOLDER keeps each finished trial, so that an interrupted run resumes. The model is the demo model unless `--model`
names another; its matrices must be whole parameters (no experts, no Conv1D). A trial makes one variant's masks, as
`mlprune sweep` does, and evaluates held-out lines of each language; its forecast reads moments of the dense model
on monolingual calibration text of that language, with the trial's seed.

Printed are, for the forecast, Spearman's rho with the measured loss by language and sparsity, seeds together: over
all trials, and over Wanda alone (unstructured, uniform, dense). Then, for each form in forecast_forms.py, the mean
of these rho, the same for sequential Wanda, and the share of pairs of trials (of a seed and sparsity, in every
language) that it orders as the measured loss does, for pairs that differ only in their text, rule and so on.

The forms see these measures of each matrix, on text of a language. All but `energy` are a share of the whole:

share         squares of weights times squares of inputs: the forecast that mlprune makes
energy        its denominator
row           the same for each row, then the mean over rows
amplitude     absolute weights times norms of inputs, Wanda's own score
damped        squares of weights times norms of inputs, so that channels with outliers weigh less
error         the output's change, its squares summed over some tokens: unlike the share, this includes how
              channels correlate, and SparseGPT's changed weights. It costs a product with inputs or a Gram matrix
token error   the same for each token, then the mean over tokens

L: languages. T: tokens. O: output channels. I: input channels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from forecast_forms import FORMS, Trial, by_sparsity, is_wanda, mean_rho, ordered_rightly, rho
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mlprune.evaluation.items import metrics_of
from mlprune.evaluation.loss import loss_metrics
from mlprune.models.hollow import decoder_layers, layer_count
from mlprune.models.matrices import matrices
from mlprune.pruning.energy import dropped_energy
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.loading import parse_spec
from mlprune.spec.variants import Variant
from mlprune.storage.files import write_whole
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import open_local

SPARSITIES = (0.3, 0.5, 0.7)
TEXTS = ("mono:en", "mono:fr", "translation:en-de", "translation:en-sw")
CONTRASTIVE = "contrastive:translation:en-de/mono:en"
TOKENS = 64  # of each language, on which errors are measured


def variants_of(seed: int) -> list[Variant]:
    """Return the trials of a seed. Magnitude reads no text: it is among those of the first seed only."""
    plain = "unstructured"
    trials = [parse_variant(text, "wanda", ratio, plain, "dense") for ratio in SPARSITIES for text in TEXTS]
    trials += [parse_variant("mono:en", "ria", ratio, plain, "dense") for ratio in SPARSITIES]
    if seed == 0:
        trials += [parse_variant(None, "magnitude", ratio, plain, "dense") for ratio in SPARSITIES]
    trials += [parse_variant(None, CONTRASTIVE, 0.5, plain, "dense")]
    trials += [parse_variant(text, "wanda", 0.5, plain, "sequential") for text in TEXTS]
    trials += [parse_variant(text, "wanda", 0.5, "2:4", "dense") for text in TEXTS[::2]]
    trials += [parse_variant(text, "wanda", 0.5, plain, "dense", "owl") for text in TEXTS[::2]]
    trials += [parse_variant("mono:en", "sparsegpt", 0.5, plain, "sequential")]
    return [_with_seed(variant, seed) for variant in trials]


def _with_seed(variant: Variant, seed: int) -> Variant:
    values = variant.to_dict()
    values["seed"] = seed
    return parse_variant(**values)


class Measures:
    """Computes the measures of masks, from dense weights, moments and inputs of the dense model."""

    def __init__(self, prepared: Prepared) -> None:
        model = AutoModelForCausalLM.from_pretrained(prepared.source.folder, dtype=torch.float32).eval()
        prefix, layers = decoder_layers(model, layer_count(model.config))
        self._languages = [language for language, _ in prepared.forecasts]
        self._dense: dict[str, Tensor] = {}
        self._square_LI: dict[str, Tensor] = {}  # mean squares of input channels
        for index, layer in enumerate(layers):
            moments = [prepared.moment_store().load(key, index) or {} for _, key in prepared.forecasts]
            for matrix in matrices(layer):
                name = f"{prefix}.{index}.{matrix}.weight"
                self._dense[name] = model.get_parameter(name).data
                means = [by_name[matrix].sumsq_I / by_name[matrix].tokens for by_name in moments]
                self._square_LI[name] = torch.stack(means)
        self._inputs = [self._inputs_of(model, prepared, language) for language in self._languages]
        self._outputs = [  # sums of squares, each [T]
            {name: (weight_OI @ inputs[name].T).square().sum(0) for name, weight_OI in self._dense.items()}
            for inputs in self._inputs
        ]

    @torch.inference_mode()
    def _inputs_of(self, model: PreTrainedModel, prepared: Prepared, language: str) -> dict[str, Tensor]:
        """Return inputs of every matrix, [T, I], at tokens evenly spaced in the language's text."""
        calibration = prepared.set_of(f"mono:{language}")
        chosen = np.linspace(0, calibration.tokens - 1, TOKENS).astype(int)
        parts: dict[str, list[Tensor]] = {name: [] for name in self._dense}
        passed, rows = 0, torch.empty(0)

        def keep(name: str, inputs: Tensor) -> None:
            parts[name].append(inputs.flatten(0, 1)[rows])

        handles = [
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda _, inputs, name=name: keep(name, inputs[0])
            )
            for name in self._dense
        ]
        for batch in calibration.batches:
            real = batch.attention_mask.flatten().nonzero()[:, 0]
            rows = real[chosen[(chosen >= passed) & (chosen < passed + len(real))] - passed]
            passed += len(real)
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(part) for name, part in parts.items()}

    @torch.inference_mode()
    def of(self, masked: Mapping[str, Tensor]) -> dict[str, dict[str, list[float]]]:
        """Return the measures of a masked model: measure -> language -> a value per matrix."""
        result: dict[str, dict[str, list[float]]] = {}
        for name, weight_OI in self._dense.items():
            for number, language in enumerate(self._languages):
                change_OI = masked[name] - weight_OI
                error_T = (change_OI @ self._inputs[number][name].T).square().sum(0)
                output_T = self._outputs[number][name]
                errors = {"error": error_T.sum() / output_T.sum(), "token error": (error_T / output_T).mean()}
                for measure, value in errors.items():
                    result.setdefault(measure, {}).setdefault(language, []).append(float(value))
            shares = self._shares(weight_OI, masked[name] != 0, self._square_LI[name])
            for measure, values_L in shares.items():
                for language, value in zip(self._languages, values_L.tolist(), strict=True):
                    result.setdefault(measure, {}).setdefault(language, []).append(value)
        return result

    @staticmethod
    def _shares(weight_OI: Tensor, keep_OI: Tensor, square_LI: Tensor) -> dict[str, Tensor]:
        """Return the measures that need weights and mean squares alone, each [L]."""
        squares_OI, weights_IL = weight_OI.square(), square_LI.T.float()
        total_OL, dropped_OL = squares_OI @ weights_IL, (squares_OI * ~keep_OI) @ weights_IL
        return {
            "share": dropped_energy(weight_OI, keep_OI, square_LI),
            "energy": total_OL.sum(0),
            "row": (dropped_OL / total_OL).mean(0),
            "amplitude": dropped_energy(weight_OI.abs().sqrt(), keep_OI, square_LI.sqrt()),
            "damped": dropped_energy(weight_OI, keep_OI, square_LI.sqrt()),
        }

    @property
    def names(self) -> list[str]:
        return list(self._dense)


def run_trial(
    prepared: Prepared, pipeline: Pipeline, measures: Measures, variant: Variant, dense: Mapping[str, float]
) -> Trial:
    """Make the variant's masks, measure them, and evaluate them."""
    outcome = make_masks(prepared, pipeline, variant, forecast=True)
    masked = {name: data for piece in pipeline.weights(variant.key) for name, data in piece.items()}
    metrics = metrics_of(prepared.suite.run(pipeline, variant.key))
    pipeline.release(variant.key)
    seen = measures.of(masked)
    for language, forecast in outcome.forecast.items():
        assert np.isclose(forecast, np.mean(seen["share"][language])), "both forms of the forecast agree"
    loss = {code: loss_metrics(metrics, dense)[f"loss.{code}"] for code in outcome.forecast}
    return Trial(prepared.spec.calibration.seed, variant.to_dict(), measures.names, loss, seen)


def run_seed(prepared: Prepared, variants: Sequence[Variant], folder: Path) -> list[Trial]:
    """Run the trials of a seed that are not in the folder yet; return all of them."""
    files = {folder / f"{prepared.spec.calibration.seed}-{variant.key}.json": variant for variant in variants}
    if not all(file.exists() for file in files):
        with open_local(prepared) as pipeline:
            gather_moments(prepared, pipeline, variants)
            measures = Measures(prepared)
            dense = metrics_of(prepared.suite.run(pipeline))
            for file, variant in files.items():
                if not file.exists():
                    trial = run_trial(prepared, pipeline, measures, variant, dense)
                    write_whole(file, json.dumps(asdict(trial)).encode())
    return [Trial(**json.loads(file.read_bytes())) for file in files]


def report(trials: Sequence[Trial]) -> None:
    """Print the tables; columns are separated by two spaces or more."""
    wanda = [trial for trial in trials if is_wanda(trial)]
    click.echo(f"trials  {len(trials)}, of which Wanda {len(wanda)}")
    for name, chosen in {"all": trials, "Wanda": wanda}.items():
        for sparsity, group in by_sparsity(chosen).items():
            figures = [f"{code} {rho(FORMS['plain'], group, code):.2f}" for code in group[0].loss]
            click.echo(f"{name} at {sparsity}, {len(group)} trials  {', '.join(figures)}")
    sequential = [trial for trial in trials if is_wanda(trial, "sequential")]
    for name, form in FORMS.items():
        means = {"all": trials, "Wanda": wanda, "sequential": sequential}
        figures = [f"{group} {mean_rho(form, chosen):.2f}" for group, chosen in means.items()]
        figures += [f"{kind} {share:.0%}" for kind, share in ordered_rightly(form, trials).items()]
        click.echo(f"{name:18}  {', '.join(figures)}")


@click.command()
@click.option("--model", default="demo", help="A model folder, a Hugging Face model id, or demo (the default).")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="A folder for finished trials.")
@click.option("--languages", default="en,fr,de,es,sw", help="Languages that are forecast and measured.")
@click.option("--seeds", default=3)
@click.option("--samples", default=8, help="Prompts of each calibration set.")
@click.option("--tokens", default=256, help="Tokens of a prompt, at most.")
@click.option("--lines", default=8, help="Held-out lines of each language.")
def main(model: str, work: Path, languages: str, seeds: int, samples: int, tokens: int, lines: int) -> None:
    """Run all trials that are missing, and print the tables."""
    trials = []
    for seed in range(seeds):
        values = {
            "model": {"path": model, "dtype": "float32"},
            "pipeline": {"shards": 1},
            "calibration": {"samples": samples, "shots": 4, "max_tokens": tokens, "seed": seed},
            "search": {"score": ["magnitude"], "sparsity": [0.5]},  # the trials are those of variants_of
            "evaluation": {"perplexity": {"languages": languages.split(","), "lines": lines}},
            "storage": str(work / "store"),
        }
        variants = variants_of(seed)
        trials += run_seed(prepare(parse_spec(values), variants), variants, work)
    report(trials)


if __name__ == "__main__":
    main()
