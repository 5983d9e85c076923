"""The package gguf reads our files, and we read its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.convert.export_model import export_model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.registry import open_model
from small_models import make_checkpoint

Config = Callable[..., GPTConfig]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8_0", "q4_0"])
def test_the_package_gguf_reads_ours(
    config: Config, tmp_path: Path, family: str, dtype: str
) -> None:
    gguf = pytest.importorskip("gguf")
    source = make_checkpoint(config(family), folder=tmp_path / "source")
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
    source = make_checkpoint(config("llama"), folder=tmp_path / "source")
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
