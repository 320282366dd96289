"""Promise 5: a mistake is answered in one line (key, value, remedy), exit code 2, before a weight is loaded."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest
import ray
import torch
from click.testing import CliRunner, Result
from transformers import Gemma3nTextConfig, PretrainedConfig, T5Config

from mlprune.cli import main
from mlprune.errors import UserError
from mlprune.models import hollow, replay
from tests import tiny_models

SPEC = """
name: tiny
model: {path: "PLACE/model"}
pipeline: {shards: 1}
calibration: {samples: 4, shots: 2, max_tokens: 64}
search: {calibration: ["mono:en"], score: [wanda], sparsity: [0.5], propagation: [dense]}
evaluation: {perplexity: {languages: [en, fr], lines: 2}}
"""
# PLACE is the test's own folder, wherever it is written below
OUTPUT = ("--output", "PLACE/out")
BARE_PRUNE = ("prune", "PLACE/model", "--spec", "PLACE/tiny.yaml", *OUTPUT)
LANGUAGES, LINES = "evaluation.perplexity.languages", "evaluation.perplexity.lines"
CONFIRMATION = "evaluation.perplexity.confirmation_lines"
COMMANDS = {
    "sweep": ("sweep", "PLACE/tiny.yaml"),
    "dry run": ("sweep", "PLACE/tiny.yaml", "--dry-run"),
    "prune": (*BARE_PRUNE, "--calibration", "translation:en-fr", "--sparsity", "0.5"),
    "bare prune": BARE_PRUNE,
    "evaluate": ("evaluate", "PLACE/model", "--spec", "PLACE/tiny.yaml"),
    "mlprune": (),
}
CORPUS = "calibration.corpus"
SWEEP = ("sweep",)
SWEEPS = ("sweep", "dry run")
ALL = (*SWEEPS, "prune", "evaluate")


def tiny(folder: Path) -> None:
    shutil.copytree(tiny_models.source().folder, folder)


def changed(**changes: int) -> Callable[[Path], object]:
    return lambda folder: tiny_models.save(tiny_models.config("llama", **changes), folder)


def only(config: PretrainedConfig, weights: str = "model.safetensors") -> Callable[[Path], object]:
    """A model's folder whose weights file holds no tensor, or is not there."""

    def make(folder: Path) -> None:
        tiny(folder)
        (folder / "model.safetensors").unlink()
        config.save_pretrained(folder)
        if weights:
            (folder / weights).write_bytes((2).to_bytes(8, "little") + b"{}")

    return make


def truncated(folder: Path) -> None:
    tiny(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def unequal(folder: Path) -> None:
    folder.mkdir()
    for code, count in (("en", 40), ("fr", 39)):
        (folder / f"{code}.txt").write_text("".join(f"{code} {n}\n" for n in range(count)))


def questions(folder: Path) -> None:
    folder.mkdir()
    rows = [{"premise": "A", "hypothesis": "B", "label": n} for n in range(2)]
    (folder / "en.jsonl").write_text("\n".join(map(json.dumps, rows)))


def code(folder: Path) -> None:
    folder.mkdir()
    (folder / "one.py").write_text("print(1)\n" * 1000)


MADE: dict[str, Callable[[Path], object]] = {
    "tiny.yaml": lambda path: path.write_text(SPEC.replace("PLACE", str(path.parent))),
    "model": tiny,
    "odd": changed(intermediate_size=46),
    "empty": only(tiny_models.config("llama"), weights=""),
    "pickled": only(tiny_models.config("llama"), weights="pytorch_model.bin"),
    "truncated": truncated,
    "t5": only(T5Config(d_model=16, num_layers=2)),
    "bert": only(tiny_models.config("bert")),
    "sharing": only(Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2)),
    "wordy": changed(vocab_size=300),
    "unequal": unequal,
    "questions": questions,
    "code": code,
    "taken": Path.mkdir,
    "file.txt": lambda path: path.write_text("This is no database and no folder.\n" * 100),
    "broken.yaml": lambda path: path.write_text("search: [1"),
    "list.yaml": lambda path: path.write_text("- 1\n"),
}


@dataclass(frozen=True)
class Mistake:
    """What is added to a command, and what the answer must say: how it begins, and fragments of the rest."""

    name: str
    commands: tuple[str, ...]
    added: tuple[str, ...]
    start: str  # key and value
    remedy: tuple[str, ...]


