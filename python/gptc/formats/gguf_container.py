"""GGUF's container: a header, metadata by key, a table of tensors, then their bytes, aligned.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Shapes are written innermost axis first.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from gptc.errors import GptcError
from gptc.formats.binary import UINT32, UINT64, Binary
from gptc.formats.blocks import BLOCKS
from gptc.formats.model_file import Entry
from gptc.formats.numbers import BF16, F16, F32, F64, Codec

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

# Numbers of ggml's types; those that gptc does not read are named in errors.
_CODEC_OF: dict[int, Codec] = {0: F32, 1: F16, 28: F64, 30: BF16}
_CODEC_OF |= {kind.number: kind for kind in BLOCKS}
_NUMBER_OF = {codec: number for number, codec in _CODEC_OF.items()}
_UNREAD = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
_UNREAD |= {21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M"}
_UNREAD |= {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}

# Codes of the module struct for the types of metadata; 8 is a string, 9 an array.
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BYTE, _BOOL, STRING, _ARRAY = 1, 7, 8, 9

# More than any model has, and few enough to read in a moment.
_MAX_TENSORS = 1 << 17
_MAX_KEYS = 1 << 16
_MAX_KEY = (1 << 16) - 1
_MAX_TENSOR_NAME = 64
MAX_STRINGS = 1 << 22
LONGEST_TEXT = 1 << 22  # bytes of a text that is decoded, which may take 4 times as many


class Array(NamedTuple):
    """The position of an array in the metadata; its values are read when they are needed."""

    kind: int
    length: int
    offset: int


# ---- reading ----


def read_header(file: Binary) -> tuple[int, int]:
    """The numbers of tensors and of keys."""
    if bytes(file.take(4, "magic")) != MAGIC:
        raise file.damaged("magic", "is not GGUF", 0)
    version = file.number(UINT32, "version")
    if version not in (2, VERSION):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (2, VERSION):
            raise GptcError(
                f"{file.path}: version at byte 4 is that of a big-endian file; convert it with the "
                f"package gguf: gguf-convert-endian {file.path} little"
            )
        raise GptcError(
            f"{file.path}: version at byte 4 is {version:,}, and gptc reads 2 and {VERSION}: "
            "convert the original model again with llama.cpp's convert_hf_to_gguf.py"
        )
    n_tensors, n_keys = file.numbers(UINT64, 2, "the number of tensors and keys")
    file.within("the number of tensors", n_tensors, 1, _MAX_TENSORS, 8)
    file.within("the number of keys", n_keys, 1, _MAX_KEYS, 16)
    return n_tensors, n_keys


def read_metadata(file: Binary, n_keys: int) -> dict[str, Any]:
    """Values by key; of an array only the bounds are checked."""
    found: dict[str, Any] = {}
    n_strings = 0
    for i in range(n_keys):
        at = file.at
        key = read_text(file, f"key {i}", _MAX_KEY)
        if key in found:
            raise file.damaged(f"key {i}", f"is {key!r} a second time", at)
        value = found[key] = _read_value(file, key)
        if isinstance(value, Array) and value.kind == STRING:
            n_strings += value.length
            file.within("the number of strings", n_strings, 0, MAX_STRINGS, at)
    return found


def _read_value(file: Binary, key: str) -> Any:
    at = file.at
    kind = file.number(UINT32, f"type of {key}")
    if kind == STRING:
        return _read_text_value(file, key)
    if kind != _ARRAY:
        return _scalar(file, key, kind, at)
    kind, count = file.number(UINT32, f"type of {key}"), file.number(UINT64, f"count of {key}")
    array = Array(kind, count, file.at)
    if kind == STRING:
        file.within(f"count of {key}", count, 0, MAX_STRINGS, at + 8)
        file.skip_strings(count, key)
    elif kind in CODES:
        file.skip(count * struct.calcsize(f"<{CODES[kind]}"), key)
    else:
        raise file.damaged(f"type of {key}", f"is an array of type {kind}", at + 4)
    return array


def _scalar(file: Binary, key: str, kind: int, at: int) -> Any:
    if kind not in CODES:
        raise file.damaged(f"type of {key}", f"is {kind}, which is not a type of GGUF", at)
    return file.number(CODES[kind], key)


def _read_text_value(file: Binary, key: str) -> str | Array:
    """A string; a long one, which nobody reads, as an array of bytes."""
    at = file.at
    length = file.number(UINT64, f"length of {key}")
    if length > LONGEST_TEXT:
        file.skip(length, key)
        return Array(_BYTE, length, at + 8)
    file.at = at
    return read_text(file, key, LONGEST_TEXT, 0)


def read_text(file: Binary, field: str, most: int, least: int = 1) -> str:
    """The next string: its length, then UTF-8."""
    at = file.at
    length = file.number(UINT64, f"length of {field}")
    file.within(f"length of {field}", length, least, most, at)
    try:
        return bytes(file.take(length, field)).decode()
    except UnicodeDecodeError:
        raise file.damaged(field, "is not UTF-8 text", at + 8) from None


def read_texts(file: Binary, count: int, most: int) -> list[str]:
    """The next strings, as `read_text` reads each: by itself where a window of the file ends."""
    found: list[str] = []
    length_at = struct.Struct("<Q").unpack_from
    while len(found) < count:
        window, at = file.ahead(), 0
        end = len(window) - 8
        with suppress(UnicodeDecodeError):  # which read_text finds again
            while at <= end and len(found) < count:
                (length,) = length_at(window, at)
                if length > min(most, end - at):
                    break
                found.append(str(window[at + 8 : at + 8 + length], "utf-8"))
                at += 8 + length
        file.at += at
        if len(found) < count:
            found.append(read_text(file, f"string {len(found)} of an array", most, 0))
    return found


def read_tensors(file: Binary, n_tensors: int, alignment: int) -> dict[str, Entry]:
    """The tensors; they follow one another, each aligned, to the end of the file."""
    listed: dict[str, tuple[Codec, tuple[int, ...], int]] = {}
    for i in range(n_tensors):
        at = file.at
        name = read_text(file, f"name of tensor {i}", _MAX_TENSOR_NAME)
        if name in listed:
            raise file.damaged(f"name of tensor {i}", f"is {name} a second time", at)
        listed[name] = _read_info(file, name)
    start = -(-file.at // alignment) * alignment
    entries = {}
    for name, (codec, shape, offset) in listed.items():
        entry = entries[name] = Entry(codec, shape, start + offset)
        if offset % alignment or entry.end > file.size:
            raise file.damaged(
                name,
                f"and its {codec.n_bytes(shape):,} bytes are not aligned, or extend past the "
                f"end of the file at {file.size:,}",
                entry.offset,
            )
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset != -(-end // alignment) * alignment:
            raise file.damaged(
                name, f"leaves a gap or overlaps: {end:,} ends the one before it", entry.offset
            )
        end = entry.end
    if file.size > -(-end // alignment) * alignment:
        raise file.damaged(
            "the end of the tensors", f"is followed by {file.size - end:,} bytes", end
        )
    return entries


def _read_info(file: Binary, name: str) -> tuple[Codec, tuple[int, ...], int]:
    """Codec, shape and offset of a tensor, from its line in the table."""
    at = file.at
    n_dim = file.within(f"axes of {name}", file.number(UINT32, f"axes of {name}"), 1, 4, at)
    sizes = file.numbers(UINT64, n_dim, f"shape of {name}")
    for size in sizes:
        file.within(f"shape of {name}", size, 1, 1 << 40, at + 4)
    at = file.at
    kind, offset = file.number(UINT32, f"type of {name}"), file.number(UINT64, f"offset of {name}")
    if kind not in _CODEC_OF:
        what = _UNREAD.get(kind, "unknown")
        *others, last = (codec.name for codec in _CODEC_OF.values())
        known = f"{', '.join(others)} and {last}"
        raise GptcError(
            f"{file.path}: type of {name} at byte {at:,} is {kind} ({what}); gptc reads "
            f"{known}: quantize the model to one of them"
        )
    codec, shape = _CODEC_OF[kind], tuple(reversed(sizes))
    if not codec.fits(shape):
        raise file.damaged(f"shape of {name}", f"is {shape}, not whole blocks of {codec.name}", at)
    return codec, shape, offset


# ---- writing ----


def header(values: Mapping[str, Any], slots: Sequence[tuple[str, Codec, tuple[int, ...]]]) -> bytes:
    """The bytes before the tensors; each tensor is padded to ALIGNMENT."""
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(slots), len(values)))
    for key, value in values.items():
        out += _string(key) + _value(value)
    offset = 0
    for name, codec, shape in slots:
        out += _string(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", _NUMBER_OF[codec], offset)
        offset += -(-codec.n_bytes(shape) // ALIGNMENT) * ALIGNMENT
    return bytes(out) + bytes(-len(out) % ALIGNMENT)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value with its type: whole numbers are uint32, others float32, lists are of one type."""
    if isinstance(value, list):
        kind, _ = _typed(value[0] if value else "")
        data = b"".join(_typed(item)[1] for item in value)
        # Sorts of tokens are int32 in llama.cpp's own files.
        kind = 5 if kind == 4 else kind
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + data
    kind, data = _typed(value)
    return struct.pack("<I", kind) + data


def _typed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return STRING, _string(value)
