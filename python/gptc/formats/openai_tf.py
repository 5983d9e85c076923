"""OpenAI's GPT-2 folders: a TensorFlow checkpoint, read without TensorFlow.

model.ckpt.index is a table of LevelDB (https://github.com/google/leveldb/blob/main/doc/table_format.md)
from tensor names to protocol buffers (tensorflow/core/protobuf/tensor_bundle.proto) with the offset
of each tensor in model.ckpt.data-00000-of-00001. Matrices of layers are (1, in, out).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptc.errors import GptcError
from gptc.files.limits import read_file
from gptc.formats import layout
from gptc.formats.binary import Binary, is_plain_name, read_json
from gptc.formats.format import Format
from gptc.formats.layout import Naming, Part
from gptc.formats.model_file import Entry, ModelFile, TensorTable, checked, gpt2_values
from gptc.formats.numbers import BF16, F16, F32, F64, Codec
from gptc.tokenizer import folder, vocabulary
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.native import is_gpt2s

HPARAMS, MERGES = "hparams.json", "vocab.bpe"

_TABLE_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48  # two handles of at most 20 bytes, padding, the magic number
_TRAILER = 5  # after each block: compression and checksum
_CODECS: dict[int, Codec] = {1: F32, 2: F64, 14: BF16, 19: F16}  # tensorflow/core/framework/types
_MAX_INDEX = 4 << 20  # a hundred times that of the largest GPT-2
_MAX_VARINT = 10

_NAMES = {"norm_1": "ln_1", "norm_2": "ln_2", "norm_f": "ln_f"}
_MATRICES = {
    "attn.qkv": "attn/c_attn",
    "attn.proj": "attn/c_proj",
    "mlp.fc": "mlp/c_fc",
    "mlp.proj": "mlp/c_proj",
}
_NAMING = Naming(
    {"wte.weight": ("model/wte",), "wpe.weight": ("model/wpe",)}
    | {"norm_f.weight": ("model/ln_f/g",), "norm_f.bias": ("model/ln_f/b",)}
    | {f"{n}.weight": (f"model/h{{}}/{_NAMES[n]}/g",) for n in ("norm_1", "norm_2")}
    | {f"{n}.bias": (f"model/h{{}}/{_NAMES[n]}/b",) for n in ("norm_1", "norm_2")}
    | {f"{ours}.weight": (f"model/h{{}}/{theirs}/w",) for ours, theirs in _MATRICES.items()}
    | {f"{ours}.bias": (f"model/h{{}}/{theirs}/b",) for ours, theirs in _MATRICES.items()},
    conv1d=True,
    conv1d_lead=(1,),
)


class OpenaiModel(ModelFile):
    """A folder with hparams.json and model.ckpt.*."""

    format = "openai"

    def __init__(self, path: Path) -> None:
        """GptcError when a file is missing or damaged."""
        self.path = path
        hparams = read_json(path / HPARAMS, unique=True)
        self.config = checked(_config(hparams, path / HPARAMS), str(path / HPARAMS))
        index = _find_index(path)
        self._bundle = _read_index(index)
        data = path / f"{index.name.removesuffix('.index')}.data-00000-of-00001"
        self._table = _table(Binary(data), self._bundle, index)

    @property
    def tensors(self) -> TensorTable:
        return self._table

    def parts(self) -> list[Part]:
        return layout.parts(self.config, _NAMING)

    def tokenizer(self) -> Tokenizer:
        """GPT-2's, unless encoder.json and vocab.bpe are others than in OpenAI's folders."""
        merges = self.path / MERGES
        if merges.is_file() and not is_gpt2s(read_file(merges)):
            theirs = folder.read_files(self.path)
            if theirs is not None:
                return theirs
        if self.config.vocab_size == vocabulary.GPT2_SIZE:
            return vocabulary.gpt2(self.path)
        return super().tokenizer()

    def check(self) -> list[str]:
        """Also compares the checksum of every tensor."""
        found = super().check()
        for name, info in self._bundle.items():
            entry = self._table.entries[name]
            if crc32c(self._table.file.raw(entry.offset, entry.end - entry.offset)) != info.crc:
                raise self._table.file.damaged(
                    name, "does not have the checksum of the index", entry.offset
                )
        return [*found, f"{len(self._bundle)} checksums are right"]


def _config(hparams: dict[str, Any], where: Path) -> dict[str, Any]:
    names = {"n_vocab": "vocab_size", "n_ctx": "block_size", "n_embd": "n_embd"}
    names |= {"n_layer": "n_layer", "n_head": "n_head"}
    sizes = {}
    for theirs, ours in names.items():
        value = hparams.get(theirs)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise GptcError(f"{where}: {theirs} is {value!r}, not a whole number above 0")
        sizes[ours] = value
    return gpt2_values(sizes)


def _find_index(folder: Path) -> Path:
    """The index that the file `checkpoint` names, else the only one."""
    named = folder / "checkpoint"
    if named.is_file():
        text = bytes(Binary(named).peek(0, 4096)).decode("utf-8", "replace")
        found = re.search(r'^model_checkpoint_path: "([^"]*)"', text, re.MULTILINE)
        if found and is_plain_name(found[1]) and (folder / f"{found[1]}.index").is_file():
            return folder / f"{found[1]}.index"
    several = sorted(folder.glob("*.ckpt*.index"))
    if len(several) != 1:
        raise GptcError(f"{folder} holds {len(several)} checkpoints of TensorFlow; it must be one")
    return several[0]


def _table(file: Binary, bundle: dict[str, _Info], index: Path) -> TensorTable:
    """The tensors; they fill the data file without a gap."""
    entries = {name: Entry(i.codec, i.shape, i.offset) for name, i in bundle.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].end)):
        if entry.offset != end or entry.end > file.size:
            raise GptcError(
                f"{index}: offset of {name} is {entry.offset:,}; it must be {end:,}, where the "
                f"tensor before it ends, and its end within the {file.size:,} bytes of {file.path}"
            )
        end = entry.end
    if end != file.size:
        raise file.damaged(
            "the end of the tensors", f"is followed by {file.size - end:,} bytes", end
        )
    return TensorTable(file, entries)


# ---- the index ----


class _Info(NamedTuple):
    """The index entry of a tensor."""

    codec: Codec
    shape: tuple[int, ...]
    offset: int
    crc: int


class _Handle(NamedTuple):
    """Offset and size of a block."""

    offset: int
    size: int


def _read_index(path: Path) -> dict[str, _Info]:
    """The entries of the index, by tensor."""
    file = Binary(path)
    if not _FOOTER <= file.size <= _MAX_INDEX:
        raise file.damaged("the footer", f"cannot be in a file of {file.size:,} bytes", 0)
    file.at = file.size - 8
    if file.number("Q", "magic") != _TABLE_MAGIC:
        raise file.damaged("magic", "is not that of a table", file.size - 8)
    footer = _Fields(file, file.size - _FOOTER, file.size - 8)
    footer.handle("metaindex")
    blocks = footer.handle("index")
    found: dict[str, _Info] = {}
    previous, end = None, 0
    for _, value in _entries(file, blocks):
        block = _Fields(file, *value).handle("data block")
        if block.offset < end:  # else one block could be read over and over
            raise file.damaged("data block", f"at {block.offset:,} is out of order", value[0])
        end = block.offset + block.size
        for key, entry in _entries(file, block):
            if previous is not None and key <= previous:
                raise file.damaged(f"key {key!r}", "is out of order", entry[0])
            previous = key
            if key == b"":
                _check_bundle(file, _message(file, *entry))
                continue
            name = key.decode("utf-8", "replace")
            found[name] = _info(file, name, entry)
    if previous is None:
        raise file.damaged("the index", "is empty", blocks.offset)
    return found


class _Fields:
    """A stretch of the file from which variable-length numbers are taken."""

    def __init__(self, file: Binary, begin: int, end: int) -> None:
        self.file, self.at, self.end = file, begin, end

    def varint(self, field: str) -> int:
        """The next number: seven bits a byte, low ones first."""
        value = 0
        for i in range(_MAX_VARINT):
            if self.at >= self.end:
                break
            byte = self.file.peek(self.at, self.at + 1)[0]
            self.at += 1
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                return value
        raise self.file.damaged(field, "does not end where it should", self.at)

    def handle(self, field: str) -> _Handle:
        """The next block's handle, checked to be within the file with its trailer."""
        at = self.at
        offset, size = self.varint(field), self.varint(field)
        if size < 4 or offset + size + _TRAILER > self.file.size:
            raise self.file.damaged(
                field, f"has the offset {offset:,} and {size:,} bytes, past the end", at
            )
        return _Handle(offset, size)


