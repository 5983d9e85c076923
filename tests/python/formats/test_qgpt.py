"""A browser model of markusheimerl/gpt has its layout byte by byte, independent of our writer."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.registry import open_model
from small_models import make_checkpoint

C, F, L, V = 16, 24, 2, 256
HEADER = struct.pack("<4s4i2B", b"QGPT", C, F, L, V, 1, 1)
Config = Callable[..., GPTConfig]


def matrix(rng: np.random.Generator, n_rows: int, n_cols: int) -> tuple[bytes, Any]:
    """A matrix as the file has it, and its numbers."""
    quanta = rng.integers(-127, 128, (n_rows, n_cols)).astype(np.int8)
    scales = rng.random(n_rows, np.float32)
    stored = struct.pack("<2i", n_rows, n_cols) + quanta.tobytes() + scales.tobytes()
    return stored, scales[:, None] * quanta.astype(np.float32)


@pytest.fixture
def by_hand(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A file, and its matrices by name."""
    rng = np.random.default_rng(5)
    shapes = {"emb": (V, C)}
    for layer in range(L):
        shapes |= {f"{layer}.{name}": (C, C) for name in ("Wq", "Wk", "Wv", "Wo")}
        shapes |= {f"{layer}.W1": (F, C), f"{layer}.W2": (C, F)}
    content, kept = HEADER, {}
    for name, shape in shapes.items():
        stored, kept[name] = matrix(rng, *shape)
        content += stored
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    return path, kept


def test_a_file_by_hand(by_hand: tuple[Path, dict[str, Any]]) -> None:
    path, kept = by_hand
    source = open_model(path)
    assert (source.format, source.config.pos, source.config.tied) == ("qgpt", "rope_wide", True)
    assert (source.config.n_head, source.config.block_size) == (8, 1024)
    assert source.tokenizer().kind == "bytes"
    assert np.array_equal(source.read("wte.weight"), kept["emb"])
    assert np.array_equal(source.read("h.1.attn.qkv.weight")[C : 2 * C], kept["1.Wk"])
    assert np.array_equal(source.read("h.0.attn.proj.weight"), kept["0.Wo"])
    assert np.array_equal(source.read("h.1.mlp.fc.weight"), kept["1.W1"])
    assert np.array_equal(source.read("h.1.mlp.proj.weight"), kept["1.W2"])


def test_numbers_that_are_whole_multiples_come_back(
    by_hand: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Rows whose largest number is 127 scales are quantized to the same bytes."""
    path, _ = by_hand
    content = bytearray(path.read_bytes())
    at = len(HEADER)
    while at < len(content):
        n_rows, n_cols = struct.unpack_from("<2i", content, at)
        for row in range(n_rows):
            content[at + 8 + row * n_cols] = 127
        scales = np.full(n_rows, 2**-7, np.float32).tobytes()
        content[at + 8 + n_rows * n_cols : at + 8 + n_rows * (n_cols + 4)] = scales
        at += 8 + n_rows * (n_cols + 4)
    path.write_bytes(content)
    export_model(open_checkpoint(path), "qgpt", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == bytes(content)


@pytest.mark.parametrize(
    ("at", "code", "value", "message"),
    [
        (4, "<i", C + 16, "is damaged: its header promises"),
        (20, "<B", 0, "is_causal at byte 20 is 0"),
        (21, "<B", 2, "use_rope at byte 21 is 2"),
        (26, "<i", C - 1, r"the shape of embedding at byte 22 is \(256, 15\), not \(256, 16\)"),
    ],
)
def test_damage_is_named(
    by_hand: tuple[Path, dict[str, Any]], at: int, code: str, value: int, message: str
) -> None:
    path, _ = by_hand
    content = bytearray(path.read_bytes())
    struct.pack_into(code, content, at, value)
    path.write_bytes(content)
    with pytest.raises(GptcError, match=message):
        open_model(path)


@pytest.mark.parametrize("to", ["qgpt", "heimerl"])
def test_another_number_of_heads_is_said(config: Config, tmp_path: Path, to: str) -> None:
    source = make_checkpoint(config("byte", n_head=2), folder=tmp_path / "source")
    report = export_model(source, to, tmp_path / "out.bin")
    assert any("without the number of heads, 2: " in note for note in report.notes)
