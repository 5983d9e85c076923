"""Damage to files: accidents to bytes, and changes to what a format's own structure holds.

A `Mutate` makes a damaged file from a source of randomness, so a case is a function of its seed.
The structured ones keep what surrounds a change valid, lengths and checksums included: so a change
reaches the code behind the first check.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any, TypeAlias

Mutate: TypeAlias = Callable[[Random], bytes]
Structure: TypeAlias = Callable[[bytes], Mutate]
"""Takes a whole file apart once."""

_NUMBERS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, -(2**31), 2**31, 2**32 - 1]
_NUMBERS += [2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_WORDS = [b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"true", b"9" * 30, b"[" * 1200]
_WORDS += [b"..", b"/", b"\xff\xfe", b"\0", b'"a":']

# ---- bytes ----


def damage(random: Random, data: bytes) -> bytes:
    """`data` with one to four random changes, most of them near its beginning with the sizes."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        near = random.choice((64, 512, 4096, len(out)))
        at = random.randrange(max(1, min(near, len(out))))
        _ACCIDENTS[random.randrange(len(_ACCIDENTS))](random, out, at)
    return bytes(out)


def mutator(structure: Structure | None, data: bytes) -> Mutate:
    """Damage to `data`: half of the cases to its structure, if that is known."""
    structured = None if structure is None else structure(data)

    def mutate(random: Random) -> bytes:
        if structured is None or random.random() < 0.5:
            return damage(random, data)
        return structured(random)

    return mutate


def same_size(data: bytes) -> Mutate:
    """Damage that keeps the size, which is compared first."""
    return lambda random: damage(random, data)[: len(data)].ljust(len(data), b"\xff")


def _flip(random: Random, out: bytearray, at: int) -> None:
    if at < len(out):
        out[at] ^= 1 << random.randrange(8)


def _number(random: Random, out: bytearray, at: int) -> None:
    """Writes an edge-case number, mostly at an aligned offset."""
    size = random.choice((1, 2, 4, 4, 8, 8))
    at -= at % random.choice((1, size))
    value = random.choice(_NUMBERS) & (1 << 8 * size) - 1
    out[at : at + size] = value.to_bytes(size, "little")


def _nudge(random: Random, out: bytearray, at: int) -> None:
    at -= at % 4
    if at + 4 <= len(out):
        (value,) = struct.unpack_from("<I", out, at)
        struct.pack_into("<I", out, at, value + random.choice((-8, -1, 1, 8)) & 0xFFFFFFFF)


def _cut(random: Random, out: bytearray, at: int) -> None:
    del out[random.choice((at, len(out) - at % 64)) :]


def _remove(random: Random, out: bytearray, at: int) -> None:
    del out[at : at + random.choice((1, 4, 8, 100))]


def _repeat(random: Random, out: bytearray, at: int) -> None:
    out[at:at] = out[at : at + random.choice((1, 4, 8, 100))]


def _word(random: Random, out: bytearray, at: int) -> None:
    """Replaces a number or a name, for JSON."""
    word = random.choice(_WORDS)
    end = at
    while end < len(out) and out[end : end + 1].isalnum():
        end += 1
    out[at:end] = word


def _swap(random: Random, out: bytearray, at: int) -> None:
    """Swaps two ranges of bytes."""
    size = random.choice((4, 8, 32))
    other = random.randrange(max(1, len(out) - size))
    if at + size <= len(out):
        out[at : at + size], out[other : other + size] = (
            out[other : other + size],
            out[at : at + size],
        )


_ACCIDENTS = [_flip, _number, _number, _nudge, _cut, _remove, _repeat, _word, _swap]

# ---- JSON ----

_WRONG: list[Any] = [
    None, True, False, -1, 0, 1, 2, 1.5, 2**31, 2**32, 2**63, 10**30, -(10**30), 10**400, 1e308,
    float("nan"), float("inf"), "", "x", "0", "\ud800", "a\nb", "../x", "\0", "\u2581", "<0x41>",
    "<s>", "BPE", [], [1], ["x"], [[]], [None], {}, {"a": 1}, {"type": "x"}, "x" * 5000, [0] * 3000,
]  # fmt: skip


def json_value(data: bytes) -> Mutate:
    """Changes to values, names and lists of a JSON file."""
    value = json.loads(data)
    return lambda random: json.dumps(_changed_twice(random, value)).encode()


