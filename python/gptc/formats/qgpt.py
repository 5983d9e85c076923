"""markusheimerl/gpt's model.bin for browsers (https://github.com/markusheimerl/gpt): int8 weights.

"QGPT", four sizes and two flags; then the matrices, each int32 rows, int32 columns, int8 (rows,
columns) and a float32 scale for each row: y[r] = scale[r] sum_c q[r, c] x[c]. Rows are outputs. The
number of heads and the context are not stored, as in the program's own _gpt.bin (heimerl.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from gptc.formats import heimerl, layout
from gptc.formats.binary import INT32, Binary
from gptc.formats.format import Export, Format, Output
from gptc.formats.layout import Naming, Part
from gptc.formats.model_file import Entry, ModelFile, TensorTable, check_size
from gptc.formats.numbers import Int8Groups, encoded
from gptc.tokenizer.base import Tokenizer

MAGIC = b"QGPT"
_FLAGS = ("is_causal", "use_rope")
_HEADER = struct.Struct("<4s4i2B")
_MATRIX = struct.Struct("<2i")  # rows, columns

_NAMING = Naming(
    {
        "wte.weight": ("embedding",),
        "attn.qkv.weight": tuple(f"layers.{{}}.W{part}" for part in "qkv"),
        "attn.proj.weight": ("layers.{}.Wo",),
        "mlp.fc.weight": ("layers.{}.W1",),
        "mlp.proj.weight": ("layers.{}.W2",),
    }
)


class QgptModel(ModelFile):
    """A model.bin that begins with QGPT."""

    format = "qgpt"

    def __init__(
        self, path: Path, n_head: int = heimerl.N_HEAD, block_size: int = heimerl.BLOCK_SIZE
    ) -> None:
        """`n_head` and `block_size` are not stored. GptcError when the file is damaged."""
        self.path = path
        self.notes = (heimerl.assumed_note(n_head, block_size),)
        file = Binary(path)
        self.config = heimerl.read_config(file, len(MAGIC), n_head, block_size)
        for flag in _FLAGS:
            file.within(flag, file.number("B", flag), 1, 1, file.at - 1)
        end = _HEADER.size + sum(map(_n_bytes, self.parts()))
        check_size(file, end, f"{self.config.n_layer} layers of width {self.config.n_embd} in int8")
        self._table = TensorTable(file, dict(self._entries(file)))

    def _entries(self, file: Binary) -> Iterator[tuple[str, Entry]]:
        for part in self.parts():
            at = file.at
            shape = file.numbers(INT32, 2, f"the shape of {part.name}")
            if shape != part.shape:
                raise file.damaged(f"the shape of {part.name}", f"is {shape}, not {part.shape}", at)
            entry = Entry(Int8Groups(shape[1]), shape, file.at)
            file.take(entry.end - entry.offset, part.name)
            yield part.name, entry

    @property
    def tensors(self) -> TensorTable:
        return self._table

    def parts(self) -> list[Part]:
        return layout.parts(self.config, _NAMING)

    def tokenizer(self) -> Tokenizer:
        return heimerl.bytes_where_256(self.config) or super().tokenizer()


def _n_bytes(part: Part) -> int:
    """Bytes of a matrix with its sizes and scales."""
    return _MATRIX.size + Int8Groups(part.shape[1]).n_bytes(part.shape)


def detect(path: Path, begin: bytes) -> bool:
    """By the magic number."""
    return begin.startswith(MAGIC)


def write(export: Export) -> list[Output]:
    """One file."""
    heimerl.add_notes(export)
    return [Output(export.path, model_chunks(export.model))]


def model_chunks(model: ModelFile) -> Iterator[bytes | memoryview]:
    """The bytes of a model.bin."""
    config = model.config
    heimerl.check_sort(config)
    sizes = (config.n_embd, config.n_ff, config.n_layer, config.vocab_size)
    yield _HEADER.pack(MAGIC, *sizes, 1, 1)
    for part in layout.parts(config, _NAMING):
        yield _MATRIX.pack(*part.shape)
        values = layout.export_tensor(part, model.read(part.ours))
        yield encoded(Int8Groups(part.shape[1]), values, part.name)


FORMAT = Format(
    QgptModel.format,
    "markusheimerl/gpt in a browser",
    detect=detect,
    open=QgptModel,
    write=write,
    dtypes=("int8",),
    assumes=heimerl.FORMAT.assumes,
)
