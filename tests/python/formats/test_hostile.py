"""Every loader reads a file from strangers or refuses it in one line, in a moment.

Files that are written byte by byte have their tests in test_lies.py.
"""

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
from gptc.formats.registry import open_model
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
def test_accidents(targets: dict[str, Any], name: str) -> None:
    """Tracing takes twice the time of reading, and each tokenizer.json has a process."""
    targets[name].read()  # what this imports is not memory for a file
    cases = range(40 if name == "tokenizer.json" else 80)
    counts = fuzz.fuzz(name, targets[name], cases, seed=0, trace_every=6)
    assert counts["refused"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_truncation_at_every_byte(targets: dict[str, Any], name: str) -> None:
    """The bytes of both ends and some between; tools/fuzz/fuzz.py --truncate cuts at all."""
    target = targets[name]
    original = target.file.read_bytes()
    lengths = {*range(min(len(original), 150)), *range(len(original) - 40, len(original))}
    lengths |= set(range(0, len(original), max(1, len(original) // 75)))
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
