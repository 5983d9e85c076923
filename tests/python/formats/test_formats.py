"""Layouts byte by byte, independent of our writers: files made by hand or by other programs."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_hostile import fuzz
from test_interchange import make
from test_tokenizer import gpt2_folder

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.verify import verify
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats import gguf_tokenizer, llmc
from gptc.formats.hf_tokenizer import hf_files
from gptc.formats.numbers import BF16, F16, Q4_0, Q8_0, Int8Groups
from gptc.formats.openai_tf import crc32c
from gptc.formats.registry import open_model
from gptc.tokenizer.native import BpeTokenizer
from gptc.tokenizer.pretrained import HuggingFaceTokenizer
from gptc.tokenizer.registry import make_tokenizer

Config = Callable[..., GPTConfig]
RNG = np.random.default_rng(5)
LLAMA_TOKENIZER = Path(__file__).parents[4] / "shared" / "data" / "llama2-tokenizer.model"


def random(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.normal(0, 0.3, shape).astype(np.float32)


# ---- numbers ----


def test_bf16_rounds_to_even_and_keeps_nan() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001, 0xFF7FFFFF, 0], np.uint32)
    stored = np.frombuffer(BF16.encode(bits.view(np.float32)), np.uint16)
    assert stored.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7FC0, 0xFF80, 0]


def test_quantized_blocks_are_ggmls() -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    values = random(7, 96) * np.float32(3)
    values[0, :32] = 0
    kind = constants.GGMLQuantizationType
    for ours, theirs in (
        (Q8_0, kind.Q8_0),
        (Q4_0, kind.Q4_0),
        (BF16, kind.BF16),
        (F16, kind.F16),
    ):
        expected = quants.quantize(values, theirs)
        assert bytes(ours.encode(values)) == expected.tobytes(), ours.name
        raw = np.frombuffer(expected.tobytes(), np.uint8)
        assert np.array_equal(ours.decode(raw, (7, 96)), quants.dequantize(expected, theirs))


def test_groups_of_int8() -> None:
    values = np.array([[127, -127, 1, 0.5], [0, 0, 0, 0]], np.float32)
    stored = bytes(Int8Groups(4).encode(values))
    assert stored == struct.pack("<8b2f", 127, -127, 1, 0, 0, 0, 0, 0, 1, 0)
    again = Int8Groups(4).decode(np.frombuffer(stored, np.uint8), (2, 4))
    assert again.tolist() == [[127, -127, 1, 0], [0, 0, 0, 0]]


def test_checksums_of_any_length() -> None:
    def plain(data: bytes) -> int:
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        return crc ^ 0xFFFFFFFF

    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # RFC 3720's own example
    for n in (0, 1, 4096 * 17 - 1, 4096 * 17, 4096 * 19 + 7):
        data = RNG.integers(0, 256, n).astype(np.uint8)
        assert crc32c(data) == plain(data.tobytes()), n


# ---- llm.c ----


def llmc_bytes(version: int) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    """A model file as formats.md describes it: T 6, V 130 padded to 256, L 2, NH 2, C 8."""
    T, V, L, NH, C, Vp = 6, 130, 2, 2, 8, 256
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, version, T, V, L, NH, C, Vp
    wte = random(Vp, C)
    wte[V:] = 0
    tensors = {"wte": wte, "wpe": random(T, C)}
    for name, shape in [
        ("ln_1.weight", (L, C)), ("ln_1.bias", (L, C)), ("attn.c_attn.weight", (L, 3 * C, C)),
        ("attn.c_attn.bias", (L, 3 * C)), ("attn.c_proj.weight", (L, C, C)),
        ("attn.c_proj.bias", (L, C)), ("ln_2.weight", (L, C)), ("ln_2.bias", (L, C)),
        ("mlp.c_fc.weight", (L, 4 * C, C)), ("mlp.c_fc.bias", (L, 4 * C)),
        ("mlp.c_proj.weight", (L, C, 4 * C)), ("mlp.c_proj.bias", (L, C)),
        ("ln_f.weight", (C,)), ("ln_f.bias", (C,)),
    ]:  # fmt: skip
        tensors[name] = random(*shape)
    if version == 3:
        return header.tobytes() + b"".join(t.tobytes() for t in tensors.values()), tensors
    halves = {name: (t.view(np.uint32) >> 16).astype("<u2") for name, t in tensors.items()}
    body = b"".join(t.tobytes() for t in halves.values())
    wide = {name: (h.astype(np.uint32) << 16).view(np.float32) for name, h in halves.items()}
    return header.tobytes() + body, wide


@pytest.mark.parametrize("version", [3, 5])
def test_llmc_by_hand(tmp_path: Path, version: int) -> None:
    content, tensors = llmc_bytes(version)
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    source = open_model(path)
    assert isinstance(source, llmc.LlmcModel)
    config = source.config
    assert (config.block_size, config.vocab_size, config.n_layer, config.n_head) == (6, 130, 2, 2)
    assert np.array_equal(source.read("wte.weight"), tensors["wte"][:130])
    assert np.array_equal(source.read("h.1.attn.qkv.weight"), tensors["attn.c_attn.weight"][1])
    assert np.array_equal(source.read("h.0.mlp.proj.weight"), tensors["mlp.c_proj.weight"][0])
    assert np.array_equal(source.read("h.1.norm_2.bias"), tensors["ln_2.bias"][1])
    assert np.array_equal(source.read("norm_f.bias"), tensors["ln_f.bias"])
    # Our writer makes the same bytes.
    dtype = "fp32" if version == 3 else "bf16"
    assert b"".join(map(bytes, llmc.model_chunks(source, dtype))) == content


def test_llmc_tokenizer_by_hand(tmp_path: Path) -> None:
    header = np.zeros(256, "<u4")
    pieces = [*(bytes([i]) for i in range(256)), b"th", b"the", b"<|endoftext|>"]
    header[:4] = 20240328, 2, len(pieces), 258
    path = tmp_path / "t.bin"
    content = header.tobytes() + b"".join(bytes([len(p)]) + p for p in pieces)
    path.write_bytes(content)
    tokenizer = llmc.read_tokenizer(path)
    assert isinstance(tokenizer, BpeTokenizer)
    assert tokenizer.encode("the th<|endoftext|>").tolist() == [257, 32, 256, 258]
    assert b"".join(llmc.tokenizer_chunks(tokenizer)) == content


def test_llmc_debug_state(config: Config, tmp_path: Path) -> None:
    source = make(config("gpt2"), folder=tmp_path / "source")
    report = export_model(source, "llm.c", tmp_path / "m.bin", debug_state=True)
    assert [file.name for file in report.files] == [
        "m.bin", "m_tokenizer.bin", "m_debug_state.bin",
    ]  # fmt: skip
    raw = (tmp_path / "m_debug_state.bin").read_bytes()
    B, T, V, C = 4, 48, 256, 32
    assert struct.unpack("<4i", raw[:16]) == (20240327, 2, B, T)
    inputs = np.frombuffer(raw, "<i4", B * T, 1024).reshape(B, T)
    with load_model(source, training=True, max_batch=B, threads=1) as model:
        at = 1024 + 8 * B * T
        logits = np.frombuffer(raw, "<f4", B * T * V, at).reshape(B, T, V)
        assert np.abs(logits - model.logits(inputs)).max() < 1e-5
        targets = np.frombuffer(raw, "<i4", B * T, 1024 + 4 * B * T).reshape(B, T)
        loss = model.backward(inputs, targets)
        at += 4 * B * T * V
        assert np.frombuffer(raw, "<f4", 1, at)[0] == pytest.approx(loss)
        dwte = np.frombuffer(raw, "<f4", 256 * C, at + 4).reshape(256, C)
        assert np.abs(dwte - model.read("wte.weight", "grad")).max() < 1e-5
    assert "gradients off by at most" in " ".join(verify(tmp_path / "m_debug_state.bin")["checks"])


# ---- llama2.c ----


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_v0_by_hand(tmp_path: Path, tied: bool) -> None:
    C, F, L, NH, NKV, V, T = 16, 24, 2, 4, 2, 50, 6
    HS, kv = C // NH, NKV * (C // NH)
    sizes = struct.pack("<7i", C, F, L, NH, NKV, V if tied else -V, T)
    shapes = [
        ("emb", (V, C)), ("att_norm", (L, C)), ("wq", (L, C, C)), ("wk", (L, kv, C)),
        ("wv", (L, kv, C)), ("wo", (L, C, C)), ("ffn_norm", (L, C)), ("w1", (L, F, C)),
        ("w2", (L, C, F)), ("w3", (L, F, C)), ("norm", (C,)), ("freq", (2, T, HS // 2)),
    ]  # fmt: skip
    tensors = {name: random(*shape) for name, shape in shapes}
    if not tied:
        tensors["head"] = random(V, C)
    path = tmp_path / "m.bin"
    path.write_bytes(sizes + b"".join(t.tobytes() for t in tensors.values()))
    source = open_model(path)
    assert (source.format, source.config.tied, source.config.n_kv_head) == ("llama2.c", tied, 2)
    qkv = source.read("h.1.attn.qkv.weight")
    # Rows 2i and 2i + 1 of a head become i and i + HS/2.
    for head in range(NH):
        theirs = tensors["wq"][1, head * HS : (head + 1) * HS]
        assert np.array_equal(qkv[head * HS : (head + 1) * HS], theirs[[0, 2, 1, 3]])
    assert np.array_equal(qkv[C : C + HS], tensors["wk"][1, :HS][[0, 2, 1, 3]])
    assert np.array_equal(qkv[C + kv :], tensors["wv"][1])
    assert np.array_equal(
        source.read("h.0.mlp.fc.weight"), np.concatenate([tensors["w1"][0], tensors["w3"][0]])
    )
    assert np.array_equal(source.read("h.0.mlp.proj.weight"), tensors["w2"][0])
    assert np.array_equal(source.read("norm_f.weight"), tensors["norm"])
    if not tied:
        assert np.array_equal(source.read("lm_head.weight"), tensors["head"])
    assert verify(path)["format"] == "llama2.c"


def test_llama2c_headers_and_norms_first(config: Config, tmp_path: Path) -> None:
    source = make(config("llama"), folder=tmp_path / "source")
    for version, dtype in ((1, "fp32"), (2, "int8")):
        path = tmp_path / f"v{version}.bin"
        export_model(source, "llama2.c", path, dtype=dtype, version=version)
        raw = path.read_bytes()
        head = struct.unpack_from("<Ii7iB", raw)
        assert head == (0x616B3432, version, 32, 40, 2, 4, 2, 256, 48, 0)
        assert struct.unpack_from("<i", raw, 37)[0] == (8 if version == 2 else 0)
        norms = np.frombuffer(raw, "<f4", 5 * 32, 256).reshape(5, 32)
        assert np.array_equal(norms[1], source.read("h.1.norm_1.weight"))
        assert np.array_equal(norms[2], source.read("h.0.norm_2.weight"))
        assert np.array_equal(norms[4], source.read("norm_f.weight"))
        if version == 2:
            quanta = np.frombuffer(raw, np.int8, 256 * 32, 256 + norms.nbytes).reshape(-1, 8)
            scales = np.frombuffer(raw, "<f4", 256 * 4, 256 + norms.nbytes + 256 * 32)
            wte = (quanta * scales[:, None]).reshape(256, 32)
            assert np.abs(wte - source.read("wte.weight")).max() <= scales.max() / 2 * 1.001


def test_llama2c_tokenizer_by_hand(tmp_path: Path, config: Config) -> None:
    source = make(config("llama", vocab_size=260), "", tmp_path / "source")
    path = tmp_path / "m.bin"
    export_model(source, "llama2.c", path)
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{i:02X}>".encode() for i in range(256))]
    pieces += [b" "]
    rows = [struct.pack("<fi", -float(i), len(p)) + p for i, p in enumerate(pieces)]
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 7) + b"".join(rows))
    pytest.importorskip("sentencepiece")
    tokenizer = open_model(path).tokenizer()
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.decode(tokenizer.encode("ab")) == " ab"
    assert tokenizer.end_of_text == 2


def test_llama2c_padding_is_no_empty_piece(tmp_path: Path, config: Config) -> None:
    """llama2.c's run reads each piece by fread(…, length, 1, …) == 1, which fails for length 0."""
    source = make(config("llama", vocab_size=320), "bytes", tmp_path / "source")
    export_model(source, "llama2.c", tmp_path / "m.bin")
    raw, at, pieces = (tmp_path / "m_tokenizer.bin").read_bytes(), 4, []
    while at < len(raw):
        (length,) = struct.unpack_from("<i", raw, at + 4)
        pieces.append(raw[at + 8 : at + 8 + length])
        at += 8 + length
    assert len(pieces) == 320
    assert all(pieces)
    assert set(pieces[256:]) == {b"\0"}
    assert open_model(tmp_path / "m.bin").tokenizer().pieces == source.tokenizer().pieces