def _entries(file: Binary, block: _Handle) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Keys of a block, with where their values begin and end. Keys share prefixes."""
    begin, end = block.offset, block.offset + block.size
    compression = file.peek(end, end + 1)[0]
    if compression != 0:
        raise file.damaged("compression of a block", f"is {compression}; only 0 is known", end)
    stored = int.from_bytes(file.peek(end + 1, end + 5), "little")
    if _mask(crc32c(file.raw(begin, block.size + 1))) != stored:
        raise file.damaged("a block", "does not have the checksum after it", begin)
    n_restarts = int.from_bytes(file.peek(end - 4, end), "little")
    if 4 * (n_restarts + 1) > block.size:
        raise file.damaged("the restarts of a block", f"are {n_restarts:,}", end - 4)
    fields = _Fields(file, begin, end - 4 * (n_restarts + 1))
    key = b""
    while fields.at < fields.end:
        at = fields.at
        shared, more, n_value = (fields.varint("an entry") for _ in range(3))
        if shared > len(key) or more + n_value > fields.end - fields.at or shared + more > 4096:
            raise file.damaged("an entry", "is longer than its block", at)
        key = key[:shared] + bytes(file.peek(fields.at, fields.at + more))
        value = fields.at + more
        fields.at = value + n_value
        yield key, (value, fields.at)


def _message(file: Binary, begin: int, end: int) -> dict[int, list[Any]]:
    """A protocol buffer: numbers, and stretches (begin, end) of what has a length."""
    fields, found = _Fields(file, begin, end), dict[int, list[Any]]()
    while fields.at < end:
        at = fields.at
        tag = fields.varint("a field")
        kind, number = tag & 7, tag >> 3
        value: Any
        if kind == 0:
            value = fields.varint("a number")
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind) or 0
            size = fields.varint("a length") if kind == 2 else size
            if size > end - fields.at:
                raise file.damaged(f"field {number}", "is longer than its message", at)
            value = (fields.at, fields.at + size)
            fields.at += size
        else:
            raise file.damaged(f"field {number}", f"is of the unknown kind {kind}", at)
        found.setdefault(number, []).append(value)
    return found


def _check_bundle(file: Binary, header: dict[int, list[Any]]) -> None:
    """One data file, little-endian."""
    if header.get(1, [1])[-1] != 1 or header.get(2, [0])[-1] != 0:
        raise GptcError(f"{file.path}: num_shards and endianness must be 1 and little")


def _info(file: Binary, name: str, entry: tuple[int, int]) -> _Info:
    """A tensor's BundleEntryProto."""
    message = _message(file, *entry)

    def last(number: int, default: Any) -> Any:
        return message.get(number, [default])[-1]

    kind, offset, size = last(1, 0), last(4, 0), last(5, 0)
    if kind not in _CODECS or last(3, 0) != 0 or 7 in message:
        raise file.damaged(name, f"is of type {kind}, in another file or in slices", entry[0])
    shape = []
    for begin, end in [s for s in [last(2, None)] if s is not None]:
        for stretch in _message(file, begin, end).get(2, []):
            if not isinstance(stretch, tuple):
                raise file.damaged(name, "has no shape", begin)
            shape.append(_message(file, *stretch).get(1, [0])[-1])
    sizes = [offset, size, *shape]
    if not all(isinstance(n, int) and 0 <= n < 1 << 40 for n in sizes) or len(shape) > 4:
        raise file.damaged(name, f"has the shape {shape}, offset {offset}, size {size}", entry[0])
    codec = _CODECS[kind]
    if codec.n_bytes(tuple(shape)) != size:
        raise file.damaged(name, f"has {size} bytes, and the shape {tuple(shape)}", entry[0])
    crc = last(6, None)
    if not isinstance(crc, tuple) or crc[1] - crc[0] != 4:
        raise file.damaged(name, "has no checksum", entry[0])
    masked = int.from_bytes(file.peek(crc[0], crc[1]), "little")
    return _Info(codec, tuple(shape), offset, _unmask(masked))


