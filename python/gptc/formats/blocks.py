"""Quantized numbers as GGUF files store them: blocks of 32 or 256 that share scales.

The layouts are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c). A
number is scale * integer, or scale * integer + minimum. In types of 32, scale and minimum are
float16. In types of 256 ("K"), each group of 16 or 32 has an integer scale, and perhaps an integer
minimum, which a float16 of the block multiplies. Decoding gives the bits of ggml's own float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptc.engine.arrays import FloatArray
from gptc.formats import block_encoders as encoders
from gptc.formats.numbers import F16_OVERFLOW, Bytes, Codec

Ints = npt.NDArray[np.uint8]
_NONLINEAR = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32
)


class Blocks(Codec):
    """A type of block: its number in GGUF, its numbers and bytes, and how they are decoded."""

    def __init__(
        self,
        name: str,
        number: int,
        layout: Layout,
        encode: Callable[[FloatArray], memoryview] | None = None,
        overflow: float = np.inf,
    ) -> None:
        super().__init__(name)
        self.number = number
        self.block, self.block_bytes, self.scales_at, self.dequantize = layout
        self.overflow = overflow
        self._encode = encode

    def check(self, raw: Bytes) -> None:
        """ValueError for a scale that is not finite."""
        blocks = raw.reshape(-1, self.block_bytes)
        for at in self.scales_at:
            finite = np.isfinite(_half(blocks, at))
            if not finite.all():
                raise ValueError(f"the scale of block {int(np.argmin(finite)):,} is not finite")

    def decode(self, raw: Bytes, shape: tuple[int, ...]) -> FloatArray:
        self.check(raw)
        return self.dequantize(raw.reshape(-1, self.block_bytes)).reshape(shape)

    def encode(self, values: FloatArray) -> memoryview:
        return super().encode(values) if self._encode is None else self._encode(values)


class Layout(NamedTuple):
    """Numbers and bytes of a block, the bytes at which its float16 begin, and its decoding.

    `dequantize` makes float32 (n, numbers) of bytes (n, n_bytes), also of scales that are not
    finite.
    """

    numbers: int
    n_bytes: int
    scales_at: tuple[int, ...]
    dequantize: Callable[[Bytes], FloatArray]


# ---- parts of blocks ----


def _half(blocks: Bytes, at: int) -> FloatArray:
    """The float16 at a byte of each block: (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _planes(packed: Bytes, width: int, bits: int) -> Ints:
    """Integers of `bits` bits, packed in runs of `width` bytes.

    The lowest bits of a run's bytes are its first `width` integers, the next bits those after them.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes = packed.reshape(len(packed), -1, 1, width) >> shifts & np.uint8((1 << bits) - 1)
    integers: Ints = planes.reshape(len(packed), -1)
    return integers


def _fifth_bits(blocks: Bytes, at: int) -> Ints:
    """Bit i of the 32 at a byte is the fifth of integer i: 0 or 16."""
    bits: Ints = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    bits *= np.uint8(16)
    return bits


def _grouped(
    integers: npt.NDArray[np.float32], scales: FloatArray, minima: FloatArray | None = None
) -> FloatArray:
    """scale * integer - minimum, with a scale and a minimum for each group: (n, groups)."""
    groups = integers.reshape(*scales.shape, -1)
    values = scales[..., None] * groups
    if minima is not None:
        values -= minima[..., None]
    return values.reshape(len(scales), -1)


def _scales_and_minima(blocks: Bytes) -> tuple[FloatArray, FloatArray]:
    """Those of Q4_K and Q5_K, (n, 8) each: 16 integers of 6 bits in 12 bytes."""
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.hstack([first & 63, third & 15 | first >> 2 & 48])
    minima = np.hstack([second & 63, third >> 4 | second >> 2 & 48])
    d, d_min = _half(blocks, 0), _half(blocks, 2)
    return d * scales.astype(np.float32), d_min * minima.astype(np.float32)


# ---- types of 32 numbers ----


def _q4_0(blocks: Bytes) -> FloatArray:
    return _half(blocks, 0) * (_planes(blocks[:, 2:], 16, 4).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> FloatArray:
    return _half(blocks, 0) * _planes(blocks[:, 4:], 16, 4).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> FloatArray:
    integers = _planes(blocks[:, 6:], 16, 4) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (integers.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> FloatArray:
    integers = _planes(blocks[:, 8:], 16, 4) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * integers.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> FloatArray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _iq4_nl(blocks: Bytes) -> FloatArray:
    return _half(blocks, 0) * _NONLINEAR[_planes(blocks[:, 2:], 16, 4)]


# ---- types of 256 numbers ----


def _q2_k(blocks: Bytes) -> FloatArray:
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & 15).astype(np.float32)
    minima = _half(blocks, 82) * (packed >> 4).astype(np.float32)
    return _grouped(_planes(blocks[:, 16:80], 32, 2).astype(np.float32), scales, minima)


def _q3_k(blocks: Bytes) -> FloatArray:
    scales = _planes(blocks[:, 96:104], 8, 4) | _planes(blocks[:, 104:108], 4, 2) << np.uint8(4)
    integers = _planes(blocks[:, 32:96], 32, 2) | _planes(blocks[:, :32], 32, 1) << np.uint8(2)
    scaled = _half(blocks, 108) * (scales.astype(np.float32) - 32)
    return _grouped(integers.astype(np.float32) - 4, scaled)


def _q4_k(blocks: Bytes) -> FloatArray:
    return _grouped(_planes(blocks[:, 16:], 32, 4).astype(np.float32), *_scales_and_minima(blocks))


def _q5_k(blocks: Bytes) -> FloatArray:
    integers = _planes(blocks[:, 48:], 32, 4) | _planes(blocks[:, 16:48], 32, 1) << np.uint8(4)
    return _grouped(integers.astype(np.float32), *_scales_and_minima(blocks))


def _q6_k(blocks: Bytes) -> FloatArray:
    integers = _planes(blocks[:, :128], 64, 4) | _planes(blocks[:, 128:192], 32, 2) << np.uint8(4)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _grouped(integers.astype(np.float32) - 32, scales)


def _iq4_xs(blocks: Bytes) -> FloatArray:
    scales = _planes(blocks[:, 4:8], 1, 4) | _planes(blocks[:, 2:4], 1, 2) << np.uint8(4)
    scaled = _half(blocks, 0) * (scales.astype(np.float32) - 32)
    return _grouped(_NONLINEAR[_planes(blocks[:, 8:], 16, 4)], scaled)


# ---- the table ----

# A scale is at most a number / integer, and twice that where a search fits it.
Q4_0 = Blocks("Q4_0", 2, Layout(32, 18, (0,), _q4_0), encoders.q4_0, 8 * F16_OVERFLOW)
Q5_0 = Blocks("Q5_0", 6, Layout(32, 22, (0,), _q5_0), encoders.q5_0, 16 * F16_OVERFLOW)
Q5_1 = Blocks("Q5_1", 7, Layout(32, 24, (0, 2), _q5_1), encoders.q5_1, F16_OVERFLOW)
Q8_0 = Blocks("Q8_0", 8, Layout(32, 34, (0,), _q8_0), encoders.q8_0, 127 * F16_OVERFLOW)
Q4_K = Blocks("Q4_K", 12, Layout(256, 144, (0, 2), _q4_k), encoders.q4_k, 31 * F16_OVERFLOW)
Q5_K = Blocks("Q5_K", 13, Layout(256, 176, (0, 2), _q5_k), encoders.q5_k, 31 * F16_OVERFLOW)
Q6_K = Blocks("Q6_K", 14, Layout(256, 210, (208,), _q6_k), encoders.q6_k, 2048 * F16_OVERFLOW)
BLOCKS = (
    Q4_0,
    Blocks("Q4_1", 3, Layout(32, 20, (0, 2), _q4_1)),
    Q5_0,
    Q5_1,
    Q8_0,
    Blocks("Q2_K", 10, Layout(256, 84, (80, 82), _q2_k)),
    Blocks("Q3_K", 11, Layout(256, 110, (108,), _q3_k)),
    Q4_K,
    Q5_K,
    Q6_K,
    Blocks("IQ4_NL", 20, Layout(32, 18, (0,), _iq4_nl)),
    Blocks("IQ4_XS", 23, Layout(256, 136, (0,), _iq4_xs)),
)