# ---- markusheimerl/gpt ----


def test_heimerl_by_hand(tmp_path: Path) -> None:
    C, F, L, V, step = 16, 24, 2, 256, 7
    kept: dict[str, np.ndarray[Any, Any]] = {}
    out = bytearray()

    def tensor(name: str, *shape: int) -> None:
        kept[name] = random(*shape)
        out.extend(kept[name].tobytes())

    out += struct.pack("<4i", C, F, L, V)
    tensor("emb", V, C)
    out += struct.pack("<i", step)
    tensor("emb.m", V, C)
    tensor("emb.v", V, C)
    out += struct.pack("<3i2B", C, F, L, 1, 1)
    for layer in range(L):
        out += struct.pack("<i2B", C, 1, 1)
        for name in ("Wq", "Wk", "Wv", "Wo"):
            tensor(f"{layer}.{name}", C, C)
        out += struct.pack("<i", step)
        for name in ("Wq", "Wk", "Wv", "Wo"):
            tensor(f"{layer}.{name}.m", C, C)
            tensor(f"{layer}.{name}.v", C, C)
        out += struct.pack("<3i", C, F, C)
        tensor(f"{layer}.W1", C, F)
        tensor(f"{layer}.W2", F, C)
        out += struct.pack("<i", step)
        for name, shape in (("W1", (C, F)), ("W2", (F, C))):
            tensor(f"{layer}.{name}.m", *shape)
            tensor(f"{layer}.{name}.v", *shape)
    path = tmp_path / "2025_gpt.bin"
    path.write_bytes(out)
    source = open_model(path)
    assert (source.format, source.optimizer_step) == ("heimerl", step)
    assert (source.config.n_head, source.config.block_size, source.config.pos) == (
        8, 1024, "rope_wide",
    )  # fmt: skip
    assert np.array_equal(source.read("wte.weight"), kept["emb"])
    assert np.array_equal(source.read("h.1.attn.qkv.weight")[C : 2 * C], kept["1.Wk"].T)
    assert np.array_equal(source.read("h.0.attn.proj.weight"), kept["0.Wo"].T)
    assert np.array_equal(source.read("h.1.mlp.fc.weight"), kept["1.W1"].T)
    assert np.array_equal(source.read_moment("h.1.mlp.proj.weight", "v"), kept["1.W2.v"].T)
    assert np.array_equal(source.read_moment("wte.weight", "m"), kept["emb.m"])
    assert source.tokenizer().kind == "bytes"
    broken = bytearray(out)
    broken[16 + 3 * 4 * V * C + 4 + 12] = 0  # is_causal of the transformer
    path.write_bytes(broken)
    with pytest.raises(GptcError, match=r"transformer\.is_causal at byte .* is 0, not 1"):
        open_model(path)


