"""GGUF and llama2.c files keep the token that begins a text."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.formats import gguf_tokenizer
from gptc.formats.registry import open_model
from gptc.tokenizer.native import ByteTokenizer
from gptc.tokenizer.patterns import CUTS
from gptc.tokenizer.with_tiktoken import TiktokenTokenizer
from small_models import make_config, varied
from vocabularies import PIECES, begun, llama_like


@pytest.mark.parametrize("bos", [None, 1])
def test_gguf_says_the_same(tmp_path: Path, bos: int | None) -> None:
    tokenizer = begun(llama_like(), bos)
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size)) as model:
        model.save(tmp_path / "source", tokenizer)
    export_model(open_checkpoint(tmp_path / "source"), "gguf", tmp_path / "m.gguf")
    source: Any = open_model(tmp_path / "m.gguf")
    assert source.metadata["tokenizer.ggml.add_bos_token"] is (bos is not None)
    assert source.metadata["tokenizer.ggml.bos_token_id"] == 1
    assert source.tokenizer().bos == bos
    import_model(tmp_path / "m.gguf", tmp_path / "back")
    assert open_checkpoint(tmp_path / "back").tokenizer().bos == bos


def test_gguf_where_nothing_is_said() -> None:
    """llama.cpp: SentencePiece begins with token 1, Llama 3 with its token, others with none."""
    values = gguf_tokenizer.to_gguf(llama_like(), len(PIECES))
    assert gguf_tokenizer.from_gguf(values, "it").bos is None
    for key in ("add_bos_token", "bos_token_id"):
        del values[key]
    assert gguf_tokenizer.from_gguf(dict(values), "it").bos == 1
    assert gguf_tokenizer.from_gguf({**values, "bos_token_id": 2}, "it").bos == 2
    for wrong in (10**6, -1, "1", [1]):
        assert gguf_tokenizer.from_gguf({**values, "bos_token_id": wrong}, "it").bos is None
    special = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257}
    ranked = [bytes([i]) for i in range(256)]
    for pre, bos in (("llama-bpe", 256), ("gpt-2", None), ("smollm", None)):
        pattern = CUTS[pre].patterns[0]
        values = gguf_tokenizer.to_gguf(
            begun(TiktokenTokenizer("it", pattern, ranked, special), 256), 258
        )
        assert (values["add_bos_token"], values["bos_token_id"]) == (True, 256)
        assert gguf_tokenizer.from_gguf(dict(values), "it").bos == 256
        del values["add_bos_token"]
        assert gguf_tokenizer.from_gguf(values, "it").bos == bos


def test_llama2c_always_begins_with_token_1(tmp_path: Path) -> None:
    tokenizer = begun(llama_like())
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size)) as model:
        model.save(tmp_path / "taught", tokenizer)
        model.save(tmp_path / "not", begun(tokenizer, None))
        model.save(tmp_path / "bytes", ByteTokenizer())
    notes = {}
    for name in ("taught", "not", "bytes"):
        source = open_checkpoint(tmp_path / name)
        report = export_model(source, "llama2.c", tmp_path / f"{name}.bin")
        notes[name] = " ".join(report.notes)
    assert notes["taught"] == ""
    assert "begin every text with token 1" in notes["not"]
    assert "begin every text with token 1" in notes["bytes"]
    assert open_model(tmp_path / "taught.bin").tokenizer().bos == 1
    assert open_model(tmp_path / "bytes.bin").tokenizer().bos is None
    # The tokenizer's file is the same, and these programs know no other beginning.
    assert (tmp_path / "taught_tokenizer.bin").read_bytes() == (
        tmp_path / "not_tokenizer.bin"
    ).read_bytes()


def test_a_file_of_llama2cs_own_begins_with_token_1(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    with varied(make_config("llama", vocab_size=260)) as model:
        model.save(tmp_path / "source", None)
    export_model(open_checkpoint(tmp_path / "source"), "llama2.c", tmp_path / "stories.bin")
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{i:02X}>".encode() for i in range(256))]
    rows = [struct.pack("<fi", -float(i), len(p)) + p for i, p in enumerate([*pieces, b" "])]
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 7) + b"".join(rows))
    import_model(tmp_path / "stories.bin", tmp_path / "stories")
    for path in (tmp_path / "stories.bin", tmp_path / "stories"):
        assert open_checkpoint(path).tokenizer().bos == 1
