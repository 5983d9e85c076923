"""Tokens become text one by one exactly as they do all at once."""

from __future__ import annotations

import random

import numpy as np
import pytest

from corpus import MIXED
from gptc.errors import GptcError
from gptc.tokenizer.base import StreamDecoder
from gptc.tokenizer.native import ByteTokenizer
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


@pytest.mark.parametrize("token", [-1, 256])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(GptcError, match=f"token {token} .* of 256"):
        ByteTokenizer().decode_bytes(np.array([65, token]))
