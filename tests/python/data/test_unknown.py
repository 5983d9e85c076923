"""Text that a tokenizer has no tokens for is not lost without a word.

The class: line ends in a SentencePiece model of identity normalization, and characters of another
script, become <unk>. A note counts them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc.tokenizer.byte_level import to_characters
from vocabularies import byte_level

Gptc = Callable[..., Any]


def sentencepiece(folder: Path, **options: Any) -> Path:
    spm = pytest.importorskip("sentencepiece")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the king saw the fox and the queen"] * 200),
        model_prefix=str(folder / "m"), model_type="bpe", hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, **options,
    )  # fmt: skip
    return folder / "m.model"


@pytest.mark.parametrize("fallback", [False, True])
def test_unknown_text_is_noted(gptc: Gptc, tmp_path: Path, fallback: bool) -> None:
    size = 300 if fallback else 30
    model = sentencepiece(tmp_path, vocab_size=size, byte_fallback=fallback)
    text = tmp_path / "text.txt"
    text.write_text("the king\nsaw the fox\n" * 100)
    ran = gptc("prepare", text, "--tokenizer", model, "--out", tmp_path / "d")
    assert ran.code == 0
    if fallback:
        assert ran.err == ""
    else:
        assert ran.err.startswith("note: 200 tokens (0.1")
        assert "are <unk>: the tokenizer has none for that text, which is lost" in ran.err


def test_unknown_words_of_a_tokenizer_json_are_noted(gptc: Gptc, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "▁the": 1, "▁king": 2, "▁fox": 3}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    own.decoder = tokenizers.decoders.Metaspace()
    own.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("the king the queen the fox " * 50)
    options = ["--tokenizer", tmp_path / "tokenizer.json", "--val-fraction", 0]
    ran = gptc("prepare", text, *options, "--out", tmp_path / "d")
    assert ran.code == 0, ran.err
    assert ran.err.startswith("note: 51 tokens (0.17 of all) are <unk>"), ran.err  # a space too


@pytest.mark.parametrize("chats", [False, True])
def test_bytes_without_a_token_are_counted(gptc: Gptc, tmp_path: Path, chats: bool) -> None:
    """SmolLM2's vocabulary lacks 21 of the bytes, six of which are in texts: 0x04, for one."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    known = [c for c in alphabet if c not in (to_characters(b"\x04"), to_characters(b"\xf5"))]
    vocab = {c: i for i, c in enumerate([*known, "<|endoftext|>"])}
    own = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    own.add_special_tokens(["<|endoftext|>"])
    own.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / ("rows.jsonl" if chats else "text.txt")
    row = json.dumps({"prompt": "the\x04 king", "completion": "a\x04\x04"})
    text.write_text(f"{row}\n" * 4 if chats else "the\x04 king\n" * 12)
    ran = gptc("prepare", text, "--tokenizer", tmp_path / "tokenizer.json", "--out", tmp_path / "d")
    assert ran.code == 0, ran.err
    assert (
        "note: the tokenizer has no token for 2 of the 256 bytes, and leaves out 12 bytes of the "
        "text (0x04)\n"
    ) in ran.err


@pytest.mark.parametrize("kind", ["bytes", "gpt2-like"])
def test_a_text_of_known_bytes_has_no_note(gptc: Gptc, tmp_path: Path, kind: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the\x04 king é\n" * 12)
    name = "bytes" if kind == "bytes" else str(byte_level(tmp_path))
    ran = gptc("prepare", text, "--tokenizer", name, "--out", tmp_path / "d")
    assert (ran.code, ran.err) == (0, "")