# ---- checksums ----


def crc32c(data: npt.NDArray[np.uint8]) -> int:
    """CRC-32C (RFC 3720, B.4). Long data is cut into lanes that are summed at once."""
    lanes = 4096
    n = len(data) // lanes
    crc = np.uint32(0xFFFFFFFF)
    if n > 16:
        columns = data[: n * lanes].reshape(lanes, n)
        sums = np.zeros(lanes, np.uint32)
        sums[0] = crc
        for i in range(n):
            sums = _TABLE[(sums ^ columns[:, i]) & 0xFF] ^ (sums >> np.uint32(8))
        crc = _joined(sums, n)
        data = data[n * lanes :]
    total = int(crc)
    table = _TABLE.tolist()
    for byte in data.tolist():
        total = table[(total ^ byte) & 0xFF] ^ total >> 8
    return total ^ 0xFFFFFFFF


def _joined(sums: npt.NDArray[np.uint32], n_bytes: int) -> np.uint32:
    """The checksum of lanes of n_bytes each: they are joined in pairs, again and again."""
    shift = _zeros(n_bytes)
    while len(sums) > 1:
        sums = _times(shift, sums[0::2]) ^ sums[1::2]
        shift = _times(shift, shift)
    first: np.uint32 = sums[0]
    return first


