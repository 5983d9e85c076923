"""Commands that read the folder of a run, with metrics and samples made to do harm."""

from __future__ import annotations

import io
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from gptc.cli import main

_GOOD = {
    "step": 1, "tokens": 16, "elapsed_s": 0.5, "train_loss": 5.0, "val_loss": 4.5, "lr": 1e-3,
    "grad_norm": 1.0, "tokens_per_s": 100.0, "update_ratio/attention": 1e-3,
}  # fmt: skip
_VALUES = (
    "1e400", "-1e400", "NaN", "1e308", "-1e308", "5e-324", "0", "-1", "9" * 18, "9" * 30, "true",
    "null", '"x"', "[]", "{}", '"\\ud800"', '"\\u001b[31m"', "[" * 50 + "]" * 50,
)  # fmt: skip


def _line(**values: Any) -> bytes:
    return json.dumps(_GOOD | values).encode() + b"\n"


def _metrics() -> Iterator[tuple[str, bytes]]:
    good = b"".join(_line(step=i) for i in range(1, 4))
    for key in _GOOD:
        for value in _VALUES:
            one = json.dumps(_GOOD | {key: "@"}).replace('"@"', value).encode() + b"\n"
            yield f"{key} {value[:12]}", one
            yield f"{key} {value[:12]} after others", good + one + good
    yield "steps that go back", b"".join(_line(step=i) for i in (5, 3, 4, 1, 1, 9))
    yield "one step often", _line() * 3000
    yield "steps far apart", _line(step=-(10**17)) + _line(step=10**17)
    yield "no loss", b'{"step": 1, "tokens": 1, "elapsed_s": 1, "train_loss": 1}\n'
    yield "names of terminals", _line(**{"val_\x1b[2J": 1.0, "update_ratio/\x1b]0;x\x07": 1.0})
    yield "names of files", _line(**{"update_ratio/../../x": 1.0, "val_<script>": 1.0})
    yield "many names", _line(**{f"update_ratio/{i}": 1.0 for i in range(1500)})
    yield "deep", b'{"step": 1, "x": ' + b"[" * 30_000 + b"\n" + good
    yield "zeros", bytes(100_000) + good
    yield "a line of megabytes", b'{"step": ' + b" " * 3_000_000 + b"1}\n" + good
    yield "huge", b"".join(_line(step=i, train_loss=1e300 * (-1) ** i) for i in range(200))
    yield "cut", good[:-7]
    draw = random.Random(3)
    for case in range(12):
        damaged = bytearray(good)
        for _ in range(draw.randrange(1, 6)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        yield f"bytes {case}", bytes(damaged)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    out = tmp_path_factory.mktemp("out")
    return [
        ["info"],
        ["plot", "--out", str(out / "a.html"), "--ngram", "0"],
        ["plot", "--out", str(out / "a.png"), "--x", "time"],
    ]


def _check(command: list[str], run: Path, what: str) -> None:
    out, err, began = io.StringIO(), io.StringIO(), time.process_time()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([*command[:1], str(run), *command[1:]])
    seconds, said = time.process_time() - began, err.getvalue()
    assert ended.value.code in (0, None, 1), (command, what, ended.value.code, said)
    if ended.value.code:
        assert said.count("\n") == 1, (command, what, said)
    assert not set("\x1b\x07") & set(out.getvalue() + said), (command, what, said)
    assert seconds < 10, (command, what, seconds)


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize("part", range(4))
def test_metrics_of_any_values(commands: list[list[str]], tmp_path: Path, part: int) -> None:
    for n, (what, data) in enumerate(list(_metrics())[part::4]):
        (tmp_path / "metrics.jsonl").write_bytes(data)
        for i, command in enumerate(commands):
            if i == 0 or n == 24 * i:  # pictures take a second each
                _check(command, tmp_path, what)


def test_samples_of_any_values(commands: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(_line())
    texts = ["<script>alert(1)</script>", "\x1b[2J", "\ud800", "x" * 60_000, "\0", "]]>"]
    lines = [json.dumps({"step": i, "text": text}) for i, text in enumerate(texts)]
    lines += ['{"step": 1, "text": 5}', "{", "[" * 30_000]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    for command in commands:
        _check(command, tmp_path, "samples")
    page = Path(commands[1][2]).read_text("utf-8")
    assert "<script>alert" not in page


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")
def test_metrics_that_are_not_a_file(commands: list[list[str]], tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    os.mkfifo(file)
    for command in commands:
        _check(command, tmp_path, "a pipe")
    file.unlink()
    for target in ("/dev/zero", "metrics.jsonl", "nothing"):
        file.symlink_to(target)
        for command in commands:
            _check(command, tmp_path, target)
        file.unlink()
    file.mkdir()
    for command in commands:
        _check(command, tmp_path, "a folder")
