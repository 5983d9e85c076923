"""The place of a file's tensors in our parameters: each conversion of convention, once.

Our linear weights are (out, in); query, key and value rows are one matrix, and so are SwiGLU's gate
and up rows; rotary channels i and i + HS/2 of a head turn together. Others differ in four ways:

- Conv1D: matrices of layers are (in, out);
- split rows: a tensor for each of query, key and value, or of gate and up;
- pairs: rotary channels 2i and 2i + 1 turn together, so that rows of queries and keys are permuted,
  of each head all or the first;
- padding: rows of zeros after those of the vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.binary import Binary

_Rows = TypeVar("_Rows", bound=npt.NDArray[Any])


class Part(NamedTuple):
    """A tensor of a file, and the rows of our parameter that it holds."""

    name: str
    ours: str
    shape: tuple[int, ...]  # in the file
    rows: slice
    transposed: bool = False
    heads: int = 0  # so many heads, in each of which rotary channels are paired in the file
    interleaved: int = 0  # so many heads, each with its queries, keys and values in turn
    minus_one: bool = False  # the file has the numbers minus 1
    turned: int = 0  # so many channels of each of `heads` are in pairs, the first of them; 0: all

    @property
    def is_converted(self) -> bool:
        """Whether the file has other rows or numbers than the parameter."""
        return bool(self.transposed or self.heads or self.interleaved or self.minus_one)


class Tensors(Protocol):
    """Named tensors to read, as float32."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> FloatArray: ...

    def stored(self, name: str) -> tuple[Binary, int] | None:
        """Where a tensor of float32 begins in its file; None for other numbers."""
        ...

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are stored as the same numbers."""
        ...


class Stored(NamedTuple):
    """The place of a parameter in a file that has it as float32, perhaps column by column."""

    file: Binary
    offset: int
    transposed: bool


class Naming(NamedTuple):
    """How a format names and cuts our parameters.

    `names` goes from a parameter without its layer ("attn.qkv.weight") to the file's tensors, in
    which {} is the layer, and a second one the expert.
    """

    names: Mapping[str, tuple[str, ...]]
    conv1d: bool = False
    conv1d_lead: tuple[int, ...] = ()  # axes of 1 before those of such a matrix
    paired: bool = False
    interleaved: bool = False  # rows of queries, keys and values head by head, in one tensor
    norms_from_one: bool = False  # weights of norms minus 1


def with_leaves(
    stems: Mapping[str, str] | Mapping[str, str | tuple[str, ...]],
    leaves: Iterable[str] = ("weight", "bias"),
) -> dict[str, tuple[str, ...]]:
    """Names of weights and biases, where theirs end as ours do."""
    several = {ours: (t,) if isinstance(t, str) else t for ours, t in stems.items()}
    return {
        f"{ours}.{leaf}": tuple(f"{name}.{leaf}" for name in names)
        for ours, names in several.items()
        for leaf in leaves
    }


def parts(config: GPTConfig, naming: Naming, padded_vocab: int = 0) -> list[Part]:
    """The tensors that a format keeps this model in, in the order of our parameters."""
    found = []
    for ours, shape, _ in config.parameters():
        layer = re.match(r"h\.(\d+)\.(.*)", ours)
        expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(.*)", layer[2]) if layer else None
        own = f"mlp.experts.{expert[2]}" if expert else layer[2] if layer else ours
        names = naming.names.get(own)
        if names is None:
            raise GptcError(f"this format has no place for {ours}")
        start = 0
        for name, size, heads in zip(names, *_cuts(config, names, shape[0]), strict=True):
            rows = slice(start, start + size)
            start += size
            full = name.format(layer[1], expert and expert[1]) if layer else name
            file_shape = (size, *shape[1:])
            turned = naming.conv1d and layer is not None and len(shape) == 2
            if turned:
                file_shape = (*naming.conv1d_lead, *file_shape[::-1])
            elif ours in ("wte.weight", "lm_head.weight") and padded_vocab:
                file_shape = (padded_vocab, *shape[1:])
            heads = heads if naming.paired else 0
            mixed = config.n_head if naming.interleaved and own.startswith("attn.qkv.") else 0
            minus_one = naming.norms_from_one and re.search(r"norm\w*\.weight$", own) is not None
            place = Part(full, ours, file_shape, rows, turned, heads, mixed, minus_one)
            found.append(place._replace(turned=config.rope_dim) if heads else place)
    return found


def _cuts(config: GPTConfig, names: tuple[str, ...], n_rows: int) -> tuple[list[int], list[int]]:
    """Rows of each of a parameter's tensors, and the heads in them that are rotated."""
    if len(names) == 1:
        return [n_rows], [0]
    if len(names) == 2:  # gate and up
        return [config.n_ff] * 2, [0, 0]
    kv = config.n_kv_head * config.head_size
    return [n_rows - 2 * kv, kv, kv], [config.n_head, config.n_kv_head, 0]


