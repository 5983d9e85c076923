"""Files of markusheimerl/gpt have its layout byte by byte, independent of our writer."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.errors import GptcError
from gptc.formats.registry import open_model
from small_models import random_values


def test_heimerl_by_hand(tmp_path: Path) -> None:
    C, F, L, V, step = 16, 24, 2, 256, 7
    kept: dict[str, np.ndarray[Any, Any]] = {}
    out = bytearray()

    def tensor(name: str, *shape: int) -> None:
        kept[name] = random_values(*shape)
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
