"""A SentencePiece model that does more than merge by scores is kept whole, or left out with a note.

The class: a tokenizer that is written without some of its rules: a normalizer such as NFKC, a
unigram model, pieces that the user has defined.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from small_models import make_config, varied

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "nfkc": {"model_type": "bpe"},
    "spaces": {"model_type": "bpe", **PLAIN, "remove_extra_whitespaces": True},
    "suffixes": {"model_type": "bpe", **PLAIN, "treat_whitespace_as_suffix": True},
    "unigram": {"model_type": "unigram", **PLAIN},
    "named": {"model_type": "bpe", **PLAIN, "user_defined_symbols": ["<mask>", "cat"]},
}
TEXT = "hello     world ﬁ <mask> cat"


def made(folder: Path, kind: str) -> SentencePieceTokenizer:
    """A model with such a tokenizer in `folder`."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat, hello world"] * 9),
        model_writer=out,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **KINDS[kind],
    )
    tokenizer = SentencePieceTokenizer(out.getvalue())
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size)) as model:
        model.save(folder, tokenizer)
    return tokenizer


@pytest.mark.parametrize("kind", list(KINDS))
def test_hugging_face_gets_the_model_itself(kind: str, tmp_path: Path) -> None:
    tokenizer = made(tmp_path / "in", kind)
    export_model(open_checkpoint(tmp_path / "in"), "hf", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.proto
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"  # which reads a .model
    for name in ("gptc_tokenizer.json", "checksums.json"):
        (tmp_path / "out" / name).unlink()
    again = open_checkpoint(tmp_path / "out").tokenizer()
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("to", ["gguf", "llama2.c"])
def test_other_formats_have_a_note(kind: str, to: str, tmp_path: Path) -> None:
    made(tmp_path / "in", kind)
    report = export_model(open_checkpoint(tmp_path / "in"), to, tmp_path / "out.bin")
    assert report.notes[0].startswith("without a tokenizer: this SentencePiece model ")
    assert not (tmp_path / "out_tokenizer.bin").exists()
