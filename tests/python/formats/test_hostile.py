"""Every loader reads a file from strangers or refuses it in one line, in a moment."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzzing import body_files, fuzz
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.verify import verify
from gptc.errors import GptcError
from gptc.files.values import parse_json
from gptc.formats import gguf_tokenizer, llmc
from gptc.formats.registry import open_model
from gptc.formats.safetensors import TensorFile
from small_models import make_checkpoint, make_config

NAMES = [
    "gguf", "gguf-q8_0", "llm.c", "llm.c-tokenizer", "llama2.c-v0", "llama2.c-v0-tokenizer",
    "llama2.c-v1", "llama2.c-v2", "heimerl", "qgpt", "model.safetensors", "config.json",
    "gptc_tokenizer.json", "checksums.json", "shard", "debug-state", "shard-wide",
    "dataset.json", "tokenizer.json", "tokenizer_config.json", "openai", "openai-index",
    "openai-hparams", "sharded-index", "messages", "tekken.json",
    "peft-gpt2-adapter_config.json", "peft-gpt2-adapter_model.safetensors", "gguf-lora-gpt2",
]  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fuzz.targets(tmp_path_factory.mktemp("fuzz"))


def test_every_format_is_a_target(targets: dict[str, Any]) -> None:
    assert set(targets) >= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_whole_is_read(targets: dict[str, Any], name: str) -> None:
    targets[name].read()


def test_what_is_whole_of_other_targets_is_read(targets: dict[str, Any]) -> None:
    """A target whose valid file is refused would damage what is never reached."""
    starts = ("adapter-", "gguf-lora", "chats", "mask", "dataset.json-", "shard-", "body-", "tool-")
    starts += ("packed-", "gguf-split", "pairs-", "prepare-", "reference", "optimizer", "api-keys")
    starts += ("nanogpt", "pytorch_model")  # where PyTorch is installed
    starts += ("config.json-", "c-config-", "gguf-", "ngrams")
    chosen = [name for name in targets if name.startswith(starts) or name.endswith("-qwen")]
    assert len(chosen) > 50
    for name in chosen:
        targets[name].read()


def test_every_body_of_a_request_is_a_target(targets: dict[str, Any]) -> None:
    """The endpoints with a body are those of the server."""
    pytest.importorskip("starlette")
    from gptc.serve.app import endpoints

    posts = {each.path for each in endpoints(body_files._service()) if each.method == "POST"}
    assert posts == set(body_files.PATHS.values())
    assert {f"body-{name}" for name in body_files.PATHS} <= targets.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_few_hundred_accidents(targets: dict[str, Any], name: str) -> None:
    counts = fuzz.fuzz(name, targets[name], range(120), seed=0)
    assert counts["refused"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_truncation_at_every_byte(targets: dict[str, Any], name: str) -> None:
    """Every byte of both ends and every so many between; tools/fuzz/fuzz.py --truncate does all."""
    target = targets[name]
    original = target.file.read_bytes()
    lengths = {*range(min(len(original), 300)), *range(len(original) - 40, len(original))}
    lengths |= set(range(0, len(original), max(1, len(original) // 150)))
    try:
        for length in sorted(n for n in lengths if 0 <= n < len(original)):
            target.file.write_bytes(original[:length])
            if target.file.suffix == ".json" and not original[length:].strip():
                continue
            with pytest.raises(GptcError) as caught:
                target.read()
            assert "\n" not in str(caught.value), length
    finally:
        target.file.write_bytes(original)


# ---- long values ----


@pytest.mark.parametrize("key", ["tokenizer.ggml.charsmap", "tokenizer.chat_template", "general.x"])
@pytest.mark.parametrize("kind", [0, 8, 10, 12])
def test_a_value_of_gguf_that_nobody_reads_takes_no_memory(
    targets: dict[str, Any], tmp_path: Path, key: str, kind: int
) -> None:
    """A list of Python takes 16 to 40 times as much as the array, a text with an emoji 4 times."""
    content = targets["gguf"].file.read_bytes()
    if kind == 8:
        value = struct.pack("<IQ", 8, 24 << 20) + b"x" * ((24 << 20) - 4) + "\U0001f600".encode()
    else:
        item = {0: "<B", 10: "<Q", 12: "<d"}[kind]
        value = struct.pack("<IIQ", 9, kind, 4 << 20) + struct.pack(item, 300 % 256) * (4 << 20)
    name = key.encode()
    name += b"_" * (-(8 + len(name) + len(value)) % 32)  # what follows stays aligned
    value = struct.pack("<Q", len(name)) + name + value
    (n_keys,) = struct.unpack_from("<Q", content, 16)
    path = tmp_path / "model.gguf"
    target = targets["gguf"]._replace(file=path, read=lambda: open_model(path).tokenizer())
    content = content[:16] + struct.pack("<Q", n_keys + 1) + value + content[24:]
    assert fuzz.attempt(target, content) == "read"


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.x"])
def test_a_text_of_gguf_that_is_too_long_is_named(
    targets: dict[str, Any], tmp_path: Path, key: str
) -> None:
    """It was not read; its place in the file tells a person nothing."""
    content = targets["gguf"].file.read_bytes()
    value = struct.pack("<Q", len(key)) + key.encode()
    n_bytes = (4 << 20) + 4
    n_bytes += -(len(value) + 12 + n_bytes) % 32  # what follows stays aligned
    value += struct.pack("<IQ", 8, n_bytes) + b"x" * n_bytes
    (n_keys,) = struct.unpack_from("<Q", content, 16)
    path = tmp_path / "model.gguf"
    path.write_bytes(content[:16] + struct.pack("<Q", n_keys + 1) + value + content[24:])
    with pytest.raises(GptcError, match=r"is an array or too long, not a text$"):
        open_model(path).tokenizer()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "openai-hparams"])
def test_json_that_is_too_long_names_its_limit(
    targets: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A text with one emoji takes 4 times its bytes, and its strings again."""
    target = targets[name]
    original = target.file.read_bytes()
    begin = 8 if name == "model.safetensors" else 0
    end = begin + int.from_bytes(original[:begin], "little") if begin else len(original)
    longer = original[begin:end].rstrip()[:-1] + b', "zz": "' + b"x" * 9000 + b'"}   '
    longer += b" " * (-len(longer) % 8)
    head = len(longer).to_bytes(8, "little") if begin else b""
    monkeypatch.setenv("GPTC_LIMITS", "json=8K")
    try:
        target.read()
        target.file.write_bytes(head + longer + original[end:])
        with pytest.raises(GptcError, match=r"exceeds the limit of 8,000 bytes for JSON"):
            target.read()
    finally:
        target.file.write_bytes(original)


