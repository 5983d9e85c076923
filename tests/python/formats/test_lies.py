"""Files that are written byte by byte to mislead are refused, with the place, in a moment."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.errors import GptcError
from gptc.formats import gguf_tokenizer, llmc
from gptc.formats.registry import open_model
from gptc.formats.safetensors import TensorFile

# ---- GGUF, byte by byte ----


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def gguf(keys: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    header += b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


ARCH = key("general.architecture", 8, text("llama"))
ALIGN = "general.alignment"
DATA = bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gguf([ARCH], [tensor("a", (8,))], DATA, 4), "version at byte 4 is 4"),
        (gguf([ARCH], [tensor("a", (8,))], DATA, 0x03000000), "version at byte 4 is"),
        (gguf([ARCH, ARCH], [tensor("a", (8,))], DATA), "a second time"),
        (gguf([ARCH], [tensor("a", (8,)), tensor("a", (8,), 0, 32)], DATA), "a a second time"),
        (gguf([key("", 8, text("x"))], [tensor("a", (8,))], DATA), "length of key 0 at byte 24"),
        (gguf([ARCH], [tensor("", (8,))], DATA), "length of name of tensor 0"),
        (gguf([ARCH], [tensor("a" * 65, (8,))], DATA), "is 65; it must be between 1 and 64"),
        (gguf([key(b"\xff", 8, text("x"))], [tensor("a", (8,))], DATA), "is not UTF-8 text"),
        (gguf([ARCH], [tensor("a", (8,), 99)], DATA), r"type of a .* is 99 \(unknown\)"),
        (
            gguf([ARCH], [tensor("a", (256,), 16)], DATA),
            r"type of a .* is 16 \(IQ2_XXS\); gptc reads F32",
        ),
        (gguf([ARCH], [tensor("a", (32,), 12)], DATA), "not whole blocks of Q4_K"),
        (gguf([ARCH], [tensor("a", (256,), 12)], DATA), "past the end"),
        (gguf([ARCH], [tensor("a", (33,), 8)], DATA), "not whole blocks of Q8_0"),
        (gguf([ARCH], [tensor("a", (8,), 0, 31)], DATA), "not aligned"),
        (gguf([ARCH], [tensor("a", (8,), 0, 64)], DATA), "past the end"),
        (gguf([ARCH], [tensor("a", (8,), 0, 2**64 - 32)], DATA), "past the end"),
        (gguf([ARCH], [tensor("a", (8,), 0, 32)], DATA), "leaves a gap or overlaps"),
        (gguf([ARCH], [tensor("a", (8,)), tensor("b", (8,))], DATA), "leaves a gap or overlaps"),
        (gguf([ARCH], [tensor("a", (8,))], bytes(96)), "is followed by 64 bytes"),
        (gguf([ARCH], [tensor("a", (2**33, 2**33))], DATA), "past the end"),
        (gguf([ARCH], [tensor("a", (2**63, 2))], DATA), "shape of a at byte"),
        (gguf([ARCH], [tensor("a", (0, 2))], DATA), "shape of a at byte"),
        (gguf([ARCH], [tensor("a", (1,) * 5)], DATA), "axes of a"),
        (gguf([ARCH], [tensor("a", ())], DATA), "axes of a"),
        (gguf([key(ALIGN, 4, struct.pack("<I", 0))], [tensor("a", (8,))], DATA), "alignment is 0"),
        (gguf([key(ALIGN, 4, struct.pack("<I", 24))], [tensor("a", (8,))], DATA), "is 24, not a"),
        (gguf([key(ALIGN, 8, text("32"))], [tensor("a", (8,))], DATA), "alignment is '32'"),
        (gguf([key("k", 8, struct.pack("<Q", 2**64 - 1))], [], DATA), "number of tensors"),
        (gguf([key("k", 8, struct.pack("<Q", 2**64 - 1))], [b""], DATA), "takes 18,446,744,073"),
        (gguf([key("k", 9, struct.pack("<IQ", 4, 2**63))], [b""], DATA), "k at byte"),
        (gguf([key("k", 9, struct.pack("<IQ", 8, 2**63))], [b""], DATA), "count of k at byte"),
        (gguf([key("k", 9, struct.pack("<IQ", 9, 1))], [b""], DATA), "is an array of type 9"),
        (gguf([key("k", 13, b"")], [b""], DATA), "type of k at byte 33 is 13"),
        (gguf([ARCH], [tensor("a", (8,))], DATA[:32]), "lacks the tensor token_embd.weight"),
    ],
)
def test_gguf_files_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(GptcError, match=message) as caught:
        open_model(path)
    assert str(path) in str(caught.value)


def test_strings_without_end_are_walked_through_in_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    strings = key("k", 9, struct.pack("<IQ", 8, 1 << 21) + bytes(8 << 21))
    few = key("k", 9, struct.pack("<IQ", 8, 1 << 20) + bytes(8 << 20))
    path.write_bytes(gguf([few], [tensor("a", (8,))], DATA[:32]))
    begin = time.process_time()
    with pytest.raises(GptcError, match=r"architecture is None"):
        open_model(path)
    assert time.process_time() - begin < 5
    path.write_bytes(gguf([strings, *(strings.replace(b"k", b"%c" % c, 1) for c in b"lm")], [b""]))
    with pytest.raises(GptcError, match=r"number of strings at byte .* is 6,291,456"):
        open_model(path)
    short = key("k", 9, struct.pack("<IQ", 8, 3) + text("a") + text("b") + bytes(7))
    path.write_bytes(gguf([short], [b""])[: 24 + len(short)])
    with pytest.raises(GptcError, match=r"string 2 of k at byte 67 ends past"):
        open_model(path)


# ---- safetensors and JSON ----


def container(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin: int = 0, end: int = 4, shape: list[Any] | None = None, kind: Any = "F32") -> Any:
    return {"dtype": kind, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (container("{}", length=2**31), "a header of 2,147,483,648"),
        (container("{}", length=2**64 - 1), "a header of 18,446,744,073,709,551,615"),
        (container('{"a":' + "[" * 1000 + "]" * 1000 + "}"), "nested too deep|entry of a is"),
        (container("[" * 100_000), "nested too deep|not JSON"),
        (container(json.dumps({"a": entry()})[:-1] + ',"a":1}', bytes(4)), "names 'a' twice"),
        (container(json.dumps({"": entry()}), bytes(4)), "no names of tensors"),
        (container(json.dumps({"a": entry(kind="F7")}), bytes(4)), "dtype of a is 'F7'"),
        (container(json.dumps({"a": entry(kind=["F32"])}), bytes(4)), "dtype of a is"),
        (container(json.dumps({"a": entry(shape=[True])}), bytes(4)), "shape of a is"),
        (container(json.dumps({"a": entry(shape=[1.0])}), bytes(4)), "shape of a is"),
        (container(json.dumps({"a": entry(shape=[2**32] * 3)}), bytes(4)), "size of its shape"),
        (container(json.dumps({"a": entry(shape=[10**30])}), bytes(4)), "shape of a is"),
        (container(json.dumps({"a": entry(0, 8, [2])}), bytes(4)), "is truncated"),
        (container(json.dumps({"a": entry(4, 8)}), bytes(8)), "leaves a gap"),
        (container(json.dumps({"a": entry(), "b": entry()}), bytes(4)), "overlaps"),
        (container(json.dumps({"a": entry()}), bytes(8)), "is followed by 4 bytes"),
        (container(b'{"a\xff": 1}'), "not JSON"),
    ],
)
def test_containers_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(GptcError, match=message) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_half_a_million_keys_are_refused_at_once(tmp_path: Path) -> None:
    n = 510_000
    header = "{" + ",".join(f'"{i}":0' for i in range(n)) + "}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(container(header))
    one = key("k000000", 7, b"\1").replace(b"000000", b"%06d")
    keys = [one % i for i in range(n)]
    other = tmp_path / "x.gguf"
    other.write_bytes(gguf(keys, [tensor("a", (8,))], DATA))
    why = rf"limit of 500,000 JSON values|{n:,}; it must be"
    for file, read in ((path, TensorFile), (other, open_model)):
        begin = time.process_time()
        with pytest.raises(GptcError, match=why):
            read(file)  # type: ignore[operator]
        assert time.process_time() - begin < 5
        tracemalloc.start()  # which takes time itself
        with pytest.raises(GptcError, match=why):
            read(file)  # type: ignore[operator]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * file.stat().st_size


def test_tokens_so_long_that_merging_them_takes_minutes(tmp_path: Path) -> None:
    header = np.zeros(256, "<u4")
    pieces = [bytes([i]) for i in range(256)]
    rng = np.random.default_rng(0)
    pieces += [rng.integers(97, 99, 255).astype(np.uint8).tobytes() for _ in range(50_000)]
    pieces += [b"<|endoftext|>"]
    header[:4] = 20240328, 2, len(pieces), len(pieces) - 1
    path = tmp_path / "t.bin"
    path.write_bytes(header.tobytes() + b"".join(bytes([len(p)]) + p for p in pieces))
    begin = time.process_time()
    tokenizer = llmc.read_tokenizer(path)
    with pytest.raises(GptcError, match="too long to find their merges"):
        gguf_tokenizer.to_gguf(tokenizer, tokenizer.vocab_size)
    assert time.process_time() - begin < 5
