"""Rounded numbers have the bits of bf16, of float16 and of llama2.c."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from gptc.formats.numbers import BF16, F16, Int8Groups
from small_models import random_values


def test_bf16_rounds_to_even_and_keeps_nan() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001, 0xFF7FFFFF, 0], np.uint32)
    stored = np.frombuffer(BF16.encode(bits.view(np.float32)), np.uint16)
    assert stored.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7FC0, 0xFF80, 0]


def test_narrow_floats_are_ggmls() -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    values = random_values(7, 96) * np.float32(3)
    kind = constants.GGMLQuantizationType
    for ours, theirs in ((BF16, kind.BF16), (F16, kind.F16)):
        expected = quants.quantize(values, theirs)
        assert bytes(ours.encode(values)) == expected.tobytes(), ours.name
        raw = np.frombuffer(expected.tobytes(), np.uint8)
        assert np.array_equal(ours.decode(raw, (7, 96)), quants.dequantize(expected, theirs))


def test_groups_of_int8() -> None:
    values = np.array([[127, -127, 1, 0.5], [0, 0, 0, 0]], np.float32)
    stored = bytes(Int8Groups(4).encode(values))
    assert stored == struct.pack("<8b2f", 127, -127, 1, 0, 0, 0, 0, 0, 1, 0)
    again = Int8Groups(4).decode(np.frombuffer(stored, np.uint8), (2, 4))
    assert again.tolist() == [[127, -127, 1, 0], [0, 0, 0, 0]]