def _zeros(n_bytes: int) -> npt.NDArray[np.uint32]:
    """The effect of n_bytes of zeros on each bit of a checksum: a matrix over GF(2)."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    result: npt.NDArray[np.uint32] = bits
    square: npt.NDArray[np.uint32] = _TABLE[bits & 0xFF] ^ (bits >> np.uint32(8))
    while n_bytes:
        if n_bytes & 1:
            result = _times(square, result)
        square = _times(square, square)
        n_bytes >>= 1
    return result


def _times(
    matrix: npt.NDArray[np.uint32], vectors: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint32]:
    """The product with each of several vectors of 32 bits."""
    out = np.zeros_like(vectors)
    for bit in range(32):
        out ^= np.where(vectors >> np.uint32(bit) & 1, matrix[bit], np.uint32(0))
    return out


def _make_table() -> npt.NDArray[np.uint32]:
    table: npt.NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ (table & 1) * np.uint32(0x82F63B78)
    return table


_TABLE = _make_table()


def _mask(crc: int) -> int:
    """The form in which LevelDB stores a checksum, as data may itself hold checksums."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _unmask(masked: int) -> int:
    rotated = masked - 0xA282EAD8 & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


FORMAT = Format(
    OpenaiModel.format,
    "an OpenAI GPT-2 folder",
    detect=lambda path, begin: (path / HPARAMS).is_file(),
    open=OpenaiModel,
)
