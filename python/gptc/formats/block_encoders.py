"""Numbers into the quantized blocks of GGUF files, whose layouts blocks.py describes.

In types of 256, scales and minima are searched for as llama.cpp's quantizer does
(https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c): each candidate rounds a group's
numbers to integers, least squares fit a scale (and a minimum) to them, and the least error wins.
Types of 32 take their scale from the largest number of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gptc.engine.arrays import FloatArray
from gptc.formats.numbers import Bytes, quantize, to_bytes

_Integers = npt.NDArray[np.uint8]
_NIBBLE = np.uint8(15)
_LEAST = np.float32(1e-30)  # far below what float16 holds; its reciprocal is finite
_PIECE = 256  # blocks: the arrays of a search stay in a core's cache


def _halves(scales: FloatArray) -> Bytes:
    return scales.astype("<f2").view(np.uint8).reshape(-1, 2)


def _inverse(scales: FloatArray) -> FloatArray:
    """1 / scales, and 0 where a scale is 0 in float16."""
    zero = np.abs(scales) < _LEAST
    inverse: FloatArray = np.float32(1) / np.where(zero, np.float32(1), scales)
    inverse[zero] = 0
    return inverse


def _packed(integers: _Integers, width: int, bits: int) -> Bytes:
    """The inverse of blocks.py's `_planes`: (n, integers) in runs of `width` bytes."""
    planes = integers.reshape(len(integers), -1, 8 // bits, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs: Bytes = np.bitwise_or.reduce(planes << shifts, axis=2)
    return runs.reshape(len(integers), -1)


def _fifths(integers: _Integers) -> Bytes:
    """The fifth bits of 32 integers a row, in 4 bytes."""
    return np.packbits(integers >> 4, axis=1, bitorder="little")


# ---- types of 32 numbers ----


def q8_0(values: FloatArray) -> memoryview:
    """A scale makes 127 of the largest magnitude."""
    quanta, scales = quantize(values, 32)
    return to_bytes(np.hstack([_halves(scales), quanta.view(np.uint8)]))


def _around_zero(values: FloatArray, bits: int) -> tuple[Bytes, _Integers]:
    """Scales as bytes, and integers from 0 to 2^bits - 1."""
    rows, middle = values.reshape(-1, 32), 1 << bits - 1
    # The largest number becomes the lowest integer, whatever its sign: no step is wasted.
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    scales = (largest / np.float32(-middle)).astype(np.float32)
    steps = np.trunc(rows.astype(np.float64) * _inverse(scales) + (middle + 0.5))
    return _halves(scales), np.clip(steps, 0, 2 * middle - 1).astype(np.uint8)


def q4_0(values: FloatArray) -> memoryview:
    """Integers of 4 bits, less 8."""
    scales, integers = _around_zero(values, 4)
    return to_bytes(np.hstack([scales, _packed(integers, 16, 4)]))


def q5_0(values: FloatArray) -> memoryview:
    """Integers of 5 bits, less 16."""
    scales, integers = _around_zero(values, 5)
    return to_bytes(np.hstack([scales, _fifths(integers), _packed(integers & _NIBBLE, 16, 4)]))


def q5_1(values: FloatArray) -> memoryview:
    """Integers of 5 bits above a minimum."""
    rows = values.reshape(-1, 32)
    least = rows.min(axis=1, keepdims=True)
    scales = ((rows.max(axis=1, keepdims=True) - least) / np.float32(31)).astype(np.float32)
    steps = np.trunc((rows - least) * _inverse(scales) + np.float32(0.5))
    integers = np.clip(steps, 0, 31).astype(np.uint8)
    parts = [_halves(scales), _halves(least), _fifths(integers), _packed(integers & _NIBBLE, 16, 4)]
    return to_bytes(np.hstack(parts))


# ---- types of 256 numbers ----


def _in_pieces(encode: Callable[[FloatArray], Bytes], values: FloatArray) -> memoryview:
    """Blocks of 256, so many at a time."""
    rows = values.reshape(-1, 256)
    pieces = [encode(rows[i : i + _PIECE]) for i in range(0, len(rows), _PIECE)]
    return to_bytes(np.concatenate(pieces))


def _dot(a: FloatArray, b: FloatArray) -> FloatArray:
    """Sums over the first axis of a product."""
    sums: FloatArray = np.einsum("ig,ig->g", a, b)
    return sums


def _scale_and_minimum(
    x: FloatArray, levels: int, first: float, n_steps: int
) -> tuple[FloatArray, FloatArray]:
    """Scales and minima, at least 0, so that scale * integer - minimum is near x (32, groups).

    Errors count as much as the mean and the own magnitude of a number. Candidates spread the range
    over `levels` + `first`, and 0.1 more at each step, before integers end at `levels`.
    """
    weights = np.sqrt(np.mean(np.square(x), axis=0)) + np.abs(x)
    weighted = weights * x
    sum_w, sum_x, sum_xx = weights.sum(axis=0), weighted.sum(axis=0), _dot(weighted, x)
    high, low = x.max(axis=0), np.minimum(x.min(axis=0), np.float32(0))
    best, scales = np.full(len(low), np.inf, np.float32), np.zeros_like(low)
    steps = np.empty_like(x)
    for i in range(-1, n_steps + 1):
        wide = np.float32(levels + (first + 0.1 * i if i >= 0 else 0))
        per_step = wide * _inverse(high - low)
        np.subtract(x, low, out=steps)
        np.multiply(steps, per_step, out=steps)
        np.clip(np.rint(steps, out=steps), 0, levels, out=steps)
        sum_l, sum_xl = _dot(weights, steps), _dot(weighted, steps)
        sum_ll = np.einsum("ig,ig,ig->g", weights, steps, steps)
        if i < 0:  # what the largest and the least number give
            scale, minimum = _inverse(per_step), low
        else:
            scale, minimum = _fitted(sum_w, sum_x, sum_l, sum_ll, sum_xl)
        error = (
            sum_xx
            + scale * (scale * sum_ll - 2 * sum_xl)
            + minimum * (minimum * sum_w + 2 * scale * sum_l - 2 * sum_x)
        )
        better = error < best  # the next candidate begins at the best minimum
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
        low = np.where(better, minimum, low)
    return scales, -low


def _fitted(
    sum_w: FloatArray, sum_x: FloatArray, sum_l: FloatArray, sum_ll: FloatArray, sum_xl: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The least squares of scale * l + minimum - x, where the minimum is at most 0."""
    with np.errstate(all="ignore"):  # integers that are all the same have no fit: NaN
        determinant = sum_w * sum_ll - sum_l * sum_l
        scale: FloatArray = np.divide(sum_w * sum_xl - sum_x * sum_l, determinant)
        minimum: FloatArray = np.divide(sum_ll * sum_x - sum_l * sum_xl, determinant)
        positive = minimum > 0
        scale[positive], minimum[positive] = sum_xl[positive] / sum_ll[positive], 0
    return scale, minimum


def _with_minima(rows: FloatArray, bits: int, first: float, n_steps: int) -> Bytes:
    """Q4_K and Q5_K: 8 groups of 32 with scales and minima of 6 bits."""
    levels = (1 << bits) - 1
    groups = rows.reshape(-1, 8, 32)
    x = np.ascontiguousarray(groups.reshape(-1, 32).T)
    found = (part.reshape(-1, 8) for part in _scale_and_minimum(x, levels, first, n_steps))
    parts, stored = [], []
    for values in found:
        largest = values.max(axis=1, keepdims=True)
        sixths = np.minimum(np.rint(values * (63 * _inverse(largest))), 63)
        parts.append(_halves((largest / np.float32(63)).astype(np.float32)))
        stored.append((sixths.astype(np.uint8), parts[-1].view("<f2").astype(np.float32) * sixths))
    (scales, scale), (minima, minimum) = stored
    steps = np.rint((groups + minimum[..., None]) * _inverse(scale)[..., None])
    integers = np.clip(steps, 0, levels).astype(np.uint8).reshape(len(rows), 256)
    parts += [
        scales[:, :4] | scales[:, 4:] >> 4 << 6,
        minima[:, :4] | minima[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | minima[:, 4:] << 4,
    ]
    if bits == 5:
        parts.append(_packed(integers >> 4, 32, 1))
    return np.hstack([*parts, _packed(integers & _NIBBLE, 32, 4)])


def q4_k(values: FloatArray) -> memoryview:
    """Integers of 4 bits in groups of 32 with scales and minima of 6 bits."""
    return _in_pieces(lambda rows: _with_minima(rows, 4, -1.0, 20), values)


def q5_k(values: FloatArray) -> memoryview:
    """Integers of 5 bits in groups of 32 with scales and minima of 6 bits."""
    return _in_pieces(lambda rows: _with_minima(rows, 5, -0.5, 15), values)


def _scale(x: FloatArray, middle: int) -> FloatArray:
    """Scales so that scale * integer is near x (n, groups); integers are -middle to middle - 1.

    Errors count as much as the square of a number.
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    toward = -_inverse(largest)
    weights = np.square(x)
    weighted = weights * x
    scales: FloatArray = np.zeros_like(largest)
    best, steps = np.zeros_like(largest), np.empty_like(x)
    for i in sorted(range(-9, 10), key=lambda i: i != 0):
        np.multiply(x, np.float32(middle + 0.1 * i) * toward, out=steps)
        np.clip(np.rint(steps, out=steps), -middle, middle - 1, out=steps)
        sum_xl, sum_ll = _dot(weighted, steps), np.einsum("ig,ig,ig->g", weights, steps, steps)
        scale = sum_xl * _inverse(sum_ll)
        gain = scale * sum_xl  # by which the error is less than without numbers
        better = gain > best
        best[better], scales[better] = gain[better], scale[better]
    return scales


def _q6_k(rows: FloatArray) -> Bytes:
    groups = rows.reshape(-1, 16, 16)
    found = _scale(np.ascontiguousarray(groups.reshape(-1, 16).T), 32).reshape(-1, 16)
    largest = np.take_along_axis(found, np.abs(found).argmax(axis=1)[:, None], axis=1)
    halves = _halves((largest / np.float32(-128)).astype(np.float32))
    scales = np.minimum(np.rint(found * (-128 * _inverse(largest))), 127)
    step = _inverse(halves.view("<f2").astype(np.float32) * scales)[..., None]
    integers = (np.clip(np.rint(groups * step), -32, 31) + 32).astype(np.uint8).reshape(-1, 256)
    lower, upper = _packed(integers & _NIBBLE, 64, 4), _packed(integers >> 4, 32, 2)
    blocks: Bytes = np.hstack([lower, upper, scales.astype(np.int8).view(np.uint8), halves])
    return blocks


def q6_k(values: FloatArray) -> memoryview:
    """Integers of 6 bits in groups of 16 with scales of 8 bits."""
    return _in_pieces(_q6_k, values)
