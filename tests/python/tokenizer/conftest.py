"""Fixtures of the tests of tokenizers and chat templates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptc.files import warm
from gptc.tokenizer import with_sentencepiece, with_tiktoken, with_tokenizers


@pytest.fixture(scope="module", autouse=True)
def _prepared_templates() -> Iterator[None]:
    """The process of each template stays for the other tests of a file (test_warm.py ends them)."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(warm, "MOST_IDLE", 24)
        yield
    warm.end_all()


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions that a test has made are not tried in a process each (test_strangers.py does)."""
    for module in (with_sentencepiece, with_tiktoken, with_tokenizers):
        monkeypatch.setattr(module, "try_out", lambda library, definition, where: None)