def setting(name: str, commands: tuple[str, ...], given: str | Sequence[str], start: str, *remedy: str) -> Mistake:
    assignments = [given] if isinstance(given, str) else given
    words = tuple(word for assignment in assignments for word in ("--set", assignment))
    return Mistake(name, commands, words, start, remedy)


def option(name: str, command: str, added: tuple[str, ...], start: str, *remedy: str) -> Mistake:
    return Mistake(name, (command,), added, start, remedy)


HAS = ("has no it", "en, es, fr")
ODD = ("--set", "model.path=PLACE/odd")
WIDTH = ("46 inputs", "mlp.down_proj", "divisible by 4")
RANGE = "sparsity must be in [0, 1)"
PRUNES, SCORED = (*SWEEPS, "prune"), (*SWEEPS, "evaluate")
BOTH_SIDES = "both sides"
CODE = ("search.calibration=[code]",)
CLAIM = "claims=[{claim: French is spared, better: 'mono:fr', than: 'mono:en', metric: loss.fr}]"
TASK = ("evaluation.tasks=[sample_xwinograd_fr]",)
PRETRAINING = ["search.calibration=['pretraining:mono:en,mono:fr']"]
OPTUNA = ("search.searcher=optuna", "search.samples=2")


def combined(calibration: str) -> str:
    return f'search.calibration=["{calibration}"]'


XNLI, SHOTS = "evaluation.xnli", "evaluation.translation.shots: 40: "


def mixture(searcher: str, **given: object) -> list[str]:
    section = {"searcher": searcher, "parts": "['mono:en', 'mono:fr']", **given}
    return [f"search.mixture={{{', '.join(f'{key}: {value}' for key, value in section.items())}}}"]


def xnli(**given: object) -> list[str]:
    section = {"languages": "[en]", "data": "PLACE/questions", **given}
    return [f"{XNLI}.{key}={value}" for key, value in section.items()]


def reviews(data: str) -> list[str]:
    return ["evaluation.reviews.languages=[en]", f"evaluation.reviews.data={data}"]


def translation(pair: str) -> list[str]:
    return [f"evaluation.translation.pairs=[{pair}]"]


