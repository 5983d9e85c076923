"""Strings of an array of GGUF, wherever the part of the file ends that is in memory."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from gptc.errors import GptcError
from gptc.formats import binary
from gptc.formats.binary import Binary
from gptc.formats.gguf_container import read_text, read_texts


def written(folder: Path, texts: list[bytes]) -> Binary:
    path = folder / "x"
    path.write_bytes(b"".join(struct.pack("<Q", len(text)) + text for text in texts))
    return Binary(path)


@pytest.mark.parametrize("window", [9, 16, 33, 1 << 20])
def test_strings_are_those_that_are_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(binary, "_WINDOW", window)
    draw = random.Random(window)
    texts = ["é東x" * draw.randrange(9) for _ in range(200)]
    file = written(tmp_path, [text.encode() for text in texts])
    assert read_texts(file, 120, 99) == texts[:120]
    assert read_text(file, "the next one", 99, 0) == texts[120]
    assert read_texts(file, 79, 99) == texts[121:]
    assert file.at == file.size


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([b"ab", b"\xff"], r"string 1 of an array at byte 18 is not UTF-8"),
        ([b"ab", b"c" * 10], r"length of string 1 of an array at byte 10 is 10; it must be"),
        ([b"ab", b"c"], r"length of string 2 of an array at byte 19 takes 8 bytes"),
    ],
)
def test_damaged_strings_are_named(tmp_path: Path, texts: list[bytes], why: str) -> None:
    for n in (len(texts), 3):
        with pytest.raises(GptcError, match=why):
            read_texts(written(tmp_path, texts), max(n, 3), 9)
