"""Fixtures of the tests of tokenizers and chat templates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptc.files import warm


@pytest.fixture(scope="module", autouse=True)
def _prepared_templates() -> Iterator[None]:
    """The process of each template stays for the other tests of a file (test_warm.py ends them)."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(warm, "MOST_IDLE", 24)
        yield
    warm.end_all()
