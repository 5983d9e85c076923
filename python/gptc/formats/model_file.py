"""A model in any format: its shape, its parameters one at a time, its tokenizer.

Every format derives a class that finds these in its file. The commands that read models (`infer`,
`train --init-from`, `import`, `export`, `verify`) use only this interface.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.engine.library import GPT_ERR_FILE
from gptc.engine.lora import Lora
from gptc.engine.model import Model
from gptc.engine.options import BlockRows
from gptc.errors import EngineError, GptcError, NoTokenizer
from gptc.files.words import quoted
from gptc.formats import families
from gptc.formats.binary import Binary
from gptc.formats.layout import Part, Placement, Stored, Tensors
from gptc.formats.numbers import F32, Bytes, Codec
from gptc.tokenizer.base import Tokenizer

_PIECE = 1 << 18  # numbers: whole blocks of each codec


class Entry(NamedTuple):
    """A tensor's codec, shape and first byte in a file."""

    codec: Codec
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.offset + self.codec.n_bytes(self.shape)


class TensorTable:
    """The tensors of a file by name; their bounds were checked before."""

    def __init__(self, file: Binary, entries: Mapping[str, Entry]) -> None:
        self.file = file
        self.entries = entries

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> FloatArray:
        """One tensor as float32."""
        codec, shape, offset = entry = self.entries[name]
        try:
            if codec.whole:
                return codec.decode(self.file.raw(offset, entry.end - offset), shape)
            # In pieces, so that there is no second copy of narrower numbers.
            values = np.empty(math.prod(shape), np.float32)
            for first in range(0, values.size, _PIECE):
                piece = values[first : first + _PIECE]
                place = offset + codec.n_bytes((first,))
                raw = self.file.raw(place, codec.n_bytes(piece.shape))
                piece[:] = codec.decode(raw, piece.shape)
            return values.reshape(shape)
        except ValueError as error:
            raise self.file.damaged(name, f"cannot be read: {error}", offset) from None

    def blocks(self, name: str) -> Bytes:
        """The bytes of a tensor of blocks, whose scales are finite: (rows, bytes of a row)."""
        codec, shape, offset = entry = self.entries[name]
        raw = self.file.raw(offset, entry.end - offset)
        try:
            codec.check(raw)
        except ValueError as error:
            raise self.file.damaged(name, f"cannot be read: {error}", offset) from None
        return raw.reshape(math.prod(shape[:-1]), -1)

    def stored(self, name: str) -> tuple[Binary, int] | None:
        """Where a tensor of float32 begins in its file; None for other numbers."""
        entry = self.entries[name]
        return (self.file, entry.offset) if entry.codec is F32 else None

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are stored as the same bytes."""
        return same_bytes((self.file, self.entries[one]), (self.file, self.entries[other]))


def same_bytes(one: tuple[Binary, Entry], other: tuple[Binary, Entry]) -> bool:
    """Whether two tensors of files have the same bytes, codec and shape."""
    (file, entry), (other_file, other_entry) = one, other
    n_bytes = entry.end - entry.offset
    return entry[:2] == other_entry[:2] and np.array_equal(
        file.raw(entry.offset, n_bytes), other_file.raw(other_entry.offset, n_bytes)
    )


def import_with_another(path: str | Path) -> str:
    """The end of an error about the tokenizer of a model file: the next command."""
    return f"import it with: gptc import {quoted(path)} --out CKPT --tokenizer KIND"


def merge_first(path: str | Path) -> str:
    """The end of an error about adapters where a model is needed: the next command."""
    return f"merge them first: gptc export -m {quoted(path)} --merge --to hf --out CKPT"


def name_base(path: str | Path) -> str:
    """The end of an error about an adapter without its model: the next commands."""
    return (
        f"name its model with gptc infer -m BASE --adapter {quoted(path)}, or merge it with gptc "
        f"export -m BASE --adapter {quoted(path)} --merge --to hf --out CKPT"
    )


class StoredRows(NamedTuple):
    """Rows of a parameter as a file has them: their type, and their bytes (rows, bytes of a row).

    Rotary channels i and i + HS/2 of a head turn together, as in our parameters.
    """

    codec: Codec
    read: Callable[[], Bytes]


class ModelFile(ABC):
    """A model in some format. Subclasses set `path` and `config`, and find the tensors."""

    format = ""
    path: Path
    config: GPTConfig
    notes: tuple[str, ...] = ()
    """Notes for the user who imports the model."""
    lora: Lora | None = None

    @property
    def begin(self) -> str:
        """The option of a new run with these weights, for errors."""
        if self.lora is None:
            return f"--init-from {quoted(self.path)}"
        merging = f"gptc export -m {quoted(self.path)} --merge --to hf --out CKPT"
        return f"--init-from CKPT after {merging}"

    """The adapters of a file that has them; its base is another file."""
    optimizer_step: int | None = None
    """Number of updates in AdamW's moments; None for a file without moments."""

    @property
    @abstractmethod
    def tensors(self) -> Tensors:
        """The tensors as they are stored."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """The tensors that the model needs, with their rows of its parameters."""

    @cached_property
    def placement(self) -> Placement:
        """The tensors matched with our parameters. GptcError where they do not."""
        return Placement(self.config, self.parts(), self.tensors, str(self.path))

    def read(self, name: str) -> FloatArray:
        """One of our parameters, not to be written to."""
        return self.placement.read(name)

    def read_moment(self, name: str, moment: str) -> FloatArray:
        """AdamW's "m" or "v" of a parameter, where `optimizer_step` is not None."""
        raise GptcError(f"{self.path} holds no optimizer state")

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. GptcError when none is stored with it."""
        raise NoTokenizer(
            f"{self.path} comes without a tokenizer; {import_with_another(self.path)}"
        )

    def types(self) -> dict[str, tuple[int, int]]:
        """Number types of the stored tensors: how many tensors, and their bytes."""
        found: dict[str, tuple[int, int]] = {}
        entries: Mapping[str, Entry] = getattr(self.tensors, "entries", {})  # not those of pickle
        for codec, shape, _ in entries.values():
            count, size = found.get(codec.name, (0, 0))
            found[codec.name] = (count + 1, size + codec.n_bytes(shape))
        return found

    def packing(self) -> tuple[BlockRows, ...]:
        """The matrices that a model can keep as the blocks that they are stored in."""
        return ()

    def stored_rows(self, part: Part) -> StoredRows | None:
        """The rows of a tensor of another file as this one has them; None for those it has not."""
        return None

    def load_into(self, model: Model) -> None:
        """Gives the weights to a model of the same shape."""
        self.give(model, [name for name, _, _ in self.config.parameters()])

    def give(self, model: Model, names: list[str]) -> None:
        """Gives these weights to a model; those to convert are read meanwhile."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            converted = _ahead(pool, self.placement, names)
            for name in names:
                place = self.placement.stored(name)
                if place is None:
                    model.set(name, next(converted))
                else:
                    _lend(model, name, place)

    def check(self) -> list[str]:
        """Reads everything; returns a line for each check. GptcError names the first that fails."""
        for name in self.placement.names:
            check_finite(self.tensors.read(name), f"{self.path}: {name}")
        return [f"{len(self.placement.names)} tensors, every number finite"]


