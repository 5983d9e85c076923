"""The fuzzing campaign counts each sort of failure, and no loader has one for its first files.

The class of fault: a failure that ends the campaign, or is not counted.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest

from fuzzing import FOLDER
from gptc.errors import GptcError

import campaign  # isort: skip
from model_files import Target  # isort: skip

# One of each module, and those whose libraries once crashed.
FORMATS = [
    "plain.parquet", "snappy.parquet", "files.zip", "dataset.json-info", "files.tar",
    "tokenizer.json-unigram", "tokenizer.model-bpe", "gptc_tokenizer.json-tiktoken", "vocab.json",
    "gguf-tokenizer-bpe", "c-config", "trainer.json", "metrics.jsonl", "config.toml",
    "peft-llama-adapter_config.json", "gguf-lora-llama", "chats.jsonl-messages", "mask",
    "body-completion", "chats-pieces.json", "packed-q4_0-model.gguf", "prepare-journal.jsonl",
    "ngrams.json", "ngrams.bin",
]  # fmt: skip
N_CASES = 60  # of each
NEVER_REFUSED = ("metrics.jsonl", "prepare-journal.jsonl")  # of which the damaged end is left out


def test_loaders_survive_damaged_files(tmp_path: Path) -> None:
    """In another process, which a library may end. The cases of a seed are always the same."""
    pytest.importorskip("pyarrow")
    counts = tmp_path / "counts.json"
    command = [sys.executable, str(FOLDER / "campaign.py"), "--counts", str(counts)]
    command += ["--minutes", "5", "--cases", str(N_CASES), "--formats", *FORMATS]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(counts.read_text())
    assert {name: one["inputs"] for name, one in found.items()} == dict.fromkeys(FORMATS, N_CASES)
    assert campaign.in_all(found)["inputs"] == N_CASES * len(FORMATS)
    assert all(one["refused"] or name in NEVER_REFUSED for name, one in found.items())


def test_a_campaign_continues_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = tmp_path / "read"

    def targets(folder: Path) -> dict[str, Target]:
        files = {name: folder / name for name in "xyz"}
        for name, file in files.items():
            file.write_bytes(name.encode() * 9)
        return {name: Target(file, partial(note, file)) for name, file in files.items()}

    def note(file: Path) -> None:
        with read.open("a") as out:
            out.write(f"{file.name} {file.read_bytes().hex()}\n")

    def run(counts: str, cases: int) -> tuple[list[str], dict[str, dict[str, int]]]:
        read.write_text("")
        path = tmp_path / counts
        command = ["campaign.py", "--counts", path, "--cases", cases, "--formats", "x", "y"]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        assert campaign.main() == 0
        return sorted(read.read_text().splitlines()), json.loads(path.read_text())

    monkeypatch.setattr(campaign.fuzz, "targets", targets)
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # which main changes
    first, found = run("pieces", 20)
    assert {name: one["inputs"] for name, one in found.items()} == {"x": 20, "y": 20}
    second, found = run("pieces", 60)
    assert {name: one["inputs"] for name, one in found.items()} == {"x": 60, "y": 60}
    assert (sorted(first + second), found) == run("whole", 60)
    assert run("pieces", 60)[0] == []


def _abort() -> None:
    faulthandler.disable()  # pytest's, whose dump would look like a failed test
    os.abort()


def _hang() -> None:
    while True:
        pass


def _allocate() -> None:
    bytearray(300 << 20)


def _raise(error: BaseException) -> Callable[[], None]:
    def read() -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda: None, "read"),
        (_raise(GptcError("x is damaged")), "refused"),
        (_raise(GptcError("")), "long errors"),
        (_raise(KeyError("x")), "tracebacks"),
        (_raise(SystemExit(1)), "tracebacks"),
        (_abort, "crashes"),
        (_hang, "hangs"),
        (_allocate, "memory"),
    ],
)
def test_each_outcome_is_counted(
    tmp_path: Path, read: Callable[[], None], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "HANG_SECONDS", 1)
    path = tmp_path / "x"
    path.write_bytes(b"whole")
    kept = tmp_path / "kept"
    n = 1 if read is _hang else 3  # a second each
    then, counts = campaign.slice_of("x", Target(path, read), range(n), 1, 60, kept)
    assert (then, counts[outcome], sum(counts.values())) == (n, n, n)
    assert path.read_bytes() == b"whole"
    n_kept = 2 * n if outcome in campaign.FAILURES else 0
    assert len(list(kept.glob("*"))) == n_kept


def test_memory_for_the_damage_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "SPARE_BYTES", 20 << 20)
    path = tmp_path / "x"
    path.write_bytes(b"whole")

    def structure(data: bytes) -> Callable[[Random], bytes]:
        return lambda random: (b"x" * (60 << 20))[:5]

    for read, n_failures in ((lambda: None, 0), (lambda: b"x" * (60 << 20), 8)):
        _, counts = campaign.slice_of("x", Target(path, read, structure), range(8), 1, 60, None)
        assert counts["memory"] == n_failures


def test_a_file_is_the_damage_and_no_more(tmp_path: Path) -> None:
    """Whatever was there before, and was longer or shorter."""
    path = tmp_path / "x"
    path.write_bytes(b"whole" * 20)

    def structure(data: bytes) -> Callable[[Random], bytes]:
        return lambda random: bytes([n := random.randrange(90)]) * n

    def read() -> None:
        content = path.read_bytes()
        if content != content[:1] * (content or b"\0")[0]:
            raise AssertionError(content)

    target = Target(path, read, structure)
    _, counts = campaign.slice_of("x", target, range(100), 1, 60, None)
    assert counts["read"] > 20
    assert counts["tracebacks"] == n_of_bytes(target, 100)


def n_of_bytes(target: Target, n: int) -> int:
    """The cases whose bytes were damaged, and not their structure: they are not read."""
    mutate = campaign.mutator(target.structure, target.file.read_bytes())
    contents = [mutate(Random(f"1 x {case}")) for case in range(n)]
    return sum(content != content[:1] * (content or b"\0")[0] for content in contents)


def test_an_end_during_a_trial_is_a_refusal(tmp_path: Path) -> None:
    """gptc tries a definition in another process, which may end."""
    from gptc.tokenizer.libraries import try_out

    path = tmp_path / "x"
    path.write_bytes(b"whole")

    def read() -> None:
        campaign.trial._ENCODERS["tokenizers"] = lambda definition: _abort()
        try_out("tokenizers", b"x", "it")

    _, counts = campaign.slice_of("x", Target(path, read), range(2), 1, 60, None)
    assert counts["refused"] == 2


def test_a_slice_ends_in_time(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"whole")
    target = Target(path, lambda: time.sleep(0.01))
    then, counts = campaign.slice_of("x", target, range(10**9), 1, 0.5, None)
    assert 1 <= then == counts["read"] <= 51
