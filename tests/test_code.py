"""Program code: the same files from every form, in an order that nothing but their names decides."""

import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mlprune.data import code as code_module
from mlprune.data.calibration import CODE_CHARACTERS, CalibrationSet, build_calibration_set
from mlprune.data.code import CodeFiles, open_code
from mlprune.errors import CorpusError
from mlprune.spec.calibrations import Demonstration
from tests.tiny import tokenizer

CODE = Demonstration("code", ())
# paths in sorted order; braces and all else must survive; the blank ones say nothing
TEXTS = {
    "a/__init__.py": "",
    "a/b.py": "x = {'text': '{language}'}\n",
    "a/deep/er/c.py": "naïve = 'é'  # \u2028\r\n",
    "a/deep/z.py": " \n\t\n",
    "b.py": "import a\n" * 40,
}
SAID = {name: text for name, text in TEXTS.items() if text.strip()}


@cache
def library() -> CodeFiles:
    return open_code("stdlib")


def calibrated(files: CodeFiles | None = None, samples: int = 6, **more: Any) -> CalibrationSet:
    settings = {"shots": 4, "max_tokens": 64, "seed": 0} | more
    return build_calibration_set(None, CODE, tokenizer(), samples=samples, code=files or library(), **settings)


# What is opened


def write_folder(folder: Path) -> tuple[str, list[str]]:
    for name, text in [*TEXTS.items(), ("a/notes.txt", "no code"), ("a/b.pyc", "no code")]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return str(folder), list(SAID)


def write_jsonl(folder: Path) -> tuple[str, list[str]]:
    path = folder.with_suffix(".jsonl")
    rows = (json.dumps({"text": "not this", "code": text}) for text in TEXTS.values())
    path.write_text("\n".join(rows) + "\n")
    return str(path), numbers()


def write_dataset(folder: Path) -> tuple[str, list[str]]:
    import datasets

    columns = {"whole_func_string": list(TEXTS.values()), "path": list(TEXTS)}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return str(folder), numbers()


def numbers() -> list[str]:
    return [str(number) for number, text in enumerate(TEXTS.values(), 1) if text.strip()]


@pytest.mark.parametrize("write", [write_folder, write_jsonl, write_dataset])
def test_every_form_gives_the_same_texts_verbatim(
    write: Callable[[Path], tuple[str, list[str]]], tmp_path: Path
) -> None:
    where, sources = write(tmp_path / "code")
    assert open_code(where) == CodeFiles(where, tuple(zip(sources, SAID.values(), strict=True)))


def test_the_order_of_the_file_system_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, sources = write_folder(tmp_path / "code")
    usual, walk = open_code(where), os.walk

    def another_way(root: Path, **more: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, folders, files in walk(root, **more):
            folders.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
            yield folder, folders, files[::-1]

    assert sources == sorted(sources)
    for order in (another_way, lambda root, **more: reversed(list(walk(root, **more)))):
        monkeypatch.setattr(os, "walk", order)
        assert open_code(where) == usual


def test_links_are_not_followed(tmp_path: Path) -> None:
    where, _ = write_folder(tmp_path / "code")
    usual = open_code(where)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c.py").write_text("secret = 1\n")
    (tmp_path / "code" / "out").symlink_to(tmp_path / "out")
    (tmp_path / "code" / "a" / "c.py").symlink_to(tmp_path / "out" / "c.py")
    (tmp_path / "code" / "a" / "again").symlink_to(tmp_path / "code")
    assert open_code(where) == usual


def test_the_standard_library_is_ordinary_code_of_the_python_that_runs() -> None:
    names = [name for name, _ in library().files]
    assert library().name == f"stdlib {platform.python_version()}"
    assert {"json/decoder.py", "asyncio/events.py", "argparse.py"} < set(names)
    assert names == sorted(set(names))
    assert len(names) > 150  # enough for the paper's 100 prompts
    without = {"test", "tests", "site-packages", "encodings", "idlelib", "lib2to3", "turtledemo"}
    assert not [name for name in names if without & set(name.split("/")) or name.startswith("_sysconfigdata")]
    root = Path(sysconfig.get_path("stdlib"))
    for name, text in library().files:
        assert (root / name).read_bytes() == text.encode()
        assert len(text.encode()) >= 2048


def test_what_a_build_or_a_distribution_adds_to_the_library_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["json/decoder.py", "test/a.py", "json/tests/a.py", "site-packages/a.py", "_sysconfigdata__linux_.py"]
    names += ["config-3.11-x86/python-config.py", "latin.py", "short.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x = 1\n" * 400)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 800)
    (tmp_path / "short.py").write_bytes(b"x" * 2047)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert [name for name, _ in open_code("stdlib").files] == ["json/decoder.py"]


def mock_hub(monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[Any]]) -> list[Any]:
    """Every dataset of the hub has these columns; the list records what was requested."""
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split))
        assert streaming, "else all of it is downloaded"
        return datasets.Dataset.from_dict(columns).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("column", ["content", "code", "text", "whole_func_string"])
