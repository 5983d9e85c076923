"""A word of a printed command is read by a shell as it was, whatever bytes a file's name has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gptc.files.words import quoted

WORDS = [
    "plain", "", "a b", "it's", "$HOME `x` \\ !", "é", "-m", "~", "a\nb", "tab\there", "del\x7f",
    "run\udcff", "run\udcff1", "run\udcffa'b\\", "\udce9\udc80", "\u00a0", "\u202egpj", "*?[a]",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_shell_reads_the_word(word: str) -> None:
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("needs bash")
    text = quoted(Path(word) if word else word)
    assert text.isprintable()
    script = f"printf '%s' {text}".encode()
    told = subprocess.run([bash, "-c", script], check=True, capture_output=True).stdout
    assert told == os.fsencode(word)
