"""A shell completes paths, presets, formats and other names, as README says.

The class: help that is documented and does nothing. Without this, click completes only options.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FILE = ["file"]


CASES = [
    ("gptc inf", ["infer", "info"]),
    ("gptc train --preset t", ["tiny"]),
    ("gptc bench train --preset gpt2-m", ["gpt2-medium"]),
    ("gptc export --to g", ["gguf"]),
    ("gptc export --dtype q8", ["q8_0"]),
    ("gptc eval --task st", ["stories"]),
    ("gptc eval --task rows/", FILE),
    ("gptc train --schedule c", ["cosine", "constant"]),
    ("gptc train --data sha", ["shakespeare"]),
    ("gptc train --data my", FILE),
    ("gptc train --data ", FILE),
    ("gptc prepare book.txt --tokenizer by", ["bytes"]),
    ("gptc import a --tokenizer gp", ["gpt2"]),
    ("gptc import a --tokenizer x/", FILE),
    ("gptc infer -m runs/", FILE),
    ("gptc eval --model r", FILE),
    ("gptc export -m r", FILE),
    ("gptc infer --draft r", FILE),
    ("gptc infer --grammar r", FILE),
    ("gptc train --resume r", FILE),
    ("gptc train --init-from r", FILE),
    ("gptc info r", FILE),
    ("gptc import r", FILE),
    ("gptc verify r", FILE),
    ("gptc prepare a.txt b", FILE),
    ("gptc prepare --text-field b", []),
]
# Starting Python takes longer than completing: a copy of one process completes each line.
PROGRAM = """
import os, sys
from gptc.cli import main
for line in sys.stdin.read().splitlines():
    child = os.fork()
    if not child:
        os.environ |= {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        try:
            main([])
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
    print("end", flush=True)
"""


@cache
def completed() -> dict[str, list[str]]:
    """The words with which click answers bash for each line; "file": paths, which bash knows."""
    lines = [line for line, _ in CASES]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="".join(f"{line}\n" for line in lines),
        env={**os.environ, "_GPTC_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
    )
    assert ran.stderr == ""
    *answers, rest = ran.stdout.split("end\n")
    assert rest == ""
    found = {}
    for line, answer in zip(lines, answers, strict=True):
        rows = [row.partition(",") for row in answer.splitlines()]
        found[line] = [word if kind == "plain" else kind for kind, _, word in rows if kind]
    return found


@pytest.mark.parametrize(("line", "words"), CASES)
def test_a_word_is_completed(line: str, words: list[str]) -> None:
    assert completed()[line] == words


def test_bash_completes_a_path(tmp_path: Path) -> None:
    """What README's line makes of a word in bash itself."""
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("needs bash")
    (tmp_path / "gptc").write_text(f'#!/bin/sh\nexec {sys.executable} -m gptc "$@"\n')
    (tmp_path / "gptc").chmod(0o755)
    script = """
        eval "$(_GPTC_COMPLETE=bash_source gptc)"
        COMP_WORDS=(gptc train --preset ti) COMP_CWORD=3
        _gptc_completion gptc && echo "${COMPREPLY[@]}"
    """
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    ran = subprocess.run(
        [bash, "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert ran.stdout == "tiny\n", ran.stderr
