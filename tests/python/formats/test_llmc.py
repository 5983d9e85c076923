"""Files of llm.c have its layout byte by byte, independent of our writer."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.checkpoint.facade import load_model
from gptc.convert.export_model import export_model
from gptc.convert.verify import verify
from gptc.engine.config import GPTConfig
from gptc.formats import llmc
from gptc.formats.registry import open_model
from gptc.tokenizer.native import BpeTokenizer
from small_models import make_checkpoint, random_values

Config = Callable[..., GPTConfig]


def llmc_bytes(version: int) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    """A model file as formats.md describes it: T 6, V 130 padded to 256, L 2, NH 2, C 8."""
    T, V, L, NH, C, Vp = 6, 130, 2, 2, 8, 256
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, version, T, V, L, NH, C, Vp
    wte = random_values(Vp, C)
    wte[V:] = 0
    tensors = {"wte": wte, "wpe": random_values(T, C)}
    for name, shape in [
        ("ln_1.weight", (L, C)), ("ln_1.bias", (L, C)), ("attn.c_attn.weight", (L, 3 * C, C)),
        ("attn.c_attn.bias", (L, 3 * C)), ("attn.c_proj.weight", (L, C, C)),
        ("attn.c_proj.bias", (L, C)), ("ln_2.weight", (L, C)), ("ln_2.bias", (L, C)),
        ("mlp.c_fc.weight", (L, 4 * C, C)), ("mlp.c_fc.bias", (L, 4 * C)),
        ("mlp.c_proj.weight", (L, C, 4 * C)), ("mlp.c_proj.bias", (L, C)),
        ("ln_f.weight", (C,)), ("ln_f.bias", (C,)),
    ]:  # fmt: skip
        tensors[name] = random_values(*shape)
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
    source = make_checkpoint(config("gpt2"), folder=tmp_path / "source")
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
