"""A tokenizer that a stranger made is read, or refused in one line, and nothing else is printed.

The class of fault: a library panics, aborts, hangs or fills the memory on a file's ids, patterns
and normalizers. So each definition is tried in another process before it is used.
"""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from corpus import DOWNLOADS
from gptc.errors import GptcError
from gptc.tokenizer import libraries
from gptc.tokenizer.base import FILE_NAME
from gptc.tokenizer.byte_level import to_characters
from gptc.tokenizer.registry import make_tokenizer, read_tokenizer
from gptc.tokenizer.with_tiktoken import TiktokenTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer

CASES = DOWNLOADS.parent / "cases" / "hostile"
TEXTS = ("a", "Hello world 1234!\n\n  x", "\u65e5\u672c \U0001f600", "a" * 3000, " " * 3000)
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def definition(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of single bytes."""
    vocab = {to_characters(bytes([i])): i for i in range(256)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    shell = {"version": "1.0", **empty, "added_tokens": []}
    return {**shell, "pre_tokenizer": LEVEL, "decoder": LEVEL, "model": model, **changes}


def model(**changes: Any) -> dict[str, Any]:
    return {"model": {**definition()["model"], **changes}}


def split(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, LEVEL]}}


def replace(content: str, pattern: str = "a") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def added(id: Any, content: Any = "<x>") -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"added_tokens": [{"id": id, "content": content, "special": True, **flags}]}


def charsmap(data: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": encoded}}


VOCAB = definition()["model"]["vocab"]
JSON_CASES: dict[str, dict[str, Any]] = {
    "an id of a billion": model(vocab={**VOCAB, "zz": 10**9}),
    "an id of 2^24": model(vocab={**VOCAB, "zz": 1 << 24}),
    "an added id of 4 billion": added((1 << 32) - 1),
    "a negative id": model(vocab={**VOCAB, "zz": -1}),
    "an id that is a fraction": model(vocab={**VOCAB, "zz": 1.5}),
    "a list of tokens": model(vocab=list(VOCAB)),
    "no tokens": model(vocab={}),
    "merges of unknown tokens": model(merges=[["q", "qqq"]]),
    "a prefix longer than the tokens": model(
        continuing_subword_prefix="a" * 900, vocab={**VOCAB, "bc": 256}, merges=[["b", "c"]]
    ),
    "an unknown token that is missing": model(unk_token="nope"),
    "no map of characters": charsmap(b""),
    "a short map of characters": charsmap(struct.pack("<II", 4, 0xFFFFFFFF)),
    "a damaged map of characters": charsmap(struct.pack("<I", 4) + bytes([0, 2, 255, 127])),
    "a pattern without an end": split("("),
    "a pattern that backtracks": split("(a+)+$|(\\s|\\s+)+$|."),
    "a pattern of nothing": split(""),
    "a normalizer that multiplies": {"normalizer": replace("a" * 100_000)},
    "a normalizer that multiplies a rare letter": {"normalizer": replace("b" * 99, "\u0416")},
    "normalizers that multiply": {
        "normalizer": {"type": "Sequence", "normalizers": [replace("aaaa")] * 40}
    },
    "a decoder of another sort": {"decoder": {"type": "WordPiece", "prefix": "#", "cleanup": True}},
    "added tokens that are a number": {"added_tokens": 4},
    "an unknown model": {"model": {"type": "Novel"}},
}


def read(path: Path) -> str:
    """The error about a tokenizer, "" when it can be used. Each text has tokens or an error."""
    try:
        found = make_tokenizer(str(path))
    except GptcError as error:
        return str(error)
    for text in TEXTS:
        with suppress(GptcError):
            found.encode(text)
    assert found.fingerprint()
    assert len(found.pieces) == found.vocab_size < libraries.MOST_IDS
    return ""


@pytest.mark.parametrize("case", JSON_CASES)
def test_definitions_that_are_refused(
    tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition(**JSON_CASES[case])))
    message = read(path)
    if case not in ("a pattern of nothing", "an unknown token that is missing"):  # unused
        assert str(path) in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_definitions_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for changes in ({}, added(256), split("\\d|\\D+"), {"normalizer": replace("b")}):
        path.write_text(json.dumps(definition(**changes)))
        assert read(path) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"special": {"<x>": 10**9}}, "ids up to 1,000,000,000"),
        ({"special": {"<x>": 1 << 32}}, "ids up to 4,294,967,296"),
        ({"special": {"<x>": -1}}, "not whole numbers"),
        ({"special": {"<x>": 1.5}}, "not whole numbers"),
        ({"special": {"<x>": "a"}}, "not whole numbers"),
        ({"special": {"<x>": 7}}, "an id twice"),
        ({"special": {"": 256}}, "without text"),
        ({"special": {"a": 256}}, "a token twice"),
        ({"ranked": []}, "no token for some byte"),
        ({"ranked": [chr(i) for i in range(255)]}, "no token for some byte"),
        ({"ranked": [*map(chr, range(256)), "a"]}, "a token twice"),
        ({"ranked": [*map(chr, range(256)), ""]}, "without text"),
        ({"ranked": [*map(chr, range(256)), "\u0416"]}, "was altered"),
        ({"ranked": 5}, "was altered"),
        ({"pattern": "("}, "can use"),
        ({"pattern": ""}, "can use"),
        ({"pattern": "(?=(a+))(a+)+\\1$"}, "can use"),
        ({"pattern": "(?:" + "\\p{L}{1000}" * 40 + ")"}, "can use"),
        ({"pattern": 5}, "was altered"),
        ({"kind": 5}, "was altered"),
        ({"start": 5}, "was altered"),
    ],
)
def test_encodings_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pattern = "\\S+|\\s+"
    made = TiktokenTokenizer("x", pattern, [bytes([i]) for i in range(256)], {"<x>": 256})
    (tmp_path / FILE_NAME).write_text(json.dumps({**made.to_json(), **changes}))
    with pytest.raises(GptcError, match=message) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_damaged_sentencepiece_models(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sentencepiece")
    piece = b"\x0a\x05\x0a\x01a\x18\x01"
    for content in (piece, piece * 3, b"\x0a\x00", b"\x12\x03\x18\xff\x7f", bytes(range(256)), b""):
        (tmp_path / "x.model").write_bytes(content)
        message = read(tmp_path / "x.model")
        assert str(tmp_path) in message
        assert "\n" not in message
    assert capfd.readouterr() == ("", "")


# ---- the trial ----


def tried(change: Callable[[dict[str, Any]], object] = lambda d: None) -> HuggingFaceTokenizer:
    content = definition()
    change(content)
    return HuggingFaceTokenizer(json.dumps(content))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that are started."""
    calls: list[Any] = []
    run = subprocess.run

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(subprocess, "run", count)
    return calls


def test_a_definition_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[Any]
) -> None:
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    tried()
    tried()
    assert len(counted) == 1
    tried(lambda d: d.update(added_tokens=added(256)["added_tokens"]))
    assert len(counted) == 2  # another content
    tried().save(tmp_path)
    read_tokenizer(tmp_path)  # a file that gptc wrote has the same definition
    assert len(counted) == 2
    monkeypatch.setattr(libraries, "_version", lambda library: "another")
    tried()
    assert len(counted) == 3