MISTAKES = [
    setting("key", ALL, "serch=1", "serch: 1: ", "unknown key", "did you mean search?"),
    setting("nested key", ALL, "calibration.shotz=1", "calibration.shotz: 1: ", "did you mean shots?"),
    setting("strange key", ALL, "model.zzz=1", "model.zzz: 1: ", "known here: path"),
    setting("no equals sign", ALL, "model.path", "--set: 'model.path': ", "write key=value"),
    setting("no key", ALL, "=1", "--set: '=1': ", "write key=value"),
    setting("value no YAML", ALL, "name=[1", "name: '[1': ", "not YAML"),
    setting("language", ALL, f"{LANGUAGES}=[en,qq]", f"{LANGUAGES}[1]: 'qq': "),
    setting("calibration language", ALL, "search.calibration=['mono:qq']", "search.calibration[0]: 'qq': ", "ISO"),
    setting("calibration kind", ALL, "search.calibration=['di:en']", "search.calibration[0]: 'di:en': ", "mono"),
    setting("no Italian", SWEEPS, "search.calibration=['mono:it']", "calibration.corpus: 'sample': ", *HAS),
    setting("none to score", SCORED, f"{LANGUAGES}=[it]", "calibration.corpus", *HAS),
    setting("negative", ALL, "search.sparsity=[0.5,-0.1]", "search.sparsity[1]: -0.1: ", RANGE),
    setting("all of it", ALL, "search.sparsity=[1]", "search.sparsity[0]: 1: ", RANGE),
    setting("more than all", ALL, "search.sparsity=[1.5]", "search.sparsity[0]: 1.5: ", RANGE),
    setting("score", PRUNES, "search.score=[wonda]", "search.score[0]: 'wonda': ", "magnitude, wanda"),
    setting("n:m", ALL, "search.pattern=['4:2']", "search.pattern[0]: '4:2': ", "such as 2:4"),
    setting(
        "rule of channels",
        SWEEPS,
        ["search.pattern=[channels]", "search.score=[ria]"],
        "search.score[0]: 'ria': ",
        "channels and heads are ranked by random, magnitude, wanda",
    ),
    setting(
        "no channels", SWEEPS, "search.pattern=[channels/99999]", "search.pattern: 'channels/99999': ", "channels"
    ),
    setting("no calibration", SWEEPS, "search.calibration=[]", "search.calibration: []: ", "wanda needs"),
    setting(
        "claim", SWEEPS, CLAIM, "claims[0].better: 'wanda 0.5 mono:fr': ", "no such trial", "French is spared"
    ),
    setting("no confirmation", SWEEPS, [CLAIM, f"{CONFIRMATION}=0"], f"{CONFIRMATION}: 0: ", "claims need"),
    setting("no folder", ALL, "model.path=PLACE/none", "model.path: PLACE/none: ", "no such folder"),
    setting("no weights", ALL, "model.path=PLACE/empty", "model.path: PLACE/empty: ", "no weights", "safetensors"),
    setting("pickle", ALL, "model.path=PLACE/pickled", "model.path: PLACE/pickled: ", "model.allow_pickle=true"),
    setting("half a file", ALL, "model.path=PLACE/truncated", "model.path: "),
    setting("t5", ALL, "model.path=PLACE/t5", "model.path: PLACE/t5: ", "not a causal language model"),
    setting("bert", ALL, "model.path=PLACE/bert", "model.path: 'PLACE/bert' (bert): ", "supported: bloom"),
    setting("shared state", ALL, "model.path=PLACE/sharing", "model.path: ", "share state (num_kv_sh"),
    setting("tokens without rows", ALL, "model.path=PLACE/wordy", "model.path: "),
    setting("dtype", ALL, "model.dtype=int8", "model.dtype: 'int8': ", "'bfloat16'"),
    setting("samples", PRUNES, "calibration.samples=4000", "calibration.samples: 4000: ", "883 lines", "441"),
    setting("lines", SCORED, f"{LINES}=999", f"{LINES}: 999: ", "has 168 for selection", "all 317 held-out lines"),
    setting(
        "confirmation", SCORED, f"{CONFIRMATION}=999", f"{CONFIRMATION}: 999: ", "149 for confirmation", "or 0"
    ),
    setting(
        "objective",
        SWEEPS,
        "search.objective=xnli.fr",
        "search.objective: 'xnli.fr': ",
        "loss.en",
        "perplexity.fr",
    ),
    setting("language's loss", SWEEPS, "search.objective=loss.de", "search.objective: 'loss.de': ", "loss.fr"),
    setting("no variant", ALL, "search.screen=0", "search.screen: 0: ", "greater than or equal to 1"),
    setting("screen", ALL, [*OPTUNA, "search.screen=2"], "search.screen: 2: ", "write searcher: random"),
    setting("race", ALL, [*OPTUNA, "search.racing=true"], "search.racing: True: ", "write searcher: random"),
    setting(
        "answers",
        ALL,
        ["search.racing=true", "search.objective=xnli.fr"],
        "search.objective: 'xnli.fr': ",
        "loss.fr",
    ),
    setting("short race", SWEEPS, [f"{LINES}=15", "search.racing=true"], f"{LINES}: 15: ", "at least 16"),
    setting(
        "one part", ALL, mixture("optuna", parts="['mono:en']"), "search.mixture.parts: ['mono:en']: ", "two or"
    ),
    setting(
        "part twice", ALL, mixture("optuna", parts="['mono:en', 'mono:en']"), "search.mixture.parts[1]: ", "once"
    ),
    setting(
        "Italian part", SWEEPS, mixture("optuna", parts="['mono:en', 'mono:it']"), f"{CORPUS}: 'sample': ", *HAS
    ),
    setting("few trials", ALL, mixture("optuna", trials=2), "search.mixture.evaluate: 3: ", "than the 2 trials"),
    setting("eta", ALL, mixture("minimax", eta=0), "search.mixture.eta: 0: ", "greater than 0"),
    setting("key of minimax", ALL, mixture("optuna", eta=6), "search.mixture.eta: 6: ", "unknown key", "evaluate"),
    setting(
        "key of optuna", ALL, mixture("minimax", trials=6), "search.mixture.trials: 6: ", "unknown key", "eta"
    ),
    setting("no searcher", ALL, mixture("grid"), "search.mixture.searcher: 'grid': ", "optuna or minimax"),
    setting(
        "no loss", ALL, mixture("minimax", parts="['mono:en', 'mono:de']"), "search.mixture.parts[1]: ", "add it"
    ),
    setting("no reader", SWEEPS, [*mixture("optuna"), "search.score=[magnitude]"], "search.score: [magnitude]: "),
    setting("no shares", ALL, PRETRAINING, "search.pretraining: ", "needs each language's share", "{en: 0.9"),
    setting(
        "no share", ALL, [*PRETRAINING, "search.pretraining={en: 1}"], "search.calibration[0]: ", "no share of fr"
    ),
    setting("share", ALL, "search.pretraining={en: 0}", "search.pretraining.en: 0: ", "greater than 0"),
    setting("seeds", ALL, [*OPTUNA, "search.seed=[0,1]"], "search.seed: [0, 1]: ", "write one"),
    setting("no seed", ALL, "search.seed=[]", "search.seed: []: "),
    setting("positions", PRUNES, "calibration.max_tokens=513", "calibration.max_tokens: 513: ", "takes 512"),
    setting("shards", ALL, "pipeline.shards=5", "pipeline.shards: 5: ", "has 4 layers", "1 to 4"),
    setting("storage no folder", SWEEPS, "storage=PLACE/file.txt", "storage: "),
    setting("scheme", SWEEP, "tracking.uri=nonsense://x", "tracking.uri: 'nonsense://x': "),
    setting("text", SWEEP, "tracking.uri=sqlite:///PLACE/file.txt", "tracking.uri: 'sqlite:///PLACE/file.txt': "),
    setting("no place", SWEEP, "tracking.uri=sqlite:///PLACE/file.txt/x/y.db", "tracking.uri: 'sqlite:///"),
    Mistake("2:4 of 46", SWEEPS, (*ODD, "--set", "search.pattern=['2:4']"), "search.pattern: '2:4': ", WIDTH),
    option("--pattern 2:4 of 46", "prune", (*ODD, "--pattern", "2:4"), "", "pattern: '2:4': ", *WIDTH),
    Mistake("unequal", ALL, ("--corpus", "PLACE/unequal"), f"{CORPUS}: 'PLACE/unequal': ", ("has 40", "has 39")),
    Mistake("no corpus", ALL, ("--corpus", "PLACE/none.tsv"), f"{CORPUS}: 'PLACE/none.tsv': ", ("no such file",)),
    Mistake("place of JSON", ALL, ("--json", "PLACE/none/x.json"), "--json: ", ()),
    *(
        option(f"--sparsity {value}", "prune", ("--sparsity", value), "", f"sparsity[0]: {float(value)}: ", RANGE)
        for value in ("-0.1", "1", "1.5")
    ),
    option("--score", "prune", ("--score", "wonda"), "--score: 'wonda': ", "random, magnitude, wanda"),
    option("--calibration", "prune", ("--calibration", "mono:qq"), "--calibration: 'qq': ", "ISO 639"),
    option("--calibration it", "prune", ("--calibration", "mono:it"), "calibration.corpus: 'sample': ", *HAS),
    option("--pattern", "prune", ("--pattern", "2-4"), "--pattern: '2-4': ", "such as 2:4"),
    option("--propagation", "prune", ("--propagation", "x"), "", "propagation", "'x'", "'sequential' or 'dense'"),
    option("contradiction", "prune", ("--pattern", "1:4"), "--sparsity: 0.5: ", "pattern 1:4 drops 0.75"),
    option("no --calibration", "bare prune", ("--sparsity", "0.5"), "--calibration: ", "wanda needs it"),
    option("no --sparsity", "bare prune", ("--score", "random"), "--sparsity: ", "--sparsity 0.5"),
    option("taken output", "prune", ("--output", "PLACE/taken"), "--output: 'PLACE/taken': ", "exists already"),
    option("output in a file", "prune", ("--output", "PLACE/file.txt/out"), "--output: 'PLACE/file.txt/out': "),
    option(
        "--run and --score", "mlprune", ("prune", "--run", "a", "--score", "wanda", *OUTPUT), "--score: 'wanda': "
    ),
    option("--run and --spec", "bare prune", ("--run", "a"), "--spec: 'PLACE/tiny.yaml': ", "--run"),
    option("--run", "mlprune", ("prune", "--run", "abc", *OUTPUT), "--run: 'abc': ", "no such run", "tracking"),
    option("--languages", "evaluate", ("--languages", "en,qq"), f"{LANGUAGES}[1]: 'qq': ", "ISO"),
    option("no spec", "mlprune", ("sweep", "PLACE/none.yaml"), "spec: 'PLACE/none.yaml': ", "known: allocations"),
    option("long spec", "mlprune", ("sweep", "x" * 300), "spec: 'xxx", "no such file"),
    option("no YAML", "mlprune", ("sweep", "PLACE/broken.yaml"), "spec: 'PLACE/broken.yaml': ", "not YAML: "),
    option("spec a list", "mlprune", ("sweep", "PLACE/list.yaml"), "spec: 'PLACE/list.yaml': ", "mapping"),
    option("--spec", "mlprune", ("evaluate", "PLACE/model", "--spec", "nil"), "spec: 'nil': ", "quickstart"),
    setting(
        "one side", ALL, "search.score=[{contrastive: {keep: 'mono:fr'}}]", "search.score[0]: {'contr", BOTH_SIDES
    ),
    setting("no side", PRUNES, "search.score=[contrastive]", "search.score[0]: 'contrastive': ", BOTH_SIDES),
    option("--score with one side", "prune", ("--score", "contrastive:code"), "--score: 'contrast", BOTH_SIDES),
    setting(
        "rank of products",
        PRUNES,
        ["search.score=[sparsegpt]", 'search.calibration=["rank:mono:en,mono:fr"]'],
        "search.calibration: 'rank:mono:en,mono:fr': ",
        "write mix",
    ),
    setting(
        "rank of a contrast",
        PRUNES,
        'search.score=["contrastive:rank:mono:en,mono:fr/code"]',
        "search.score: 'contrastive:rank",
        "write max",
    ),
    setting("power 0", PRUNES, combined("power=0:mono:en,mono:fr"), "search.calibration[0]: 'power=0'", "than 0"),
    setting("twice", PRUNES, combined("rank:mono:en,mono:en"), "search.calibration[0]: 'rank:", "each part once"),
    setting("language", PRUNES, combined("max:mono:en,mono:uk"), "calibration.corpus: ", "uk"),
    option(
        "--allocation",
        "prune",
        ("--allocation", "owls"),
        "",
        "allocation",
        "'owls'",
        "'owl', 'alpha', ",
    ),
    setting(
        "agreement of one language",
        ALL,
        ["search.allocation=[uniform,disagreement]", f"{LANGUAGES}=[fr]"],
        "search.allocation: 'disagreement': ",
        f"two or more in {LANGUAGES}",
    ),
    setting("slots", PRUNES, 'calibration.template="{language}: "', "calibration.template: '{lang", "{text}"),
    setting("slot", PRUNES, 'calibration.template="{text} {line}"', "calibration.template: '{text}", "{line}"),
    setting(
        "no code", PRUNES, [*CODE, "calibration.code=PLACE/none.jsonl"], "calibration.code: 'PLACE/none", "no su"
    ),
    setting("little code", PRUNES, [*CODE, "calibration.code=PLACE/code"], "calibration.samples: 4: ", "1 "),
    setting("no Swahili", SCORED, xnli(languages="[en,sw]"), f"{XNLI}.data: 'PLACE/questions': ", "sw", "en"),
    setting("items", SCORED, xnli(items=3), f"{XNLI}.items: 3: ", "has 2 in en"),
    setting("no label", SCORED, xnli(template='"{premise}{hypothesis}"'), f"{XNLI}.template: ", "{label}"),
    setting("two labels", SCORED, xnli(labels="[a,b]"), f"{XNLI}.labels", "3"),
    setting("shuffle", SCORED, xnli(shuffle_seed=-1), f"{XNLI}.shuffle_seed: -1: ", "greater than or equal to 0"),
    setting(
        "no words",
        SCORED,
        [*reviews("x"), "evaluation.reviews.max_words=0"],
        "evaluation.reviews.max_words: 0: ",
        "1",
    ),
    setting(
        "no premise", SCORED, reviews("PLACE/questions"), "evaluation.reviews.data: 'PLACE/questions'", "review"
    ),
    setting("one language", SCORED, translation("fr"), "evaluation.translation.pairs[0]: 'fr': ", "e.g. fr-en"),
    setting("itself", SCORED, translation("fr-fr"), "evaluation.translation.pairs[0]: 'fr-fr': ", "e.g. fr-en"),
    setting("no Italian to read", SCORED, translation("it-en"), "calibration.corpus: 'sample': ", *HAS),
    setting("shots", SCORED, [*translation("fr-en"), "evaluation.translation.shots=40"], SHOTS, "takes 512"),
    setting(
        "task", SCORED, "evaluation.tasks=[sample_xcopa_fr]", "evaluation.tasks[0]: ", "similar names: sample"
    ),
    setting(
        "tasks' place", SCORED, [*TASK, "evaluation.task_path=PLACE/none"], "evaluation.task_path: ", "no such"
    ),
]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("weights are loaded, or Ray is started")

    for module, name in ((hollow, "load_hollow"), (replay, "load_hollow"), (ray, "init")):
        monkeypatch.setattr(module, name, load)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder, and the working directory: what a command leaves behind is seen in it."""
    monkeypatch.setenv("MLPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(place: Path, command: str, added: tuple[str, ...] = ()) -> list[str]:
    """The command's words, once everything that they name has been made."""
    line = [word.replace("PLACE", str(place)) for word in (*COMMANDS[command], *added)]
    for name, make in MADE.items():
        path = place / name
        if not path.exists() and (name in ("model", "tiny.yaml") or any(str(path) in word for word in line)):
            make(path)
    return line


