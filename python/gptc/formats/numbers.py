"""How files write numbers: floats of four widths, and integers that share a scale.

A codec turns bytes into float32 and back. Where rounding is needed it is to the nearest, ties to
even, as processors do. blocks.py has the quantized types of GGUF files.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from gptc.engine.arrays import FloatArray
from gptc.errors import GptcError

Bytes = npt.NDArray[np.uint8]
F16_OVERFLOW = 65520.0  # halfway from the largest number, 65504, to 2^16


class Codec(ABC):
    """Numbers in a row of bytes, in blocks of `block` numbers that take `block_bytes` each."""

    block = 1
    block_bytes = 4
    overflow = math.inf
    """The least magnitude that becomes infinite."""
    whole = False
    """Whether a tensor is decoded at once, since its bytes are not in order or are the numbers."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of this shape are whole blocks."""
        return self.block == 1 or (len(shape) > 0 and shape[-1] % self.block == 0)

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor; Python's integers do not overflow."""
        return math.prod(shape) // self.block * self.block_bytes

    def check(self, raw: Bytes) -> None:  # noqa: B027
        """ValueError for a scale that is not finite."""

    @abstractmethod
    def decode(self, raw: Bytes, shape: tuple[int, ...]) -> FloatArray:
        """float32 of this shape. ValueError for a scale that is not finite."""

    def encode(self, values: FloatArray) -> memoryview:
        """The bytes of `values`, for the formats that gptc writes."""
        raise NotImplementedError


class Float(Codec):
    """IEEE numbers. float32 is not copied."""

    def __init__(self, name: str, dtype: str, overflow: float = math.inf) -> None:
        super().__init__(name)
        self.overflow = overflow
        self.dtype = np.dtype(dtype)
        self.whole = self.dtype == np.float32
        self.block_bytes = self.dtype.itemsize

    def decode(self, raw: Bytes, shape: tuple[int, ...]) -> FloatArray:
        with np.errstate(over="ignore"):
            values = raw.view(self.dtype).reshape(shape).astype(np.float32, copy=False)
        return np.require(values, requirements=["C", "A"])

    def encode(self, values: FloatArray) -> memoryview:
        with np.errstate(over="ignore"):
            return to_bytes(values.astype(self.dtype, copy=False))


class BFloat16(Codec):
    """The upper halves of float32."""

    block_bytes = 2
    overflow = float.fromhex("0x1.ffp127")  # halfway from the largest number to the next power of 2

    def decode(self, raw: Bytes, shape: tuple[int, ...]) -> FloatArray:
        wide = raw.view("<u2").reshape(shape).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)

    def encode(self, values: FloatArray) -> memoryview:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
        quiet = bits >> 16 | 0x40  # rounding could turn NaN into infinity
        return to_bytes(np.where(np.isnan(values), quiet, rounded).astype("<u2"))


class Int8Groups(Codec):
    """llama2.c's version 2: all int8 of a tensor, then a float32 for each group of them."""

    def __init__(self, group: int) -> None:
        super().__init__(f"int8 in groups of {group}")
        self.block = group
        self.block_bytes = group + 4
        self.whole = True

    def fits(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) % self.block == 0  # groups may cross rows

    def decode(self, raw: Bytes, shape: tuple[int, ...]) -> FloatArray:
        n = math.prod(shape)
        quanta = raw[:n].view(np.int8).reshape(-1, self.block)
        scales = raw[n:].view("<f4").reshape(-1, 1)
        _check_finite(scales)
        return _product(scales, quanta, shape)

    def encode(self, values: FloatArray) -> memoryview:
        quanta, scales = quantize(values, self.block, half_to_even=True)
        return to_bytes(np.concatenate([quanta.reshape(-1).view(np.uint8), scales.view(np.uint8)]))


F32 = Float("F32", "<f4")
F64 = Float("F64", "<f8")
F16 = Float("F16", "<f2", F16_OVERFLOW)
BF16 = BFloat16("BF16")


def encoded(codec: Codec, values: FloatArray, name: str) -> memoryview:
    """The bytes of a tensor. GptcError when a number of it would become infinite."""
    if codec.overflow < math.inf or codec.block > 1:
        largest = float(np.abs(values).max(initial=0))
        if math.isnan(largest):
            raise GptcError(f"{name} holds nan, which {codec.name} does not round to a number")
        if not largest < codec.overflow:
            raise GptcError(
                f"{name} holds {largest:g}, which {codec.name} cannot hold: choose a --dtype of a "
                "wider range, such as fp32"
            )
    return codec.encode(values)


def _product(
    scales: FloatArray, quanta: npt.NDArray[np.int8], shape: tuple[int, ...]
) -> FloatArray:
    """Each block's scale times its integers."""
    with np.errstate(over="ignore"):
        return (scales * quanta.astype(np.float32)).reshape(shape)


def _check_finite(scales: npt.NDArray[Any]) -> None:
    if not np.isfinite(scales).all():
        raise ValueError(f"scale {int(np.argmin(np.isfinite(scales)))} is not finite")


def quantize(
    values: FloatArray, group: int, half_to_even: bool = False
) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """int8 (n, group) and their scales (n,): the largest of a group becomes 127."""
    rows = values.reshape(-1, group)
    scales = (np.abs(rows).max(axis=1) / np.float32(127)).astype(np.float32)
    if half_to_even:  # as torch.round does
        with np.errstate(divide="ignore", invalid="ignore"):
            quanta = np.rint(np.where(scales[:, None] > 0, rows / scales[:, None], 0))
    else:  # as C's roundf of a product with the reciprocal
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / scales
        inverse[~np.isfinite(inverse)] = 0
        scaled = rows * inverse[:, None]
        quanta = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    return np.clip(quanta, -127, 127).astype(np.int8), scales


def to_bytes(values: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