# ---- ours to theirs ----


def export_tensor(part: Part, parameter: FloatArray) -> FloatArray:
    """The file's tensor, from our whole parameter."""
    values = parameter[part.rows]
    if part.interleaved:
        values = swap_heads(values, 3, part.interleaved)
    if part.minus_one:
        values = values - 1
    if part.heads:
        values = halves_to_pairs(values, part.heads, part.turned)
    if part.transposed:
        values = values.T
    elif values.shape[0] < part.shape[0]:
        padding = np.zeros((part.shape[0] - values.shape[0], *values.shape[1:]), np.float32)
        values = np.concatenate([values, padding])
    return np.ascontiguousarray(values).reshape(part.shape)


def halves_to_pairs(rows: _Rows, heads: int, turned: int = 0) -> _Rows:
    """Rows i and i + HS/2 of each head become 2i and 2i + 1. They may be numbers or bytes.

    With `turned`, the first so many rows of a head take the place of all HS.
    """
    return _reordered(rows, heads, turned, lambda n: np.arange(n).reshape(2, -1).T.ravel())


def swap_heads(rows: _Rows, outer: int, inner: int) -> _Rows:
    """Runs of rows (outer, inner) become (inner, outer). They may be numbers or bytes."""
    runs = rows.reshape(outer, inner, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)
    return cast(_Rows, runs)


# ---- theirs to ours ----


def import_tensor(part: Part, tensor: FloatArray, out: FloatArray) -> None:
    """Puts the file's tensor into its rows of our parameter."""
    n_rows = part.rows.stop - part.rows.start
    values = tensor.reshape(part.shape[-out.ndim :])
    if part.transposed:
        _transpose(values, out[part.rows])
        return
    values = values[:n_rows]
    if part.interleaved:
        values = swap_heads(values, part.interleaved, 3)
    if part.minus_one:
        values = values + 1
    out[part.rows] = pairs_to_halves(values, part.heads, part.turned) if part.heads else values


def pairs_to_halves(rows: _Rows, heads: int, turned: int = 0) -> _Rows:
    """Rows 2i and 2i + 1 of each head become i and i + HS/2. They may be numbers or bytes.

    With `turned`, the first so many rows of a head take the place of all HS.
    """
    return _reordered(rows, heads, turned, lambda n: np.arange(n).reshape(-1, 2).T.ravel())


def _reordered(
    rows: _Rows, heads: int, turned: int, order: Callable[[int], npt.NDArray[Any]]
) -> _Rows:
    """The first `turned` rows of each head in another order."""
    by_head = rows.reshape(heads, -1, *rows.shape[1:])
    turned = turned or by_head.shape[1]
    first = by_head[:, order(turned)]
    return cast(_Rows, np.concatenate([first, by_head[:, turned:]], axis=1).reshape(rows.shape))


