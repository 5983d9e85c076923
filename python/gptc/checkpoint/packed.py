"""A checkpoint whose weights are a GGUF file, model.gguf, with quantized matrices in blocks.

`gptc import` makes it of a quantized GGUF model. All else is as in reader.py. transformers reads it
with from_pretrained(folder, gguf_file="model.gguf").
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from gptc.checkpoint.names import PACKED
from gptc.checkpoint.reader import Checkpoint
from gptc.engine.model import Model
from gptc.engine.options import BlockRows
from gptc.errors import GptcError, NoTokenizer
from gptc.formats import pickled
from gptc.formats.gguf import GgufModel
from gptc.formats.layout import Part, Placement, Tensors
from gptc.formats.model_file import StoredRows
from gptc.formats.safetensors import has_tensors
from gptc.tokenizer.base import Tokenizer


def is_packed(folder: Path) -> bool:
    """Whether the weights of a folder are in model.gguf, and there are no safetensors."""
    return (
        (folder / PACKED).is_file() and not has_tensors(folder) and not pickled.has_tensors(folder)
    )


class PackedCheckpoint(Checkpoint):
    """A checkpoint folder whose weights are in model.gguf."""

    weights = PACKED

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._gguf = GgufModel(path / PACKED)
        if self._gguf.config != self.config:
            raise GptcError(
                f"{path}: config.json and {PACKED} describe different models; import the GGUF file "
                "again"
            )

    @property
    def tensors(self) -> Tensors:  # type: ignore[override]
        return self._gguf.tensors

    def parts(self) -> list[Part]:
        return self._gguf.parts()

    @cached_property
    def placement(self) -> Placement:
        return self._gguf.placement

    def packing(self) -> tuple[BlockRows, ...]:
        return self._gguf.packing()

    def stored_rows(self, part: Part) -> StoredRows | None:
        return self._gguf.stored_rows(part)

    def types(self) -> dict[str, tuple[int, int]]:
        return self._gguf.types()

    def give_all(self, model: Model) -> None:
        self._gguf.load_into(model)

    def tokenizer(self) -> Tokenizer:
        try:
            return super().tokenizer()
        except NoTokenizer:
            return self._gguf.tokenizer()
