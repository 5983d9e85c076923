"""Blocks of GGUF files are decoded to the bits that ggml computes.

The class of fault: a nibble, a bit of an integer or of a scale at another place, a sign, an order
of operations that rounds otherwise; a scale that is not finite taken for a number.
"""

from __future__ import annotations

import numpy as np
import pytest

from gptc.formats.blocks import BLOCKS, Q4_0, Q8_0, Blocks
from small_models import random_values

BY_NAME = {kind.name: kind for kind in BLOCKS}


def half(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


def decoded(name: str, block: list[int]) -> list[float]:
    kind = BY_NAME[name]
    return kind.decode(np.array(block, np.uint8), (kind.block,)).tolist()


# ---- by hand, from the layouts in ggml's sources ----


def test_types_of_32() -> None:
    nibbles = [i | (15 - i) << 4 for i in range(16)]  # 0 to 15, then 15 to 0
    there_and_back = [*range(16), *range(15, -1, -1)]
    fifths = [0xAA] * 4  # of the odd integers
    fives = [n + 16 * (i % 2) for i, n in enumerate(there_and_back)]
    assert decoded("Q4_0", half(0.5) + nibbles) == [0.5 * (n - 8) for n in there_and_back]
    assert decoded("Q4_1", half(2) + half(-3) + nibbles) == [2 * n - 3 for n in there_and_back]
    assert decoded("Q5_0", half(-1) + fifths + nibbles) == [16 - n for n in fives]
    assert decoded("Q5_1", half(2) + half(5) + fifths + nibbles) == [2 * n + 5 for n in fives]
    bytes_ = [(i * 8 - 128) % 256 for i in range(32)]
    assert decoded("Q8_0", half(0.25) + bytes_) == [0.25 * (i * 8 - 128) for i in range(32)]
    steps = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    assert decoded("IQ4_NL", half(1) + nibbles) == steps + steps[::-1]


def test_scales_of_q4_k_and_q5_k() -> None:
    """Scales and minima of 6 bits: the upper two of the last four are above those of the first."""
    scales, minima = [1, 2, 3, 63, 4, 37, 62, 63], [5, 6, 7, 63, 8, 21, 43, 62]
    first = [scales[i] | scales[i + 4] >> 4 << 6 for i in range(4)]
    second = [minima[i] | minima[i + 4] >> 4 << 6 for i in range(4)]
    third = [scales[i + 4] & 15 | (minima[i + 4] & 15) << 4 for i in range(4)]
    packed = half(0.5) + half(2) + first + second + third
    nibbles = [9 | 6 << 4] * 128  # groups take lower and upper nibbles in turn
    expected = [0.5 * scales[g] * (6 if g % 2 else 9) - 2 * minima[g] for g in range(8)]
    assert decoded("Q4_K", packed + nibbles)[::32] == expected
    fifths = [0b10100101] * 32  # of groups 0, 2, 5 and 7
    expected = [
        0.5 * scales[g] * ((6 if g % 2 else 9) + 16 * (g in (0, 2, 5, 7))) - 2 * minima[g]
        for g in range(8)
    ]
    assert decoded("Q5_K", packed + fifths + nibbles)[::32] == expected


def test_q2_k_q3_k_and_q6_k() -> None:
    scales = [i | (15 - i) << 4 for i in range(16)]
    two_bits = [0b11100100] * 64  # 0, 1, 2, 3 for four groups of 32, and again
    expected = [2 * g * (g // 2 % 4) - (15 - g) for g in range(16)]
    assert decoded("Q2_K", scales + two_bits + half(2) + half(1))[::16] == expected

    wanted = [-32, -1, 0, 31, 5, -7, 12, 1, 2, 3, 4, -20, -21, 30, 17, -16]
    stored = [s + 32 for s in wanted]
    lower = [stored[i] & 15 | (stored[i + 8] & 15) << 4 for i in range(8)]
    upper = [sum((stored[i + 4 * k] >> 4) << 2 * k for k in range(4)) for i in range(4)]
    mask = [0b00001111] * 32  # of the first four groups of 32: those without it are 4 less
    expected = [s * (g // 2 % 4 - (0 if g < 8 else 4)) for g, s in enumerate(wanted)]
    assert decoded("Q3_K", mask + two_bits + lower + upper + half(1))[::16] == expected

    nibbles, signed = [3 | 12 << 4] * 128, [(17 * i - 128) % 256 for i in range(16)]
    integers = [(3 if g // 4 % 2 == 0 else 12) + 16 * (g // 2 % 4) - 32 for g in range(16)]
    expected = [0.5 * (17 * g - 128) * n for g, n in enumerate(integers)]
    assert decoded("Q6_K", nibbles + two_bits + signed + half(0.5))[::16] == expected


def test_iq4_xs() -> None:
    scales = [-32, 31, 0, 7, -9, 15, 16, -17]
    stored = [s + 32 for s in scales]
    lower = [stored[2 * i] & 15 | (stored[2 * i + 1] & 15) << 4 for i in range(4)]
    upper = [sum((stored[i + 4 * k] >> 4) << 2 * i for i in range(4)) for k in range(2)]
    nibbles = [0 | 15 << 4] * 128  # -127 and 113, sixteen of each
    got = decoded("IQ4_XS", half(2) + upper + lower + nibbles)
    assert got[::32] == [-254 * s for s in scales]
    assert got[16::32] == [226 * s for s in scales]


# ---- against the package gguf ----


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_random_bytes_are_decoded_as_by_the_package_gguf(kind: Blocks) -> None:
    """Any bytes: a scale may be negative, zero, subnormal, infinite or not a number."""
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    theirs = constants.GGMLQuantizationType(kind.number)
    assert theirs.name == kind.name
    assert constants.GGML_QUANT_SIZES[theirs] == (kind.block, kind.block_bytes)
    raw = np.random.default_rng(kind.number).integers(0, 256, (4000, kind.block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        expected, got = quants.dequantize(raw, theirs), kind.dequantize(raw)
    assert np.isnan(expected).any()
    assert np.isfinite(expected).mean() > 0.5
    assert np.array_equal(np.isnan(expected), np.isnan(got))
    numbers = ~np.isnan(expected)
    assert np.array_equal(expected[numbers].view(np.uint32), got[numbers].view(np.uint32))


@pytest.mark.parametrize("kind", [Q8_0, Q4_0], ids=lambda kind: kind.name)
def test_encoding_is_that_of_the_package_gguf(kind: Blocks) -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    values = random_values(7, 96) * np.float32(3)
    values[0, :32] = 0
    theirs = constants.GGMLQuantizationType(kind.number)
    assert bytes(kind.encode(values)) == quants.quantize(values, theirs).tobytes()


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_not_finite_is_an_error(kind: Blocks, bad: float) -> None:
    for at in kind.scales_at:
        raw = np.zeros((5, kind.block_bytes), np.uint8)
        kind.check(raw)
        raw[3, at : at + 2] = half(bad)
        with pytest.raises(ValueError, match="the scale of block 3 is not finite"):
            kind.decode(raw.reshape(-1), (5 * kind.block,))