def _transpose(values: FloatArray, out: FloatArray) -> None:
    """out = values.T, in strips that stay in cache."""
    n_rows, n_columns = values.shape
    step, line = 64, 16
    # Rows a cache line further apart: columns of powers of two would all fall into the same sets.
    strip = np.empty((step, n_columns + line), np.float32)[:, :n_columns]
    for i in range(0, n_rows, step):
        rows = strip[: n_rows - i]
        rows[:] = values[i : i + step]
        out[:, i : i + step] = rows.T


class Placement:
    """The tensors of a file, matched with the parameters of a model."""

    def __init__(
        self,
        config: GPTConfig,
        file_parts: Iterable[Part],
        tensors: Tensors,
        where: str,
        aliases: Mapping[str, str] | None = None,
        ignored: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """`aliases` gives the names in the file where they differ from those of the parts.

        A tensor that is missing, has another shape, or belongs to no parameter is a GptcError.
        """
        self._tensors = tensors
        self._shapes = {name: shape for name, shape, _ in config.parameters()}
        self._placed: dict[str, list[tuple[Part, str]]] = {name: [] for name in self._shapes}
        self.names: list[str] = []  # of the tensors that the model is made of, in the file
        shapes, used = tensors.shapes, set()
        for part in file_parts:
            name = (aliases or {}).get(part.name, part.name)
            if name not in shapes:
                raise GptcError(
                    f"{where} lacks the tensor {part.name}{_similar(part.name, shapes)}"
                )
            if tuple(shapes[name]) != part.shape:
                raise GptcError(
                    f"{where}: {name} has the shape {tuple(shapes[name])}, not {part.shape}"
                )
            used.add(name)
            self.names.append(name)
            self._placed[part.ours].append((part, name))
        for name in shapes:
            if name not in used and not ignored(name):
                raise GptcError(f"{where} holds {name}, which its model lacks")

    def read(self, ours: str, buffer: FloatArray | None = None) -> FloatArray:
        """One of our parameters. It may be shared: it is not to be written to.

        One that is converted is written to `buffer`, if that is given: see `n_converted`.
        """
        shape, placed = self._shapes[ours], self._placed[ours]
        if name := self._as_it_is(ours):
            return self._tensors.read(name)[: shape[0]]  # without padding
        if buffer is None:
            buffer = np.empty(math.prod(shape), np.float32)
        out = buffer[: math.prod(shape)].reshape(shape)
        for part, name in placed:
            import_tensor(part, self._tensors.read(name), out)
        return out

    @property
    def n_converted(self) -> int:
        """The numbers of the largest parameter that is not in the file as it is."""
        converted = (shape for ours, shape in self._shapes.items() if not self._as_it_is(ours))
        return max(map(math.prod, converted), default=0)

    def stored(self, ours: str) -> Stored | None:
        """Where a parameter is in a file as float32, if one tensor is all of it."""
        (part, name), *others = self._placed[ours]
        is_other = others or part.heads or part.interleaved or part.minus_one
        place = None if is_other else self._tensors.stored(name)
        return None if place is None else Stored(*place, part.transposed)

    def parts(self, ours: str) -> list[tuple[Part, str]]:
        """The tensors that make up a parameter, in the order of its rows, by their names."""
        return self._placed[ours]

    def _as_it_is(self, ours: str) -> str | None:
        """The tensor that is a parameter, perhaps with padding; None where it is converted."""
        (part, name), *others = self._placed[ours]
        return None if others or part.is_converted else name


def _similar(name: str, names: Iterable[str]) -> str:
    """The end of an error about a missing tensor, where it is there with more before its name."""
    longer = next((other for other in names if other.endswith(f".{name}")), None)
    if longer is None:
        return ""
    prefix = longer.removesuffix(name)
    return f": it holds {longer}, so save the model again without {prefix} before the names"


# ---- the order of tensors in a file ----


def in_order(file_parts: Iterable[Part], order: Sequence[str]) -> list[Part]:
    """The parts as `order` names them, where {} is the layer; all layers of one in turn."""
    return sorted(file_parts, key=lambda part: order.index(_kind(part.name)))


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{}.", name, count=1)