def test_a_hub_dataset_is_streamed(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = mock_hub(monkeypatch, {"size": [7, 8, 9], column: ["x = 1", None, "y = 2"]})
    for where in ("org/name", "org/name:python@validation"):
        assert open_code(where).files == (("1", "x = 1"), ("3", "y = 2"))
    assert asked == [("org/name", None, "train"), ("org/name", "python", "validation")]


def test_of_the_columns_the_first_in_our_order_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["whole_func_string", "text", "code", "content"]
    for count in range(len(names), 0, -1):
        mock_hub(monkeypatch, {name: [f"{name} = 1"] for name in names[:count]})
        assert open_code("org/name").files == (("1", f"{names[count - 1]} = 1"),)


def test_of_millions_of_rows_only_the_first_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def endless() -> Iterator[dict[str, str]]:
        number = 0
        while True:
            assert number < 10, "read on"
            yield {"code": f"x = {number}"}
            number += 1

    streamed = datasets.IterableDataset.from_generator(endless)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    monkeypatch.setattr(code_module, "DATASET_ROWS", 3)
    expected = (("1", "x = 0"), ("2", "x = 1"), ("3", "x = 2"))
    assert open_code("org/name").files == expected
    datasets.Dataset.from_list([{"code": f"x = {number}"} for number in range(5)]).save_to_disk(str(tmp_path))
    assert open_code(str(tmp_path)).files == expected


BROKEN = {
    "latin/a.py": (b"# \xe9\n", "a.py is not UTF-8 at byte 2; convert it"),
    "list.jsonl": (b'["x"]\n', 'line 1 is not an object; write {"content": "..."}'),
    "cut.jsonl": (b'{"code": "x"}\n{"code"\n', "line 2 is not JSON"),
    "column.jsonl": (
        b'{"body": "x", "n": 1}\n',
        "has no column content, code, text, whole_func_string; it has body",
    ),
    "number.jsonl": (b'{"code": "x"}\n{"code": 3}\n', "line 2 of code is int, not text"),
    "half.jsonl": (b'{"code": "\\ud83d"}\n', "line 1 of code has half a character"),
    "none.jsonl": (b"", "none.jsonl is empty"),
    "file.py": (b"x = 1\n", "not code; give stdlib, a folder of .py files or a .jsonl file"),
}


@pytest.mark.parametrize(("name", "content", "remedy"), [(name, *rest) for name, rest in BROKEN.items()])
def test_broken_code_is_a_one_line_error(name: str, content: bytes, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    where = str(path if path.parent == tmp_path else path.parent)
    with pytest.raises(CorpusError) as caught:
        open_code(where)
    assert str(caught.value).startswith(f"calibration.code: {where!r}: ")
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["/no/such", "./code", "../code", "org/code.jsonl"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(where: str) -> None:
    with pytest.raises(CorpusError, match=r"^search\.against: .*: no such file or folder$"):
        open_code(where, key="search.against")


def test_a_dataset_that_cannot_be_loaded_or_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def breaks() -> Iterator[dict[str, str]]:
        yield {"code": "x"}
        raise ConnectionError("cut\noff")

    streamed = datasets.IterableDataset.from_generator(breaks)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    with pytest.raises(CorpusError) as caught:
        open_code("org/name")
    assert "cannot be loaded as a Hugging Face dataset (" in str(caught.value)
    assert "or give stdlib, a folder of .py files or a .jsonl file" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"code": []}))
    with pytest.raises(CorpusError, match=r"has no column .*; it has no row: "):
        open_code("org/empty")


# What is made of it


def test_a_prompt_is_a_file_from_its_beginning() -> None:
    made = calibrated(samples=40)
    order = list(library().files)
    random.Random(0).shuffle(order)
    for prompt, (source, text) in zip(made.prompts, order, strict=False):
        assert prompt.ids == tuple(tokenizer()(text).input_ids[:64])  # as of the whole text
        assert prompt.manifest() == {
            "corpus": library().name,
            "kind": "code",
            "source": source,
            "sha256": hashlib.sha256((Path(sysconfig.get_path("stdlib")) / source).read_bytes()).hexdigest(),
            "tokens": 64,
        }
    assert len({prompt.source for prompt in made.prompts}) == 40


def test_only_the_beginning_of_a_long_file_is_tokenised() -> None:
    watched = Mock(wraps=tokenizer(), pad_token_id=2, eos_token_id=1)
    long = CodeFiles("long", (("1", "x = 1\n" * 100_000), ("2", "y")))
    made = build_calibration_set(None, CODE, watched, samples=2, shots=1, max_tokens=9, seed=0, code=long)
    assert sorted(len(call.args[0]) for call in watched.call_args_list) == [1, 9 * CODE_CHARACTERS]
    assert sorted(len(prompt.ids) for prompt in made.prompts) == [1, 9]


def test_shots_and_template_do_not_apply_and_the_seed_does() -> None:
    made = calibrated()
    assert made.key == calibrated(shots=1, template="{text}", separator="\n").key
    assert made.key != calibrated(seed=1).key
    assert [p.source for p in calibrated(samples=9).prompts[:6]] == [p.source for p in made.prompts]


def test_too_few_files_say_how_many_there_are(tmp_path: Path) -> None:
    where, _ = write_folder(tmp_path / "code")
    files = open_code(where)
    assert len(calibrated(files, samples=3).prompts) == 3
    with pytest.raises(CorpusError) as caught:
        calibrated(files, samples=4)
    assert str(caught.value) == (
        f"calibration.samples: 4: the code {where!r} has 3 files that are not blank; use a smaller number"
    )


def test_the_same_files_in_a_process_with_another_hash_seed() -> None:
    code = "from mlprune.data.demonstrations import *; from mlprune.data.code import *; import sys; "
    code += "print(*(source for source, _ in sample_files(open_code('stdlib'), 100, 0))); "
    code += "assert 'datasets' not in sys.modules"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        assert done.stdout.split() == [prompt.source for prompt in calibrated(samples=100).prompts]