def run(words: list[str], place: Path) -> Result:
    """Run it in this process; it may leave nothing but the storage (and the cache of fingerprints)."""
    before = {path.name for path in place.iterdir()}
    result = CliRunner().invoke(main, words)
    left = {path.name for path in place.iterdir()} - before
    assert left <= {"mlprune-store", "cache"}
    return result


def check_answer(code: int, out: str, err: str, start: str, *remedy: str) -> None:
    assert (code, out, err.count("\n"), err[-1:]) == (2, "", 1, "\n"), err
    assert err.startswith(f"mlprune: {start}")
    assert [fragment for fragment in remedy if fragment not in err] == []


def check(result: Result, start: str, *remedy: str) -> None:
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"not answered; before it: {result.stderr!r}") from result.exception
    check_answer(result.exit_code, result.stdout, result.stderr, start, *remedy)


@pytest.mark.parametrize(
    ("mistake", "command"),
    [pytest.param(made, command, id=f"{made.name}, {command}") for made in MISTAKES for command in made.commands],
)
def test_mistake_is_answered_before_a_weight_is_loaded(mistake: Mistake, command: str, place: Path) -> None:
    result = run(made(place, command, mistake.added), place)
    check(result, *(part.replace("PLACE", str(place)) for part in (mistake.start, *mistake.remedy)))


