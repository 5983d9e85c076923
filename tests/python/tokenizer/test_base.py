"""Tokens become text one by one exactly as they do all at once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from corpus import MIXED
from gptc.errors import GptcError, UsageError
from gptc.tokenizer.base import StreamDecoder
from gptc.tokenizer.native import BpeTokenizer, ByteTokenizer, CharTokenizer
from gptc.tokenizer.utf8 import character_cut


def test_a_character_is_never_cut() -> None:
    data = "aé東😀".encode()
    assert [character_cut(data[:n]) for n in range(len(data) + 1)] == [
        *(0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10)
    ]
    assert character_cut(b"\x80" * 9) == 9  # no UTF-8: for the decoder to refuse


def test_stream_decoder_equals_decode() -> None:
    rng = random.Random(3)
    tokenizer = ByteTokenizer()
    for _ in range(200):
        tokens = [rng.choice(MIXED.encode() + b"\xff\xc3\xf0") for _ in range(20)]
        stream = StreamDecoder(tokenizer)
        text = "".join(stream.push(token) for token in tokens) + stream.flush()
        assert text == tokenizer.decode(tokens)


def test_stream_decoder_waits_for_whole_characters() -> None:
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(byte) for byte in "😀a".encode()] == ["", "", "", "😀", "a"]
    assert stream.push(0xF0) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(0x61) == "a"


def test_texts_and_ids_are_told_apart() -> None:
    anything: Any
    learned = BpeTokenizer([b"ab"])
    for tokenizer in (ByteTokenizer(), CharTokenizer("abx"), learned):
        for anything in (b"x", None, ["x"]):
            with pytest.raises(UsageError, match=r"the text is .*; it must be a str"):
                tokenizer.encode(anything)
        for anything in ("x", b"x", [1.5], [[1], [2, 3]], [[1]], 5, [True], [2**70]):
            with pytest.raises(UsageError, match=r"the tokens are .*; they must be a list of tok"):
                tokenizer.decode(anything)
        assert tokenizer.decode([]) == tokenizer.decode(np.zeros(0, np.float32)) == ""
        assert tokenizer.decode(np.array([1], np.uint16)) == tokenizer.decode((1,))


@pytest.mark.parametrize("token", [-1, 256])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(GptcError, match=f"token {token} .* of 256"):
        ByteTokenizer().decode_bytes(np.array([65, token]))
