"""Each fuzzer works in a folder of its own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep caches, and files whose names a fuzzer invents, in the test's own folder."""
    monkeypatch.setenv("MLPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
