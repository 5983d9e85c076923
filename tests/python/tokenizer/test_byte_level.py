"""gptc.tokenizer.byte_level: bytes as characters."""

from __future__ import annotations

import pytest

from gptc.tokenizer.byte_level import to_bytes, to_characters
from gptc.tokenizer.native import byte_characters


def test_each_byte_comes_back_and_no_other_character_is_one() -> None:
    byte_of = byte_characters()
    assert to_bytes(to_characters(bytes(range(256)))) == bytes(range(256))
    for char in map(chr, [*range(600), 0x2581, 0xFFFD, 0x1F600]):
        if char in byte_of:
            assert to_bytes(char) == bytes([byte_of[char]])
            continue
        with pytest.raises(ValueError, match=r"^a"):
            to_bytes(f"a{char}")
