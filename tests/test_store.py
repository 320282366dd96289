"""MomentStore and ResultStore: files are read back exactly, or recognised as damaged or missing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mlprune.errors import StorageError
from mlprune.pruning.moments import Moments
from mlprune.storage.files import Storage
from mlprune.storage.moments import CorruptMomentsError, MomentStore
from mlprune.storage.results import Result, ResultStore
from mlprune.sweep.grid import parse_variant

VARIANT = parse_variant("translation:en-fr", "wanda", 0.5, "unstructured", "dense")


def store(root: Path, fingerprint: str = "model", dtype: str = "torch.float32") -> MomentStore:
    return MomentStore(Storage(str(root)), fingerprint, dtype)


def file_of(root: Path, key: str, layer: int, *model: str) -> Path:
    return root / store(root, *model).name(key, layer)


def moments(seed: int = 0) -> dict[str, Moments]:
    generator = torch.Generator().manual_seed(seed)

    def values(channels: int) -> torch.Tensor:
        return torch.rand(channels, generator=generator, dtype=torch.float64) * 10.0 ** (seed % 7)

    return {"self_attn.q_proj": Moments(2**40 + 1, values(8)), "mlp.experts.down_proj.3": Moments(0, values(3))}


def same(found: dict[str, Moments] | None, expected: dict[str, Moments]) -> bool:
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(found[name].tokens == seen.tokens for name, seen in expected.items())
        and all(found[name].sumsq_I.dtype == torch.float64 for name in expected)
        and all(torch.equal(found[name].sumsq_I, seen.sumsq_I) for name, seen in expected.items())
    )


@pytest.mark.parametrize("layer", [0, 7, 9999, 12345])
@pytest.mark.parametrize("seed", range(3))
def test_moments_are_bit_identical_when_read_back(layer: int, seed: int, tmp_path: Path) -> None:
    store(tmp_path).save("set", layer, moments(seed))
    assert same(store(tmp_path).load("set", layer), moments(seed))
    assert store(tmp_path).has("set", layer)
    assert not store(tmp_path).has("set", layer + 1)
    assert not store(tmp_path).has("other", layer)
    assert store(tmp_path).load("set", layer + 1) is None
    assert store(tmp_path).load("other", layer) is None


def test_extreme_numbers_are_read_back(tmp_path: Path) -> None:
    values = torch.tensor([0.0, 5e-324, 1.7976931348623157e308, 1 / 3], dtype=torch.float64)
    store(tmp_path).save("set", 0, {"a": Moments(1, values)})
    assert same(store(tmp_path).load("set", 0), {"a": Moments(1, values)})


def test_shared_moments_are_stored_for_each_matrix(tmp_path: Path) -> None:
    shared = Moments(5, torch.rand(4, dtype=torch.float64))
    store(tmp_path).save("set", 0, {"q": shared, "k": shared})
    assert same(store(tmp_path).load("set", 0), {"q": shared, "k": shared})


def test_saving_again_replaces(tmp_path: Path) -> None:
    for seed in (0, 1):
        store(tmp_path).save("set", 0, moments(seed))
    assert same(store(tmp_path).load("set", 0), moments(1))
    assert len(list(tmp_path.rglob("*.*"))) == 1


def test_missing_moments_are_none(tmp_path: Path) -> None:
    assert store(tmp_path / "not made yet").load("set", 0) is None
    assert not (tmp_path / "not made yet").exists()


def test_file_names_differ_by_model_dtype_calibration_and_layer(tmp_path: Path) -> None:
    files = [
        file_of(tmp_path, "set", 1),
        file_of(tmp_path, "set", 1, "other"),
        file_of(tmp_path, "set", 1, "model", "torch.bfloat16"),
        file_of(tmp_path, "other", 1),
        file_of(tmp_path, "set", 11),
    ]
    assert len(set(files)) == len(files)
    assert file_of(tmp_path, "set", 1) == files[0]
    assert all(tmp_path in file.parents for file in files)


def saved(folder: Path) -> tuple[Path, bytes, int]:
    """Save a file of moments; return the file, its content, and the offset of its data."""
    store(folder).save("set", 0, moments())
    file = file_of(folder, "set", 0)
    content = file.read_bytes()
    return file, content, 8 + int.from_bytes(content[:8], "little")


def refused(folder: Path) -> bool:
    """Whether the file is reported as damaged; if not, it must hold what was written."""
    try:
        found = store(folder).load("set", 0)
    except CorruptMomentsError as error:
        return str(file_of(folder, "set", 0)) in str(error)
    assert same(found, moments())
    return False


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_any_flipped_bit_of_the_data_is_noticed(bit: int, tmp_path: Path) -> None:
    file, content, start = saved(tmp_path)
    assert len(content) - start == 11 * 8
    for place in range(start, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        assert refused(tmp_path), place


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_of_the_header_is_noticed_or_changes_nothing(bit: int, tmp_path: Path) -> None:
    file, content, start = saved(tmp_path)
    noticed = 0
    for place in range(start):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        noticed += refused(tmp_path)
    assert noticed > 0.8 * start  # the rest is space between JSON's tokens


@pytest.mark.parametrize("dtype", [b"I64", b"U64", b"C64"])
def test_a_changed_dtype_in_the_header_is_noticed(dtype: bytes, tmp_path: Path) -> None:
    file, content, _ = saved(tmp_path)
    file.write_bytes(content.replace(b"F64", dtype))
    assert refused(tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    file, content, start = saved(tmp_path)
    for length in (0, 1, 7, 8, 9, start - 1, start, start + 1, len(content) - 8, len(content) - 1):
        file.write_bytes(content[:length])
        assert refused(tmp_path), length
    file.write_bytes(content + b"\0" * 8)
    assert refused(tmp_path)


def test_files_in_another_format_are_noticed(tmp_path: Path) -> None:
    file, content, _ = saved(tmp_path)
    tensors = {name: seen.sumsq_I for name, seen in moments().items()}
    others = [
        json.dumps({"tokens": 1}).encode(),
        safetensors.torch.save(tensors),
        safetensors.torch.save(tensors, {"tokens": "{}"}),
        safetensors.torch.save(tensors, {"tokens": "[", "sha256": "0"}),
        safetensors.torch.save(tensors, {"sha256": "0"}),
        b"\xff" * 64,
        b"PK\x03\x04" + b"\0" * 60,
    ]
    for other in others:
        file.write_bytes(other)
        assert refused(tmp_path), other[:80]
    file.write_bytes(content)
    assert not refused(tmp_path)


def test_metadata_in_another_format_is_noticed(tmp_path: Path) -> None:
    file, _, _ = saved(tmp_path)
    tensors = {name: seen.sumsq_I for name, seen in moments().items()}
    file.write_bytes(safetensors.torch.save(tensors, {"tokens": "[1, 2]", "sha256": "0"}))
    assert refused(tmp_path)


# results


def result(key: str = "abc") -> Result:
    return Result(key, VARIANT, {"bits.fr": 1 / 3, "sparsity.actual": 0.5}, "f00d", ("0.mlp.experts.up.3",))


def results(folder: Path) -> ResultStore:
    return ResultStore(Storage(str(folder)))


def files(folder: Path) -> tuple[Path, Path]:
    """The two files of the only result: its metrics and its answers."""
    (own,), (items,) = (folder / "results").iterdir(), (folder / "items").iterdir()
    return own, items


def test_results_are_read_back(tmp_path: Path) -> None:
    dense = Result("dense", None, {"bits.fr": 1e-300})
    for made in (result(), dense):
        results(tmp_path).save(made, f"[{made.key}]")
        assert results(tmp_path).load(made.key) == made
        assert results(tmp_path).items(made.key) == f"[{made.key}]"
    assert results(tmp_path).load("nothing") is None
    assert results(tmp_path / "not made yet").load("abc") is None
    assert not (tmp_path / "not made yet").exists()


def test_nan_and_infinity_are_read_back(tmp_path: Path) -> None:
    made = Result("dense", None, {"a": float("nan"), "b": float("inf"), "c": 5e-324, "d": -0.0})
    results(tmp_path).save(made, "[]")
    found = results(tmp_path).load("dense")
    assert found is not None
    assert repr(found) == repr(made)


def test_a_truncated_result_is_none(tmp_path: Path) -> None:
    results(tmp_path).save(result(), "[1]")
    file, _ = files(tmp_path)
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        assert results(tmp_path).load("abc") is None, length
    file.write_bytes(content)
    assert results(tmp_path).load("abc") == result()


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_of_a_result_is_noticed_or_changes_nothing(bit: int, tmp_path: Path) -> None:
    results(tmp_path).save(result(), "[1]")
    file, _ = files(tmp_path)
    content = file.read_bytes()
    spaces = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        found = results(tmp_path).load("abc")
        assert found in (None, result()), place
        spaces += found is not None
    assert spaces < 0.1 * len(content)  # between JSON's tokens


@pytest.mark.parametrize(("old", "new"), [("0.5", "0.6"), ("wanda", "ria"), ("f00d", "f00e"), ("up.3", "up.4")])
def test_a_changed_value_of_a_result_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    results(tmp_path).save(result(), "[1]")
    file, _ = files(tmp_path)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert results(tmp_path).load("abc") is None


def test_a_result_under_another_name_is_none(tmp_path: Path) -> None:
    results(tmp_path).save(result(), "[1]")
    file, _ = files(tmp_path)
    file.rename(file.with_name("other.json"))
    assert results(tmp_path).load("other") is None


def test_a_result_without_answers_is_none(tmp_path: Path) -> None:
    results(tmp_path).save(result(), "[1]")
    files(tmp_path)[1].unlink()
    assert results(tmp_path).load("abc") is None


def test_a_result_with_answers_of_another_size_is_none(tmp_path: Path) -> None:
    results(tmp_path).save(result(), "[1]")
    items = files(tmp_path)[1]
    for text in ("", "[1", "[1]\n"):
        items.write_text(text)
        assert results(tmp_path).load("abc") is None
    items.write_text("[1]")
    assert results(tmp_path).load("abc") == result()


def test_damaged_answers_are_reported_when_they_are_read(tmp_path: Path) -> None:
    results(tmp_path).save(result(), "[1]")
    items = files(tmp_path)[1]
    items.write_text("[2]")  # of the same length
    assert results(tmp_path).load("abc") == result(), "the answers are not read here"
    with pytest.raises(StorageError, match="delete it and run the same command again") as raised:
        results(tmp_path).items("abc")
    assert str(items) in str(raised.value)
    items.unlink()  # as it says
    assert results(tmp_path).load("abc") is None
    with pytest.raises(StorageError, match="damaged or missing"):
        results(tmp_path).items("abc")
    results(tmp_path).save(result(), "[1]")
    assert results(tmp_path).items("abc") == "[1]"


@pytest.mark.parametrize("first", ["[1]", "[22]"])
def test_a_trial_finished_twice_with_other_answers_is_one_of_the_two(first: str, tmp_path: Path) -> None:
    """Two drivers on machines that round differently; the second has written only its answers."""
    one, other = {"[1]": ("[1]", "[22]"), "[22]": ("[22]", "[1]")}[first]
    results(tmp_path).save(result(), one)
    (own,) = (tmp_path / "results").iterdir()
    kept = own.read_bytes()
    results(tmp_path).save(result(), other)
    own.write_bytes(kept)
    assert results(tmp_path).load("abc") == result()
    assert results(tmp_path).items("abc") == one


def test_a_result_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    """Its checksum is correct: somebody wrote it on purpose."""
    results(tmp_path / "store").save(result(), "[1]")
    file, _ = files(tmp_path / "store")
    values = json.loads(file.read_text())
    del values["sha256"]
    values["items"]["sha256"] = "/../../../outside"
    values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(values))
    (tmp_path / "outside.json").write_text("[1]")
    with pytest.raises(StorageError, match="inside"):
        results(tmp_path / "store").load("abc")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", "{}", "\xff", '{"variant": {"score": "wanda"}}', "[" * 100_000]
)
def test_a_result_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    results(tmp_path).save(result(), "[1]")
    files(tmp_path)[0].write_bytes(text.encode("latin-1"))
    assert results(tmp_path).load("abc") is None


def test_a_result_with_unknown_fields_of_a_variant_is_none(tmp_path: Path) -> None:
    results(tmp_path).save(result(), "[1]")
    file, _ = files(tmp_path)
    values = json.loads(file.read_text())
    del values["sha256"]
    values["variant"]["rotation"] = "quarot"  # written by a later version: another trial
    values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(values))
    assert results(tmp_path).load("abc") is None


STORED = Path(__file__).parent / "data" / "store-2" / "store"


def test_results_are_written_as_earlier_versions_wrote_them(tmp_path: Path) -> None:
    """Under the same names and, but for the variant's seed and the checksum with it, with the same content."""
    keys = [file.stem for file in (STORED / "results").iterdir()]
    assert keys
    for key in keys:
        stored = results(STORED).load(key)
        assert stored is not None
        results(tmp_path).save(stored, results(STORED).items(key))
    files = {file.name: file.read_bytes() for file in (STORED / "items").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "items").iterdir()} == files
    assert without_later_fields(tmp_path / "results") == without_later_fields(STORED / "results")


def without_later_fields(folder: Path) -> dict[str, Any]:
    content = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    for values in content.values():
        del values["sha256"]
        for name in ("seed", "repair"):
            (values["variant"] or {}).pop(name, None)
    return content