@pytest.mark.parametrize("free", [0, 64 * 2**20 + 1000])
def test_full_disk_is_answered(free: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = made(place, "prune")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check(run(words, place), f"--output: '{place}/out': ", "free some space")


@pytest.mark.parametrize("command", ALL)
def test_little_memory_is_answered(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = made(place, command)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**10))
    check(
        run(words, place),
        f"model.path: '{place}/model': ",
        "1 KiB free memory",
        "zero/nvme needs",
        "take bfloat16",
    )


@pytest.mark.parametrize("command", ALL)
def test_debug_shows_the_traceback(command: str, place: Path) -> None:
    result = run(made(place, command, ("--set", "serch=1", "--debug")), place)
    assert result.exit_code not in (0, 2)
    assert isinstance(result.exception, UserError)
    assert result.stderr == ""  # Python prints it, as below


# through the console script, as a user does: nothing else may reach either stream there


def said(words: list[str]) -> subprocess.CompletedProcess[str]:
    script = str(Path(sys.executable).with_name("mlprune"))
    return subprocess.run([script, *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("command", "assignment", "start"),
    [
        ("sweep", "serch=1", "serch: 1: unknown key; did you mean search?"),
        ("evaluate", "model.path=PLACE/bert", "model.path: 'PLACE/bert' (bert): unsupported family"),
        ("prune", "calibration.samples=4000", "calibration.samples: 4000: "),
        ("sweep", "tracking.uri=nonsense://x", "tracking.uri: 'nonsense://x': "),
    ],
)
def test_answer_is_all_that_the_script_says(command: str, assignment: str, start: str, place: Path) -> None:
    done = said(made(place, command, ("--set", assignment)))
    check_answer(done.returncode, done.stdout, done.stderr, start.replace("PLACE", str(place)))
    assert not (place / "out").exists()


def test_console_script_shows_a_traceback_with_debug(place: Path) -> None:
    done = said(made(place, "sweep", ("--set", "serch=1", "--debug")))
    assert done.returncode not in (0, 2)
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert "SpecError: serch: 1: unknown key" in done.stderr
