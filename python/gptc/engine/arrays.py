"""Checks and converts arrays for the engine: contiguous, of its types."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptc.engine import library
from gptc.errors import GptcError

FloatArray = npt.NDArray[np.float32]
TokenArray = npt.NDArray[np.int32]


def as_array(values: npt.ArrayLike, what: str) -> npt.NDArray[Any]:
    """The values as an array. GptcError for lists of different lengths."""
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise GptcError(f"{what} are not an array: {error}") from None


def whole(value: Any, name: str) -> int:
    """An argument that is a whole number. GptcError names it."""
    try:
        return operator.index(value)
    except TypeError:
        raise GptcError(f"{name} is {value!r}; it must be a whole number") from None


def number(value: Any, name: str) -> float:
    """An argument that is a number. GptcError names it."""
    try:
        product: float = value * 1.0  # a text or a list has none
        return product
    except TypeError:
        raise GptcError(f"{name} is {value!r}; it must be a number") from None


def as_tokens(values: npt.ArrayLike, what: str, n_dim: int = 2) -> TokenArray:
    """The values as contiguous int32. GptcError if that would round or wrap any."""
    array = as_array(values, what)
    if array.size and array.dtype.kind not in "iu":
        raise GptcError(f"{what} are {array.dtype}; they must be whole numbers")
    if array.ndim != n_dim or array.size == 0:
        wanted = "(B, T)" if n_dim == 2 else "(N,)"
        each = "" if array.size else ", with one token at least"
        raise GptcError(f"{what} have the shape {array.shape}; it must be {wanted}{each}")
    ids = np.ascontiguousarray(array, np.int32)
    if array.dtype != np.int32 and not np.array_equal(ids, array):
        raise GptcError(f"{what} hold {array.max()}, outside every vocabulary")
    return ids


def as_pair(inputs: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[TokenArray, TokenArray]:
    x, y = as_tokens(inputs, "inputs"), as_tokens(targets, "targets")
    if x.shape != y.shape:
        raise GptcError(f"inputs have the shape {x.shape}, targets {y.shape}; they must agree")
    return x, y


def micro_batches(
    values: npt.ArrayLike | Sequence[npt.ArrayLike], what: str
) -> list[npt.ArrayLike]:
    if isinstance(values, list | tuple):
        if not values:
            raise GptcError(f"{what} are an empty list; pass at least one micro-batch")
        if as_array(values[0], what).ndim == 2:
            return list(values)
    return [values]  # type: ignore[list-item]


def count_targets(targets: npt.ArrayLike) -> int:
    """The number of targets of a micro-batch that are not -1."""
    return int(np.count_nonzero(as_array(targets, "targets") != -1))


def as_parameter(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    """A parameter's values as contiguous float32. GptcError for a wrong shape or dtype."""
    array = as_array(values, f"the values of {name}")
    if array.shape != shape:
        raise GptcError(f"the values of {name} have the shape {array.shape}; it must be {shape}")
    if not np.can_cast(array.dtype, np.float32, "safe"):
        raise GptcError(
            f"the values of {name} are {array.dtype}; they must be float32: .astype('float32')"
        )
    return np.ascontiguousarray(array, np.float32)


def floats(array: FloatArray) -> Any:
    return library.load().ffi.from_buffer("float[]", array)


def ints(array: TokenArray) -> Any:
    return library.load().ffi.from_buffer("int32_t[]", array)
