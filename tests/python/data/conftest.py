"""The environment of the tests of datasets: an empty cache for each of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vocabularies import gpt2_folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no proxy, and the GPT-2 vocabulary if it is here."""
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    if folder := gpt2_folder():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