# ---- wrong numbers ----


HOSTILE = [-1, 0, 2**31 - 1, -(2**31), 2**31, 2**63, 2**64 - 1]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    ("name", "fields", "code"),
    [
        ("llm.c", range(0, 32, 4), "I"),
        ("llama2.c-v0", range(0, 28, 4), "I"),
        ("llama2.c-v1", range(0, 36, 4), "I"),
        ("llama2.c-v2", [*range(0, 36, 4), 37], "I"),
        ("heimerl", range(0, 16, 4), "I"),
        ("qgpt", range(4, 20, 4), "I"),
        ("gguf", [8, 16, 24], "Q"),
        ("gguf", [4], "I"),
        ("model.safetensors", [0], "Q"),
    ],
)
def test_counts_that_no_file_can_have(
    targets: dict[str, Any], name: str, fields: list[int], code: str, value: int
) -> None:
    target = targets[name]
    original = target.file.read_bytes()
    try:
        for offset in fields:
            data = bytearray(original)
            size = struct.calcsize(code)
            data[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            target.file.write_bytes(data)
            with pytest.raises(GptcError) as caught:
                target.read()
            message = str(caught.value)
            assert target.file.name in message, (offset, message)
            assert "byte" in message or "config.json" in message, (offset, message)
    finally:
        target.file.write_bytes(original)


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


def test_scales_that_are_not_finite(targets: dict[str, Any]) -> None:
    for name, scale, width in (("gguf-q8_0", b"\x00\x7e", 2), ("llama2.c-v2", b"\0\0\xc0\x7f", 4)):
        target = targets[name]
        original = target.file.read_bytes()
        if name == "gguf-q8_0":
            at = open_model(target.file).tensors.entries["token_embd.weight"].offset
        else:
            entry = open_model(target.file).tensors.entries["tok_embeddings"]
            at = entry.offset + 256 * 32
        try:
            target.file.write_bytes(original[:at] + scale + original[at + width :])
            with pytest.raises(
                GptcError, match=f"at byte {at if width == 2 else 0:,}|scale 0 is not"
            ):
                open_model(target.file).read("wte.weight")
        finally:
            target.file.write_bytes(original)


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


def test_a_million_keys_are_refused_at_once(tmp_path: Path) -> None:
    header = "{" + ",".join(f'"{i}":0' for i in range(1_000_000)) + "}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(container(header))
    one = key("k000000", 7, b"\1").replace(b"000000", b"%06d")
    keys = [one % i for i in range(1_000_000)]
    other = tmp_path / "x.gguf"
    other.write_bytes(gguf(keys, [tensor("a", (8,))], DATA))
    why = r"limit of 500,000 JSON values|1,000,000; it must be"
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


@pytest.mark.parametrize("value", ["[" * 1000 + "]" * 1000, '{"a":' * 2000 + "1" + "}" * 2000])
def test_json_nested_a_thousand_deep(targets: dict[str, Any], value: str) -> None:
    for name in ("config.json", "checksums.json", "gptc_tokenizer.json", "sharded-index"):
        target = targets[name]
        original = target.file.read_bytes()
        try:
            for content in (value, '{"x": ' + value + "}"):
                target.file.write_text(content)
                with pytest.raises(GptcError):
                    target.read()
        finally:
            target.file.write_bytes(original)
    with pytest.raises(GptcError, match="not JSON from byte 1 on"):
        parse_json(b'{"a', "it")


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


# ---- other than regular files ----


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_regular_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(GptcError):
        open_checkpoint(path)
    with pytest.raises(GptcError, match=r"is not a file|cannot read"):
        open_model(path)
    with pytest.raises(GptcError):
        verify(path)


def test_a_config_that_promises_more_than_the_weights_allocates_nothing(
    targets: dict[str, Any],
) -> None:
    target = targets["config.json"]
    original = target.file.read_bytes()
    config = json.loads(original)
    try:
        config |= {"num_hidden_layers": 1000, "vocab_size": 1 << 24, "hidden_size": 1 << 15}
        target.file.write_text(json.dumps(config))
        tracemalloc.start()
        begin = time.process_time()
        with pytest.raises(GptcError, match=r"has the shape .*, not|lacks the tensor"):
            load_model(open_checkpoint(target.file.parent))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        assert time.process_time() - begin < 5
    finally:
        tracemalloc.stop()
        target.file.write_bytes(original)


def test_numbers_that_are_no_floats(targets: dict[str, Any]) -> None:
    target = targets["config.json"]
    original = target.file.read_bytes()
    for value in (10**400, float("inf"), float("nan"), -1, "x", [], {}, None, True):
        for name in ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "rope_parameters"):
            target.file.write_text(json.dumps({**json.loads(original), name: value}))
            with contextlib.suppress(GptcError):
                target.read()
    target.file.write_bytes(original)
    assert np.isfinite(open_checkpoint(target.file.parent).read("wte.weight")).all()


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "model.safetensors", "ckpt.pt"])
def test_a_pointer_of_git_lfs_is_named(gptc: Any, tmp_path: Path, name: str) -> None:
    """As `git clone` without Git LFS leaves it in the place of a large file."""
    folder = make_checkpoint(make_config("llama"), "bytes", tmp_path / "model").path
    path = folder / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n")
    (folder / "checksums.json").unlink()
    ran = gptc("infer", "-m", folder if name == "model.safetensors" else path, "-p", "a")
    assert ran.code == 1
    assert (
        f"{path} is a pointer of Git LFS to a file, and not the file: run git lfs pull" in ran.err
    )