def _ahead(pool: Executor, placement: Placement, names: list[str]) -> Iterator[FloatArray]:
    """The parameters that are not in their file as float32; the next is read meanwhile."""
    wanted = [name for name in names if placement.stored(name) is None]
    # Memory that is used again has its pages already.
    buffers = [np.empty(placement.n_converted, np.float32) for _ in wanted[:2]]
    reads = (pool.submit(placement.read, name, buffers[i % 2]) for i, name in enumerate(wanted))
    coming = next(reads, None)
    while coming is not None:
        values = coming.result()
        coming = next(reads, None)
        yield values


def _lend(model: Model, name: str, place: Stored) -> None:
    """Sets a parameter to the numbers in a file."""
    try:
        model.lend(name, place.file.descriptor, place.offset, place.transposed)
    except EngineError as error:
        if error.status != GPT_ERR_FILE:
            raise
        raise GptcError(f"{place.file.path}: {error}") from None


def check_finite(values: FloatArray, where: str) -> None:
    """GptcError when an array holds NaN or infinity."""
    finite = np.isfinite(values)
    if not finite.all():
        at = int(np.argmin(finite))
        raise GptcError(f"{where} holds {values.reshape(-1)[at]} at index {at:,}")


def checked(config: Mapping[str, Any], where: str) -> GPTConfig:
    """The config of these values. GptcError names the file and the field that is impossible."""
    try:
        made = GPTConfig.from_dict(config)
        made.check()
    except GptcError as error:
        raise GptcError(f"{where}: {error}") from error
    return made


def gpt2_values(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The config of GPT-2's own shape, for files that name its sizes alone.

    `sizes` has vocab_size, block_size, n_layer, n_head and n_embd, and bias where models differ.
    """
    return {
        "n_kv_head": sizes["n_head"],
        "n_ff": 4 * sizes["n_embd"],
        "norm": "layernorm",
        "norm_weight": True,
        "pos": "learned",
        "activation": "gelu",
        "bias": True,
        "tied": True,
        "norm_eps": 1e-5,
        "rope_theta": 0.0,
        **sizes,
    }


def elsewhere(config: GPTConfig) -> str:
    """The formats that can hold a model that another one refused."""
    return "hf or gguf" if families.of(config) else "hf"


def laid_out(
    slots: Iterable[tuple[str, Codec, tuple[int, ...]]], start: int
) -> tuple[dict[str, Entry], int]:
    """Tensors that follow one another from `start` on, and the end of the last."""
    entries = {}
    for name, codec, shape in slots:
        entries[name] = Entry(codec, shape, start)
        start = entries[name].end
    return entries, start


def check_size(file: Binary, expected: int, what: str) -> None:
    """GptcError unless a file has exactly the size that its header promises."""
    if file.size != expected:
        raise GptcError(
            f"{file.path} is damaged: its header promises {what}, {expected:,} bytes, and it has "
            f"{file.size:,}; copy the file again"
        )
