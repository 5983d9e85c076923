"""The interface of a format: how it is recognised, opened and written. registry.py lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from gptc.engine.arrays import FloatArray, TokenArray
from gptc.engine.config import GPTConfig
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.base import Tokenizer


class Trainable(Protocol):
    """A model on a device, as far as a debug state uses it."""

    config: GPTConfig

    def zero_gradients(self) -> None: ...

    def logits(self, inputs: TokenArray, /) -> FloatArray: ...

    def backward(self, inputs: TokenArray, targets: TokenArray, /) -> float: ...

    def read(self, name: str, tensor: str, /) -> FloatArray: ...


@dataclass(frozen=True)
class Export:
    """A request to write a model in a format."""

    model: ModelFile
    path: Path
    dtype: str
    """One of the format's dtypes."""
    tokenizer: Tokenizer | None
    load: Callable[..., AbstractContextManager[Trainable]]
    """Makes the model on a device; takes the options of `Model.create`."""
    version: int | None = None
    debug_state: bool = False
    notes: list[str] = field(default_factory=list)
    """Notes for the user, added by the format."""

    def companion(self, name: str) -> Path:
        """The path where a program looks for the file of that name next to the model."""
        return self.path.with_name(f"{self.path.stem}_{name}.bin")


class Output(NamedTuple):
    """A file to write. Chunks in a list are compared with a file that exists already."""

    path: Path
    chunks: Iterable[bytes | memoryview]


@dataclass(frozen=True)
class Format:
    """A format of model files.

    `detect(path, begin)` tells whether a model of this format is at `path`; `begin` holds the first
    8 bytes of the file, or nothing for a folder. `open(path)` returns the model; GptcError when the
    file is damaged. `write(export)` returns the files to write, the model first; GptcError, at once
    or when the chunks are drawn, when the format cannot hold the model.
    """

    name: str
    title: str
    """The name in help texts."""
    detect: Callable[[Path, bytes], bool]
    open: Callable[..., ModelFile]
    write: Callable[[Export], list[Output]] | None = None
    """None for a format that is only read."""
    dtypes: tuple[str, ...] = ()
    """Number formats that `write` accepts; the first is the default."""
    options: tuple[str, ...] = ()
    """Further fields of Export that `write` uses: "version", "debug_state"."""
    companions: tuple[str, ...] = ()
    """Names of files that programs read next to the model: see Export.companion."""
    assumes: tuple[str, ...] = ()
    """Fields of the config that the file does not store; `open` takes them as keywords."""


def fixed_tokens(vocab_size: int, n: int) -> TokenArray:
    """`n` tokens spread over the vocabulary, the same at each call."""
    return (np.arange(n, dtype=np.int64) * 7919 % vocab_size).astype(np.int32)