def test_a_refused_definition_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(GptcError, match="can use"):
            tried(lambda d: d.update(split("(")))
    assert not list(tmp_path.iterdir())


def test_without_a_cache_each_use_is_a_trial(
    monkeypatch: pytest.MonkeyPatch, counted: list[Any]
) -> None:
    monkeypatch.setenv("GPTC_CACHE", "/proc/none")
    tried()
    tried()
    assert len(counted) == 2


def test_what_gptc_makes_itself_is_not_tried(counted: list[Any]) -> None:
    pieces = [bytes([i]) for i in range(256)]
    TiktokenTokenizer("x", libraries_pattern(), pieces, {"<|endoftext|>": 256}).encode("a b")
    make_tokenizer("bytes")
    assert counted == []


def libraries_pattern() -> str:
    from gptc.tokenizer.patterns import CUTS

    return CUTS["llama-bpe"].patterns[0]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", "it crashes, or needs more than"),
        ("[0 for _ in iter(int, 1)]", "it takes longer than 1 s"),
        ("x = bytearray(1 << 34)", "it crashes, or needs more than"),
        ("print('a\\nb')", "a"),
        ("pass", "it ends the process"),
    ],
)
def test_faults_of_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    source = Path(libraries.__file__).with_name("trial.py").read_text()
    source = source.replace("    try:\n", f"    {program}\n    return\n    try:\n", 1)
    (tmp_path / "trial.py").write_text(source)
    monkeypatch.setattr(libraries, "__file__", str(tmp_path / "libraries.py"))
    monkeypatch.setattr(libraries, "_SECONDS", 1)
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(GptcError, match=message) as caught:
        libraries.try_out("tokenizers", b"{}", "x.json")
    assert str(caught.value).startswith("x.json is not a tokenizer")


def test_a_panic_becomes_one_line() -> None:
    class PanicException(BaseException):
        pass

    fault = pytest.raises(GptcError, match=r"x fails in its library \(a\): use another")
    with fault, libraries.called("x"):
        raise PanicException("a\nb")
    with pytest.raises(KeyboardInterrupt), libraries.called("x"):
        raise KeyboardInterrupt


def test_the_trial_imports_nothing_of_gptc() -> None:
    program = Path(libraries.__file__).with_name("trial.py")
    code = f"import runpy, sys; runpy.run_path({str(program)!r}); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in said.stdout.split() if name.startswith(("gptc", "numpy"))]


@pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases/hostile")
def test_the_cases_of_an_attack(capfd: pytest.CaptureFixture[str]) -> None:
    for folder in sorted(CASES.glob("t*-*/")):
        assert "\n" not in read(folder)
    assert capfd.readouterr() == ("", "")
