"""Training and validation splits have the size asked for and are cut between documents."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from corpus import MIXED, set_block, text_of, tokens_of, write_source
from gptc.data.preparation import prepare
from gptc.data.shards import read_shard
from gptc.errors import GptcError
from gptc.tokenizer.registry import make_tokenizer


def test_bytes_are_split_by_position(tmp_path: Path) -> None:
    data = bytes(random.Random(0).randrange(256) for _ in range(10_007))
    dataset = prepare([write_source(tmp_path, data)], tmp_path / "out", shard_tokens=1000)
    n = int(len(data) * 0.9)
    assert text_of(dataset, "train") == data[:n]
    assert text_of(dataset, "val") == data[n:]
    assert [len(read_shard(path)) for path in dataset.shards("train")] == [1000] * 9 + [n % 1000]
    assert dataset.n_tokens("train") == n
    assert dataset.bytes_per_token("val") == 1.0
    assert dataset.tokenizer.start == "\n"


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99, 1e-17])
def test_characters_are_split_by_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, fraction: float
) -> None:
    set_block(monkeypatch, block)
    text = MIXED.replace("<|endoftext|>", "é") * 3
    dataset = prepare(
        [write_source(tmp_path, text)], tmp_path / "out", tokenizer="char", val_fraction=fraction
    )
    n = int(len(text) * (1 - fraction))
    assert text_of(dataset, "train").decode() == text[:n]
    assert text_of(dataset, "val").decode() == text[n:]
    n_bytes = len(text[:n].encode())
    assert dataset.bytes_per_token("train") == pytest.approx(n_bytes / n)


@pytest.mark.parametrize("block", [1, 7, 13, 4 << 20])
@pytest.mark.parametrize(
    ("text", "fraction", "train"),
    [
        ("a|b|c|d|e|f|g|h|i|j", 0.1, "a|b|c|d|e|f|g|h|i"),
        ("a|b|c|d", 0.5, "a|b"),
        ("a|b", 0.99, "a"),
        ("|aa|bb", 0.5, "|aa"),  # a mark at the beginning separates nothing
        ("a|b|c|\n", 0.34, "a|b"),  # nor does one at the end
        ("0123456789|\n", 0.5, "01234567890123456789"[:12]),  # one document: by position
    ],
)
def test_documents_are_kept_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    text: str,
    fraction: float,
    train: str,
) -> None:
    set_block(monkeypatch, block)
    text, train = (s.replace("|", "<|endoftext|>") for s in (text, train))
    dataset = prepare([write_source(tmp_path, text)], tmp_path / "out", val_fraction=fraction)
    assert dataset.tokenizer.start == "<|endoftext|>\n"
    if text.startswith("0123"):
        assert text_of(dataset, "train").decode() == text[: len(text) // 2]
        return
    assert text_of(dataset, "train").decode() == train
    assert text_of(dataset, "val").decode() == text[len(train) :]


@pytest.mark.parametrize("kind", ["bytes", "char"])
@pytest.mark.parametrize(("first", "second"), [(5, 995), (995, 5), (400, 600), (970, 30)])
def test_a_split_is_cut_out_of_a_document_that_would_leave_next_to_nothing(
    tmp_path: Path, kind: str, first: int, second: int
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a" * first)
    (folder / "b.txt").write_text("é" * (second // 2) + "b" * (second % 2))
    dataset = prepare([str(folder)], tmp_path / "out", tokenizer=kind)
    n_train = dataset.meta["splits"]["train"]["bytes"]
    assert 450 < n_train < 950


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe:300"])
@pytest.mark.parametrize("n_val", [0, 1, 50, 200])
def test_val_tokens_counts_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, n_val: int
) -> None:
    set_block(monkeypatch, 64)
    text = "one two, three\n" * 100
    dataset = prepare(
        [write_source(tmp_path, text)], tmp_path / "out", tokenizer=kind, val_tokens=n_val
    )
    assert dataset.n_tokens("val") == n_val
    whole = make_tokenizer(kind, [text.encode()]).encode(text).tolist()
    assert tokens_of(dataset, "train") + tokens_of(dataset, "val") == whole


def test_val_tokens_must_leave_some(tmp_path: Path) -> None:
    source = write_source(tmp_path, "abc")
    with pytest.raises(GptcError, match="of 3 tokens none"):
        prepare([source], tmp_path / "out", val_tokens=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "start"),
    [("a\nb", "\n"), ("b a", " "), ("a<|endoftext|>", "<|endoftext|>")],
)
def test_the_start_of_a_char_dataset_can_be_encoded(tmp_path: Path, text: str, start: str) -> None:
    dataset = prepare([write_source(tmp_path, text)], tmp_path / "out", tokenizer="char")
    assert dataset.tokenizer.start == start
    assert len(dataset.tokenizer.encode(start)) == len(start)
