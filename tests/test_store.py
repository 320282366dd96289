"""What outlives a process: it comes back exactly, or is known to be damaged, or is not there."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mlprune.pruning.moments import Moments
from mlprune.store import CorruptMomentsError, MomentStore, Result, ResultStore, write_whole
from mlprune.variants import Variant

VARIANT = Variant("translation:en-fr", "wanda", 0.5, "unstructured", "dense")


def store(root: Path, fingerprint: str = "model", dtype: str = "torch.float32") -> MomentStore:
    return MomentStore(root, fingerprint, dtype)


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
def test_moments_come_back_to_the_bit(layer: int, seed: int, tmp_path: Path) -> None:
    store(tmp_path).save("set", layer, moments(seed))
    assert same(store(tmp_path).load("set", layer), moments(seed))
    assert store(tmp_path).load("set", layer + 1) is None
    assert store(tmp_path).load("other", layer) is None


def test_extreme_numbers_come_back(tmp_path: Path) -> None:
    values = torch.tensor([0.0, 5e-324, 1.7976931348623157e308, 1 / 3], dtype=torch.float64)
    store(tmp_path).save("set", 0, {"a": Moments(1, values)})
    assert same(store(tmp_path).load("set", 0), {"a": Moments(1, values)})


def test_matrices_that_share_moments_are_stored_each(tmp_path: Path) -> None:
    shared = Moments(5, torch.rand(4, dtype=torch.float64))
    store(tmp_path).save("set", 0, {"q": shared, "k": shared})
    assert same(store(tmp_path).load("set", 0), {"q": shared, "k": shared})


def test_what_is_saved_again_replaces(tmp_path: Path) -> None:
    for seed in (0, 1):
        store(tmp_path).save("set", 0, moments(seed))
    assert same(store(tmp_path).load("set", 0), moments(1))
    assert len(list(tmp_path.rglob("*.*"))) == 1


def test_nothing_stored_is_nothing_found(tmp_path: Path) -> None:
    assert store(tmp_path / "not made yet").load("set", 0) is None
    assert not (tmp_path / "not made yet").exists()


def test_the_place_differs_by_model_dtype_calibration_and_layer(tmp_path: Path) -> None:
    files = [
        store(tmp_path).file("set", 1),
        store(tmp_path, "other").file("set", 1),
        store(tmp_path, dtype="torch.bfloat16").file("set", 1),
        store(tmp_path).file("other", 1),
        store(tmp_path).file("set", 11),
    ]
    assert len(set(files)) == len(files)
    assert store(tmp_path).file("set", 1) == files[0]
    assert all(tmp_path in file.parents for file in files)


def saved(folder: Path) -> tuple[Path, bytes, int]:
    """A file of moments, its content, and where its data begin."""
    store(folder).save("set", 0, moments())
    file = store(folder).file("set", 0)
    content = file.read_bytes()
    return file, content, 8 + int.from_bytes(content[:8], "little")


def refused(folder: Path) -> bool:
    """Whether the file is known to be damaged; what is read of it otherwise must be what was written."""
    try:
        found = store(folder).load("set", 0)
    except CorruptMomentsError as error:
        return str(store(folder).file("set", 0)) in str(error)
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


def test_files_of_other_making_are_noticed(tmp_path: Path) -> None:
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


def test_metadata_of_another_form_is_noticed(tmp_path: Path) -> None:
    file, _, _ = saved(tmp_path)
    tensors = {name: seen.sumsq_I for name, seen in moments().items()}
    file.write_bytes(safetensors.torch.save(tensors, {"tokens": "[1, 2]", "sha256": "0"}))
    assert refused(tmp_path)


# writing


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "folder" / "file.json"
    write_whole(file, b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(OSError, match="No space left"):
        write_whole(file.with_name("never"), b"new")
    assert list(file.parent.iterdir()) == [file]


def test_the_bytes_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, order = tmp_path / "file", list[str]()
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        order.append(f"fsync of {os.fstat(descriptor).st_size}")
        sync(descriptor)

    def replaced(partial: Path, target: Path) -> Path:
        order.append("replace")
        return replace(partial, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_whole(file, b"12345")
    assert order == ["fsync of 5", "replace"]
    assert file.read_bytes() == b"12345"
    assert list(tmp_path.iterdir()) == [file]


# results


def result(key: str = "abc") -> Result:
    return Result(key, VARIANT, {"bits.fr": 1 / 3, "sparsity.actual": 0.5}, "f00d", ("0.mlp.experts.up.3",))


def test_results_come_back(tmp_path: Path) -> None:
    dense = Result("dense", None, {"bits.fr": 1e-300})
    results = ResultStore(tmp_path)
    for made in (result(), dense):
        results.save(made, f"[{made.key}]")
        assert ResultStore(tmp_path).load(made.key) == made
        assert ResultStore(tmp_path).items(made.key) == f"[{made.key}]"
    assert results.load("nothing") is None
    assert ResultStore(tmp_path / "not made yet").load("abc") is None


def test_a_half_written_result_is_none(tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    results.save(result(), "[1]")
    file = tmp_path / "results" / "abc.json"
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        assert results.load("abc") is None, length
    file.write_bytes(content)
    assert results.load("abc") == result()


def test_a_result_without_what_was_answered_is_none(tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    results.save(result(), "[1]")
    results.items_file("abc").unlink()
    assert results.load("abc") is None


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "{}", "\xff", '{"variant": {"score": "wanda"}}'])
def test_a_result_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    ResultStore(tmp_path).save(result(), "[1]")
    (tmp_path / "results" / "abc.json").write_bytes(text.encode("latin-1"))
    assert ResultStore(tmp_path).load("abc") is None


def test_a_result_of_another_variants_fields_is_none(tmp_path: Path) -> None:
    ResultStore(tmp_path).save(result(), "[1]")
    file = tmp_path / "results" / "abc.json"
    values = json.loads(file.read_text())
    values["variant"]["rotation"] = "quarot"  # of a later version: not this trial's
    file.write_text(json.dumps(values))
    assert ResultStore(tmp_path).load("abc") is None