# ---- GGUF beside the package gguf ----


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8_0", "q4_0"])
def test_the_package_gguf_reads_ours(
    config: Config, tmp_path: Path, family: str, dtype: str
) -> None:
    gguf = pytest.importorskip("gguf")
    source = make(config(family), folder=tmp_path / "source")
    export_model(source, "gguf", tmp_path / "m.gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    ours = open_model(tmp_path / "m.gguf")
    assert len(reader.tensors) == len(ours.tensors.shapes)
    for tensor in reader.tensors:
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = ours.tensors.read(tensor.name)
        assert np.array_equal(theirs.reshape(expected.shape), expected), tensor.name
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == family
    assert fields[f"{family}.context_length"] == 48
    assert len(fields["tokenizer.ggml.tokens"]) == 256
    assert fields["tokenizer.ggml.token_type"] == [1] * 256


def test_ours_reads_what_the_package_gguf_writes(config: Config, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = make(config("llama"), folder=tmp_path / "source")
    shape = source.config
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_kv_head)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_custom_alignment(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(68)]
    writer.add_token_list([*letters, "th"])
    writer.add_token_merges(["t h"])
    names = {"norm_1": "attn_norm", "norm_2": "ffn_norm", "attn.proj": "attn_output"}
    names["mlp.proj"] = "ffn_down"
    q4_0 = gguf.GGMLQuantizationType.Q4_0

    def pairs(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
        """As llama.cpp's converter permutes queries and keys."""
        n = rows.shape[0] // heads
        return rows.reshape(heads, 2, n // 2, -1).swapaxes(1, 2).reshape(rows.shape)

    writer.add_tensor("token_embd.weight", source.read("wte.weight"))
    writer.add_tensor("output_norm.weight", source.read("norm_f.weight"))
    writer.add_tensor("output.weight", source.read("lm_head.weight"))
    for i in range(shape.n_layer):
        for ours, theirs in names.items():
            writer.add_tensor(f"blk.{i}.{theirs}.weight", source.read(f"h.{i}.{ours}.weight"))
        qkv, fc = source.read(f"h.{i}.attn.qkv.weight"), source.read(f"h.{i}.mlp.fc.weight")
        writer.add_tensor(f"blk.{i}.attn_q.weight", pairs(qkv[:32], 4))
        writer.add_tensor(f"blk.{i}.attn_k.weight", pairs(qkv[32:48], 2))
        writer.add_tensor(
            f"blk.{i}.attn_v.weight", gguf.quants.quantize(qkv[48:], q4_0), raw_dtype=q4_0
        )
        writer.add_tensor(f"blk.{i}.ffn_gate.weight", fc[:40].astype(np.float16))
        writer.add_tensor(f"blk.{i}.ffn_up.weight", fc[40:])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = open_model(tmp_path / "m.gguf")
    assert ours.config == shape
    for name, _, _ in shape.parameters():
        expected = source.read(name)
        if name.endswith("mlp.fc.weight"):
            expected = np.concatenate([expected[:40].astype(np.float16), expected[40:]])
        if name.endswith("attn.qkv.weight"):
            packed = gguf.quants.quantize(expected[48:], q4_0)
            values = gguf.quants.dequantize(packed, q4_0)
            assert 0 < np.abs(values - expected[48:]).max() < 0.3
            expected = np.concatenate([expected[:48], values])
        assert np.array_equal(ours.read(name), expected), name
    with pytest.raises(GptcError, match=r"has 257 tokens, and a model of 256"):
        ours.tokenizer()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "char", "gpt2", "llama"])
def test_tokenizers_go_through_gguf(
    config: Config, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ["the cat sat on the mat and the hat; " * 30]
    if kind == "llama":
        pytest.importorskip("sentencepiece")
        if not LLAMA_TOKENIZER.is_file():
            pytest.skip("no llama2-tokenizer.model")
    if kind == "gpt2":
        if gpt2_folder() is None:
            pytest.skip("no GPT-2 vocabulary")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    spec = {"llama": str(LLAMA_TOKENIZER), "bpe": "bpe:300"}.get(kind, kind)
    tokenizer = make_tokenizer(spec, [text[0].encode()])
    shape = config("llama", vocab_size=tokenizer.vocab_size + 3)
    source = make(shape, "", tmp_path / "source")
    tokenizer.save(source.path)
    (source.path / "checksums.json").unlink()
    source = Checkpoint(source.path)
    assert export_model(source, "gguf", tmp_path / "m.gguf").notes == []
    again = open_model(tmp_path / "m.gguf").tokenizer()
    for line in (text[0], "the cat  sat, on\n\n" if kind != "char" else "the mat"):
        assert again.encode(line).tolist() == tokenizer.encode(line).tolist()
    if kind != "llama":
        assert again.fingerprint() == tokenizer.fingerprint()
    assert again.end_of_text == tokenizer.end_of_text
    export_model(source, "llama2.c", tmp_path / "m.bin")
    third = open_model(tmp_path / "m.bin").tokenizer()
    assert third.encode(text[0]).tolist() == tokenizer.encode(text[0]).tolist()


def test_a_tokenizer_json_of_llama_2s_sort_goes_through_gguf() -> None:
    """As TinyLlama publishes it: pieces of text, and bytes for what they lack."""
    pytest.importorskip("sentencepiece")
    if not LLAMA_TOKENIZER.is_file():
        pytest.skip("no llama2-tokenizer.model")
    theirs = make_tokenizer(str(LLAMA_TOKENIZER))
    definition = hf_files(theirs, 48)["tokenizer.json"].decode()
    ours = HuggingFaceTokenizer(definition)
    again = gguf_tokenizer.from_gguf(gguf_tokenizer.to_gguf(ours, 32_000), "it")
    for text in ("Once upon a time, 東京 😀", "  the cat\n\nsat", "don't 123"):
        expected = theirs.encode(text).tolist()
        assert ours.encode(text).tolist() == expected
        assert again.encode(text).tolist() == expected


def test_a_tokenizer_that_sets_digits_apart_goes_through_gguf() -> None:
    """As SmolLM's: every digit alone, then GPT-2's pattern in what is left between them."""
    tokenizers = pytest.importorskip("tokenizers")
    steps = tokenizers.pre_tokenizers
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = steps.Sequence(
        [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)]
    )
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],  # first, as there
        initial_alphabet=steps.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(
        ["the cat's 12  hats;   the mat\n\n  sat  !!  they'll 東京 "] * 9, trainer
    )
    ours = HuggingFaceTokenizer(theirs.to_str())
    values = gguf_tokenizer.to_gguf(ours, 400)
    assert values["pre"] == "smollm"
    again = gguf_tokenizer.from_gguf(values, "it")
    parts = [*"a1 2\n\t'!²Ⅷ½٣", "the", "  ", "cat", "'s", "'ll", "東京", "\u3000", "<|endoftext|>"]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = "".join(rng.choice(parts, rng.integers(1, 12)))
        assert again.encode(text).tolist() == theirs.encode(text).ids
    # Another order of the same steps, or digits in groups, is not that.
    for wrong in (
        [steps.ByteLevel(add_prefix_space=False), steps.Digits(individual_digits=True)],
        [steps.Digits(individual_digits=False), steps.ByteLevel(add_prefix_space=False)],
        [steps.Whitespace(), steps.ByteLevel(add_prefix_space=False)],
    ):
        theirs.pre_tokenizer = steps.Sequence(wrong)
        with pytest.raises(GptcError, match=r"llama\.cpp has no"):
            gguf_tokenizer.to_gguf(HuggingFaceTokenizer(theirs.to_str()), 400)


