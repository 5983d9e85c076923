"""Text that is encoded in blocks has the tokens of the whole text."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from corpus import SHAKESPEARE, nasty_text, set_block, text_of, tokens_of, write_source
from gptc.data import encode, job
from gptc.data.preparation import prepare
from gptc.errors import GptcError
from gptc.tokenizer.registry import make_tokenizer
from vocabularies import needs_gpt2


@needs_gpt2
@pytest.mark.parametrize(("block", "jobs"), [(64, 1), (64, 3), (1000, 2)])
def test_gpt2_in_blocks_equals_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, jobs: int
) -> None:
    set_block(monkeypatch, block)
    text = nasty_text(random.Random(4), 5000)
    dataset = prepare(
        [write_source(tmp_path, text)], tmp_path / "out", tokenizer="gpt2", val_tokens=0, jobs=jobs
    )
    assert tokens_of(dataset, "train") == make_tokenizer("gpt2").encode(text).tolist()
    text_bytes = len(text.replace("<|endoftext|>", "").encode())
    assert dataset.meta["splits"]["train"]["bytes"] == text_bytes


@needs_gpt2
def test_a_run_without_a_border_is_cut_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_block(monkeypatch, 10)
    monkeypatch.setattr(encode, "_LONGEST_RUN_BYTES", 50)
    text = "東" * 1000
    dataset = prepare([write_source(tmp_path, text)], tmp_path / "out", tokenizer="gpt2")
    assert (text_of(dataset, "train") + text_of(dataset, "val")).decode() == text


@needs_gpt2
@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="no tinyshakespeare.txt")
def test_shakespeare_has_the_published_number_of_tokens(tmp_path: Path) -> None:
    dataset = prepare([str(SHAKESPEARE)], tmp_path / "gpt2", tokenizer="gpt2")
    assert (dataset.n_tokens("train"), dataset.n_tokens("val")) == (301_966, 36_059)
    dataset = prepare([str(SHAKESPEARE)], tmp_path / "char", tokenizer="char")
    assert (dataset.n_tokens("train"), dataset.n_tokens("val")) == (1_003_854, 111_540)
    assert dataset.vocab_size == 65


def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_block(monkeypatch, 1 << 16)
    monkeypatch.setattr(job, "_LARGE_BYTES", 0)  # which are only reserved
    source = write_source(tmp_path, "the quick brown fox\n" * 400_000)  # 8 MB
    tracemalloc.start()
    try:
        prepare([source], tmp_path / "out", tokenizer="char")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("block", [1, 2, 4 << 20])
@pytest.mark.parametrize("tail", [b"\xff and more", b"\xc3"])
@pytest.mark.parametrize("kind", ["char", "bpe:300"])
def test_a_file_that_is_no_utf8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tail: bytes, block: int
) -> None:
    set_block(monkeypatch, block)
    good = write_source(tmp_path, "äöü", "good.txt")
    bad = write_source(tmp_path, "éa".encode() + tail, "bad.txt")
    with pytest.raises(GptcError, match=r"bad\.txt: byte 3 .*--tokenizer bytes"):
        prepare([good, bad], tmp_path / "out", tokenizer=kind)
    assert not (tmp_path / "out").exists()