def _changed_twice(random: Random, value: Any) -> Any:
    for _ in range(random.choice((1, 1, 2))):
        value = changed(random, value)
    return value


def changed(random: Random, value: Any) -> Any:
    """A JSON value with one change, at a random depth; the value itself stays as it is."""
    if value and isinstance(value, (dict, list)) and random.random() < 0.9:
        return _changed_within(random, value)
    if isinstance(value, str) and random.random() < 0.5:
        return _changed_text(random, value)
    if type(value) in (int, float) and abs(value) < 1e300 and random.random() < 0.5:
        return value + random.choice((-1, 1, 2, 0.5, -value, 255, 2**31, 2**53))
    return random.choice(_WRONG)


def _changed_within(random: Random, value: Any) -> Any:
    new = value.copy()
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, other, kind = random.choice(keys), random.choice(keys), random.random()
    if kind < 0.75:
        new[key] = changed(random, value[key])
    elif kind < 0.85:
        del new[key]
    elif kind < 0.92:
        new[key], new[other] = value[other], value[key]
    elif isinstance(value, dict):
        new[_changed_text(random, key)] = new.pop(key)
    elif kind < 0.98:
        new.insert(key, value[other])
    else:
        new *= random.choice((2, 100))
    return new


def _changed_text(random: Random, text: str) -> str:
    at = random.randrange(len(text) + 1)
    some = random.choice(
        ("", "x", " ", "\0", "\n", "\ud800", "\u2581", "\u0100", "e\u0301", "(", "9")
    )
    return text[:at] + some * random.choice((1, 1, 1, 300)) + text[at + random.choice((0, 1)) :]


# ---- lines ----


def lines(data: bytes) -> Mutate:
    """Changes to a file of lines; a line of JSON may get another value."""
    whole = data.splitlines(keepends=True)

    def mutate(random: Random) -> bytes:
        new = whole.copy()
        at, other = random.randrange(len(new)), random.randrange(len(new))
        kind = random.randrange(8)
        if kind == 0:
            del new[at]
        elif kind == 1:
            new[at], new[other] = new[other], new[at]
        elif kind == 2:
            new.insert(at, new[other] * random.choice((1, 1, 500)))
        elif kind == 3 and new[at][:1] in b"{[":
            try:
                new[at] = json.dumps(changed(random, json.loads(new[at]))).encode() + b"\n"
            except ValueError:
                new[at] = damage(random, new[at])
        else:
            new[at] = damage(random, new[at])
        return b"".join(new)

    return mutate


# ---- protocol buffers ----


def proto(data: bytes) -> Mutate:
    """Changes to the fields of a message, and of the messages in it."""
    fields = _fields(data)
    assert fields is not None
    inner = {i: found for i, (_, _, raw) in enumerate(fields) if (found := _fields(raw))}

    def mutate(random: Random) -> bytes:
        new = fields.copy()
        at = random.randrange(len(new))
        if random.random() < 0.3:  # what is rare comes last: the settings
            at = len(new) - 1 - random.randrange(min(2, len(new)))
        if at in inner and random.random() < 0.8:
            number, wire, _ = new[at]
            new[at] = number, wire, _joined(_changed_fields(random, inner[at]))
        else:
            new = _changed_fields(random, new, at)
        return _joined(new)

    return mutate


_Field: TypeAlias = tuple[int, int, bytes]  # number, wire type, bytes of the value


def _changed_fields(random: Random, fields: list[_Field], at: int | None = None) -> list[_Field]:
    new = fields.copy()
    at = random.randrange(len(new)) if at is None else at
    number, wire, raw = new[at]
    kind = random.randrange(7)
    if kind == 0:
        del new[at]
    elif kind == 1:
        new.insert(at, random.choice(new))
    elif kind == 2:
        new[at] = random.choice((0, 1, 2, 3, number + 1, 44, 2**29 - 1)), wire, raw
    elif kind == 3:
        new[at] = number, random.choice((0, 1, 2, 5, 3, 7)), raw
    elif kind == 4 and wire == 2:
        new[at] = number, wire, raw * random.choice((0, 2, 300))
    elif wire == 0:
        new[at] = number, wire, varint(random.choice(_NUMBERS) & (1 << 64) - 1)
    else:
        new[at] = number, wire, damage(random, raw) if raw else b"\xff"
    return new


def _joined(fields: list[_Field]) -> bytes:
    out = bytearray()
    for number, wire, raw in fields:
        out += varint(number << 3 | wire)
        if wire == 2:
            out += varint(len(raw))
        out += raw
    return bytes(out)


