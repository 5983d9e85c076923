"""OpenAI's folders are read, and their checksums are verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fuzzing import openai_files
from gptc.convert.verify import verify
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.openai_tf import crc32c
from gptc.formats.registry import open_model
from gptc.tokenizer.byte_level import to_characters
from small_models import make_checkpoint

Config = Callable[..., GPTConfig]

RNG = np.random.default_rng(5)


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


def test_openai_folders(config: Config, tmp_path: Path) -> None:
    source = make_checkpoint(config("gpt2"), folder=tmp_path / "source")
    folder = tmp_path / "124M"
    openai_files.write_openai(folder, source)
    ours = open_model(folder)
    assert ours.config == source.config
    for name, _, _ in source.config.parameters():
        assert np.array_equal(ours.read(name), source.read(name)), name
    assert "28 checksums are right" in verify(folder)["checks"]
    data = folder / "model.ckpt.data-00000-of-00001"
    raw = bytearray(data.read_bytes())
    raw[1000] ^= 1
    data.write_bytes(raw)
    with pytest.raises(GptcError, match="does not have the checksum of the index"):
        verify(folder)
    with pytest.raises(GptcError, match="comes without a tokenizer"):
        ours.tokenizer()


def test_another_vocabulary_than_gpt2s_is_read(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    source = make_checkpoint(config("gpt2", vocab_size=50257, n_embd=8), "", tmp_path / "source")
    openai_files.write_openai(tmp_path / "m", source)
    vocab = {to_characters(bytes([i])): i for i in range(256)} | {"th": 256, "<|endoftext|>": 257}
    (tmp_path / "m" / "encoder.json").write_text(json.dumps(vocab))
    (tmp_path / "m" / "vocab.bpe").write_text("#version: 0.2\nt h\n")
    tokenizer = open_model(tmp_path / "m").tokenizer()
    assert tokenizer.encode("that<|endoftext|>").tolist() == [256, 97, 116, 257]
