"""Tracked text is in plain English: words that a reader has to decode have a limit."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# How often each may occur: lower it as texts are rewritten, and raise none.
ALLOWED = {
    "beside": 0,
    "stands": 3,
    "lies": 0,
    "goes on": 1,
    "anew": 1,
    "is no": 18,
    "of its own": 0,
}
# The stories' templates need these words, and this file names them.
NOT_PROSE = ("data/stories/", "LICENSE", "tests/python/test_prose.py")
# Matches between two words of a phrase: blanks, or a line break and the next comment's start.
GAP = r"(?:[ \t]+|[ \t]*\n[ \t]*(?:#|\*|//|>)?[ \t]*)"


def places(word: str, text: str) -> list[int]:
    """The lines in which a word or phrase begins."""
    pattern = rf"\b{word.replace(' ', GAP)}\b"
    found = re.finditer(pattern, text, re.IGNORECASE)
    return [text.count("\n", 0, match.start()) + 1 for match in found]


def tracked() -> Iterator[tuple[str, str]]:
    """The name and text of each tracked file, but for binary ones."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and not name.startswith(NOT_PROSE):
            content = path.read_bytes()
            if b"\0" not in content:
                yield name, content.decode("utf-8", "replace")


@pytest.mark.parametrize("word", ALLOWED)
def test_a_word_stays_within_its_allowance(word: str) -> None:
    found = [f"{name}:{line}" for name, text in tracked() for line in places(word, text)]
    assert len(found) <= ALLOWED[word], (
        f"{word!r} occurs {len(found)} times, allowed are {ALLOWED[word]}:\n" + "\n".join(found)
    )


def test_words_are_found_across_lines_and_only_whole() -> None:
    text = "It is not so.\n# This is\n# no good: it Lies.\n# It relies on Anewtext.\n"
    assert places("is no", text) == [2]
    assert places("lies", text) == [3]
    assert places("anew", text) == []
