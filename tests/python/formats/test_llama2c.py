"""Files of llama2.c have its layout byte by byte, independent of our writer."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptc.convert.export_model import export_model
from gptc.convert.verify import verify
from gptc.engine.config import GPTConfig
from gptc.formats.registry import open_model
from small_models import make_checkpoint, random_values

Config = Callable[..., GPTConfig]


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
    tensors = {name: random_values(*shape) for name, shape in shapes}
    if not tied:
        tensors["head"] = random_values(V, C)
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
    source = make_checkpoint(config("llama"), folder=tmp_path / "source")
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
    source = make_checkpoint(config("llama", vocab_size=260), "", tmp_path / "source")
    path = tmp_path / "m.bin"
    export_model(source, "llama2.c", path)
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{i:02X}>".encode() for i in range(256))]
    pieces += [b" "]
    rows = [struct.pack("<fi", -float(i), len(p)) + p for i, p in enumerate(pieces)]
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 7) + b"".join(rows))
    pytest.importorskip("sentencepiece")
    tokenizer = open_model(path).tokenizer()
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    assert tokenizer.end_of_text == 2


def test_llama2c_padding_is_no_empty_piece(tmp_path: Path, config: Config) -> None:
    """llama2.c's run reads each piece by fread(…, length, 1, …) == 1, which fails for length 0."""
    source = make_checkpoint(config("llama", vocab_size=320), "bytes", tmp_path / "source")
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
