"""A word of a printed command is read by a shell as it was, whatever bytes a file's name has.

The class: printed commands that do something else, or nothing. `pip` may be that of another Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptc.files.words import pip_install, quoted, span

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


def test_a_span_has_the_unit_that_suits_it() -> None:
    spans = (0.00035, "0.35 ms"), (0.8124, "812 ms"), (8.43, "8.4 s"), (1496.5, "24:56")
    for seconds, text in spans:
        assert span(seconds) == text


def test_pip_is_that_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip_in(folder: Path) -> None:
        folder.mkdir()
        (folder / "pip").write_text("")
        (folder / "pip").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    ours = tmp_path / "a venv"
    monkeypatch.setattr(sys, "executable", str(ours / "python"))
    pip_in(tmp_path / "other")
    assert pip_install("a", "b") == f"'{ours}/python' -m pip install a b"
    monkeypatch.setenv("PATH", "")
    assert pip_install("a") == f"'{ours}/python' -m pip install a"
    pip_in(ours)
    assert pip_install("a") == "pip install a"