def _fields(data: bytes) -> list[_Field] | None:
    """The fields of a message; None for other bytes."""
    found, at = [], 0
    try:
        while at < len(data):
            key, at = _read_varint(data, at)
            wire, begin = key & 7, at
            if wire == 0:
                _, at = _read_varint(data, at)
            elif wire == 2:
                n_bytes, begin = _read_varint(data, at)
                at = begin + n_bytes
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            else:
                return None
            found.append((key >> 3, wire, data[begin:at]))
    except IndexError:
        return None
    return found if at == len(data) else None


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# ---- GGUF ----

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
_Key: TypeAlias = tuple[bytes, int, Any]  # name, type, bytes or (type, items)


def gguf(data: bytes) -> Mutate:
    """Changes to the types, values and arrays of the metadata; offsets of tensors stay right."""
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    at, keys = 24, list[_Key]()
    for _ in range(n_keys):
        key, at = _gguf_text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        value, at = _gguf_value(data, at + 4, kind)
        keys.append((key, kind, value))
    table = at
    for _ in range(n_tensors):
        _, at = _gguf_text(data, at)
        at += 4 + 8 * struct.unpack_from("<I", data, at)[0] + 12
    tensors, rest = data[table:at], data[-(-at // 32) * 32 :]

    def mutate(random: Random) -> bytes:
        new, of_tensors = keys.copy(), tensors
        for _ in range(random.choice((1, 1, 2))):
            if random.random() < 0.15:
                of_tensors = damage(random, of_tensors)
            else:
                _change_key(random, new, random.randrange(len(new)))
        out = data[:16] + struct.pack("<Q", len(new)) + b"".join(map(_gguf_key, new)) + of_tensors
        return out + bytes(-len(out) % 32) + rest

    return mutate


def _gguf_text(data: bytes, at: int) -> tuple[bytes, int]:
    (n,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + n], at + 8 + n


def _gguf_value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind == _TEXT:
        return _gguf_text(data, at)
    if kind != _LIST:
        return data[at : at + _SIZES[kind]], at + _SIZES[kind]
    kind, n = struct.unpack_from("<IQ", data, at)
    at, items = at + 12, []
    for _ in range(n):
        item, at = _gguf_value(data, at, kind)
        items.append(item)
    return (kind, items), at


def _gguf_key(key: _Key) -> bytes:
    name, kind, value = key
    out = struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)
    if isinstance(value, bytes):
        return out + _gguf_item(kind, value)
    inner, items = value
    return (
        out + struct.pack("<IQ", inner, len(items)) + b"".join(_gguf_item(inner, i) for i in items)
    )


def _gguf_item(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value if kind == _TEXT else value


def _change_key(random: Random, keys: list[_Key], at: int) -> None:
    name, kind, value = keys[at]
    change = random.randrange(10)
    if change == 0:
        del keys[at : at + (len(keys) > 1)]
    elif change == 1:
        keys.insert(at, random.choice(keys))
    elif change == 2:
        keys[at] = random.choice(keys)[0], kind, value
    elif change == 3:
        keys[at] = (name, *random.choice(keys)[1:])
    elif change == 4:  # another type, of the right size
        other = random.choice((*_SIZES, _TEXT))
        keys[at] = name, other, bytes(_SIZES.get(other, 3))
    elif isinstance(value, bytes):
        keys[at] = name, kind, _changed_item(random, kind, value)
    else:
        keys[at] = name, kind, _changed_array(random, *value)


def _changed_item(random: Random, kind: int, value: bytes) -> bytes:
    if kind == _TEXT:
        return damage(random, value) if value else b"\xff"
    if kind in (6, 12):
        edges = (0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"))
        return struct.pack("<f" if kind == 6 else "<d", random.choice(edges))
    return (random.choice(_NUMBERS) & (1 << 8 * len(value)) - 1).to_bytes(len(value), "little")


def _changed_array(random: Random, kind: int, items: list[bytes]) -> tuple[int, list[bytes]]:
    new, at = items.copy(), random.randrange(max(1, len(items)))
    change = random.randrange(6)
    if not items or change == 0:
        other = random.choice((*_SIZES, _TEXT))
        return other, [bytes(_SIZES.get(other, 1))] * max(1, len(items))
    if change == 1:
        del new[at]
    elif change == 2:
        new.insert(at, random.choice(new))
    elif change == 3:
        new = new[:at] if random.random() < 0.5 else new * 2
    else:
        new[at] = _changed_item(random, kind, new[at])
    return kind, new


# ---- containers of a header and data ----


def safetensors(data: bytes) -> Mutate:
    """Changes to the JSON of the header, whose length stays right."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json_value(data[8:end])

    def mutate(random: Random) -> bytes:
        new = header(random)
        new += b" " * (-len(new) % 8)
        return len(new).to_bytes(8, "little") + new + data[end:]

    return mutate


def tar(data: bytes) -> Mutate:
    """Changes to the fields of a header, with its checksum."""
    headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]

    def mutate(random: Random) -> bytes:
        out = bytearray(data)
        at = random.choice(headers)
        begin, size = random.choice(_TAR_FIELDS)
        field = damage(random, data[at + begin : at + begin + size])[:size].ljust(size, b"\0")
        if random.random() < 0.3:
            field = random.choice((b"7" * size, b"\x80" + b"\xff" * (size - 1), bytes(size)))
        out[at + begin : at + begin + size] = field
        out[at + 148 : at + 156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
        return bytes(out)

    return mutate


_TAR_FIELDS = [(0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (156, 1), (157, 100)]
_TAR_FIELDS += [(257, 8), (345, 155)]


def parquet(data: bytes) -> Mutate:
    """Changes to the numbers and texts of the list of contents, whose length stays right.

    It is a struct of Thrift's compact protocol.
    """
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    contents, end = _thrift(data, begin, 12)
    assert end == len(data) - 8

    def mutate(random: Random) -> bytes:
        new = b"".join(_thrift_bytes(12, _changed_thrift(random, 12, contents)))
        return data[:begin] + new + len(new).to_bytes(4, "little") + data[-4:]

    return mutate


def _thrift(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    """A value and its end: a list of (step, type, value) for a struct, (type, items) for a list."""
    if kind in (1, 2):
        return b"", at
    if kind == 3:
        return data[at : at + 1], at + 1
    if kind in (4, 5, 6):
        return _read_varint(data, at)
    if kind == 7:
        return data[at : at + 8], at + 8
    if kind == 8:
        n, at = _read_varint(data, at)
        return data[at : at + n], at + n
    if kind in (9, 10):
        n, inner = data[at] >> 4, data[at] & 15
        at += 1
        if n == 15:
            n, at = _read_varint(data, at)
        items = []
        for _ in range(n):
            item, at = (data[at : at + 1], at + 1) if inner in (1, 2) else _thrift(data, at, inner)
            items.append(item)
        return (inner, items), at
    assert kind == 12, kind
    fields = []
    while head := data[at]:
        assert head >> 4, "a field far from the one before it"
        value, at = _thrift(data, at + 1, head & 15)
        fields.append((head >> 4, head & 15, value))
    return fields, at + 1


def _thrift_bytes(kind: int, value: Any) -> list[bytes]:
    if isinstance(value, int):
        return [varint(value)]
    if kind == 8:
        return [varint(len(value)), value]
    if kind in (9, 10):
        inner, items = value
        head = bytes([240 | inner]) + varint(len(items))
        return [head, *(part for item in items for part in _thrift_bytes(inner, item))]
    if kind == 12:
        out = []
        for step, inner, field in value:
            out += [bytes([step << 4 | inner]), *_thrift_bytes(inner, field)]
        return [*out, b"\0"]
    return [value]


def _changed_thrift(random: Random, kind: int, value: Any) -> Any:
    if kind == 12 and value:
        new, at = value.copy(), random.randrange(len(value))
        step, inner, field = new[at]
        change = random.random()
        if change < 0.05:
            del new[at]
        elif change < 0.1:
            new[at] = random.randrange(1, 16), inner, field
        else:
            new[at] = step, inner, _changed_thrift(random, inner, field)
        return new
    if kind in (9, 10) and value[1]:
        inner, items = value
        new, at = items.copy(), random.randrange(len(items))
        if random.random() < 0.2:
            new = random.choice((new[:at], new * 2, new * 200))
        else:
            new[at] = _changed_thrift(random, inner, new[at])
        return inner, new
    if isinstance(value, int):
        edge = random.choice(_NUMBERS) & (1 << 64) - 1
        return random.choice((edge, value + 1, value + 2, max(0, value - 2), 2 * value))
    return damage(random, value) if isinstance(value, bytes) and value else value