def test_gpt2s_tokenizer_is_known_by_its_merges(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published folders hold a tokenizer.json; datasets are made with our "gpt2"."""
    if gpt2_folder() is None:
        pytest.skip("no GPT-2 vocabulary")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    tokenizer = make_tokenizer("gpt2")
    shape = config("gpt2", vocab_size=50257)
    source = make(shape, "gpt2", tmp_path / "source")
    for name in ("gptc_tokenizer.json", "checksums.json"):
        (source.path / name).unlink()
    # With nothing but that file: its merges go into our own cache.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    again = Checkpoint(source.path).tokenizer()
    assert again.kind == "gpt2"
    assert again.encode("Hello world").tolist() == tokenizer.encode("Hello world").tolist()


# ---- OpenAI's folders ----


def test_openai_folders(config: Config, tmp_path: Path) -> None:
    source = make(config("gpt2"), folder=tmp_path / "source")
    folder = tmp_path / "124M"
    fuzz.write_openai(folder, source)
    ours = open_model(folder)
    assert ours.config == source.config
    for name, _, _ in source.config.parameters():
        assert np.array_equal(ours.read(name), source.read(name)), name
    assert "28 checksums are right" in verify(folder)["checks"]
    data = folder / "model.ckpt.data-00000-of-00001"
    raw = bytearray(data.read_bytes())
    raw[1000] ^= 1
    data.write_bytes(raw)
    with pytest.raises(GptcError, match="has another checksum than the index says"):
        verify(folder)
    with pytest.raises(GptcError, match="comes without a tokenizer"):
        ours.tokenizer()


# ---- nanoGPT ----


def test_nanogpt_without_torch_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "ckpt.pt"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(GptcError, match="only PyTorch reads safely: pip install torch"):
        open_model(path)


@pytest.mark.parity
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_nanogpt(config: Config, tmp_path: Path) -> None:
    import torch

    source = make(config("gpt2", bias=False), folder=tmp_path / "source")
    weights = {}
    for name, _, _ in source.config.parameters():
        theirs = name.replace("attn.qkv", "attn.c_attn").replace("attn.proj", "attn.c_proj")
        theirs = theirs.replace("mlp.fc", "mlp.c_fc").replace("mlp.proj", "mlp.c_proj")
        theirs = theirs.replace("norm_", "ln_")
        weights[f"_orig_mod.transformer.{theirs}"] = torch.from_numpy(source.read(name).copy())
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "vocab_size": 256}
    saved = {"model": weights, "model_args": {**sizes, "bias": False, "dropout": 0.0},
             "iter_num": 3, "config": {"x": 1}}  # fmt: skip
    path = tmp_path / "ckpt.pt"
    torch.save(saved, path)
    ours = open_model(path)
    assert ours.config == source.config
    for name, _, _ in source.config.parameters():
        assert np.array_equal(ours.read(name), source.read(name)), name

    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({**saved, "config": Harm()}, path)
    with pytest.raises(GptcError, match="PyTorch does not load it"):
        open_model(path)
    assert not (tmp_path / "harm").exists()
    whole = path.read_bytes()
    for n in (5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(GptcError):
            open_model(path)


# ---- the hub ----


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its client needs for one model."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/owner/tiny"):
            names = [{"rfilename": name} for name in self.files]
            listed = {"id": "owner/tiny", "sha": "0" * 40, "siblings": names, "private": False}
            if "/tree/" in self.path:
                entries = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40}
                           for n, d in self.files.items()]  # fmt: skip
                return self.reply(json.dumps(entries).encode(), "application/json")
            return self.reply(json.dumps(listed).encode(), "application/json")
        data = self.files.get(self.path.rpartition("/")[2])
        if data is None or "owner/tiny" not in self.path:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return self.reply(data, "application/octet-stream")

    do_HEAD = do_GET

    def reply(self, data: bytes, kind: str) -> None:
        import hashlib

        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_model_by_its_name_on_the_hub(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    folder = make(config("llama"), folder=tmp_path / "source").path
    Hub.files = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "checksums.json"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    here |= {"HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gptc", *arguments], cwd=tmp_path, text=True,
            capture_output=True, env={**os.environ, **here, **environment}, check=False,
        )  # fmt: skip

    try:
        ran = run("infer", "-m", "owner/tiny", "-p", "Once", "--max-tokens", "3")
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith("Once")
        (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 100)
        sizes = ("--steps", "1", "--batch-size", "1", "--seq-len", "16", "--eval-batches", "1")
        ran = run("train", "--init-from", "owner/tiny", "--data", "text.txt", *sizes)
        assert ran.returncode == 0, ran.stderr
        assert "saved runs/tiny-text/ckpt-000001" in ran.stderr
        ran = run("import", "owner/tiny", "--out", "got")
        assert ran.returncode == 0, ran.stderr
        assert np.array_equal(
            Checkpoint(tmp_path / "got").read("wte.weight"), Checkpoint(folder).read("wte.weight")
        )
        ran = run("info", "got", "--json")
        assert ran.returncode == 0
        ran = run("import", "owner/other", "--out", "no")
        assert ran.returncode == 1
        words = "owner/other does not exist here; check the path. Nor can a model of that name be"
        assert ran.stderr.startswith(f"gptc: error: {words} downloaded: the hub knows no such")
        assert len(ran.stderr.splitlines()) == 1
        ran = run("infer", "-m", "runs/tiny-texd")
        assert "does not exist here; did you mean runs/tiny-text? Nor can" in ran.stderr
    finally:
        server.shutdown()
    again = run("import", "owner/tiny", "--out", "again", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
