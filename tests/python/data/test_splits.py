"""Training and validation splits have the size asked for and are cut between documents.

The class: validation data that are unlike the rest, as the last files by name are.
"""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from corpus import MIXED, set_block, text_of, tokens_of, write_source
from gptc.data.preparation import prepare
from gptc.data.shards import read_shard
from gptc.errors import GptcError, UsageError
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
    dataset = prepare(
        [write_source(tmp_path, text)], tmp_path / "out", val_fraction=fraction, val_by="order"
    )
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


def test_a_large_validation_split_is_noted(tmp_path: Path) -> None:
    for n, noted in ((1, False), (2, True), (3, True), (10, False)):
        folder = tmp_path / f"of {n}"
        folder.mkdir()
        for i in range(n):
            (folder / f"{i}.txt").write_text("a few words " * 50)
        notes: list[str] = []
        for _ in range(2):  # the second time, it is there already
            prepare([str(folder)], tmp_path / f"out {n}", notify=notes.append)
        share = f"note: {1 / n:.0%} of the text validates, and not 10%: whole documents do, and it "
        assert [note.startswith(share) for note in notes] == [True, True] * noted


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


def documents(folder: Path, n: int = 200) -> str:
    rng = random.Random(5)
    rows = [f"document {i} " + "word " * rng.randrange(1, 60) for i in range(n)]
    return write_source(folder, "<|endoftext|>".join(rows))


@pytest.mark.parametrize("block", [7, 4 << 20])
@pytest.mark.parametrize("kind", ["bytes", "bpe:300"])
def test_documents_are_held_out_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: int
) -> None:
    source = documents(tmp_path)
    set_block(monkeypatch, block)
    mark = b"<|endoftext|>"
    whole = Path(source).read_bytes().split(mark)
    dataset = prepare([source], tmp_path / "out", tokenizer=kind, shard_tokens=1000)
    val = text_of(dataset, "val").removeprefix(mark).split(mark)
    train = text_of(dataset, "train").removeprefix(mark).split(mark)
    places = [whole.index(text) for text in val]
    assert places == sorted(places)
    assert [text for text in whole if text not in val] == train
    assert val != whole[-len(val) :]
    assert min(places) < 50
    assert max(places) >= 150
    size = len(Path(source).read_bytes())
    assert len(text_of(dataset, "val")) == pytest.approx(size / 10, rel=0.05)
    assert dataset.meta["splits"]["val"]["documents"] == len(val)
    assert dataset.meta["sources"][0]["documents"] == 200


def test_the_seed_chooses_the_documents(tmp_path: Path) -> None:
    source = documents(tmp_path)

    def val(out: str, **options: int | str) -> bytes:
        return text_of(prepare([source], tmp_path / out, **options), "val")

    first = val("a")
    assert val("b", seed=0, val_by="random") == first
    assert val("c", seed=1) != first
    last = val("d", val_by="order")
    assert Path(source).read_bytes().endswith(last)
    assert val("e", val_by="order", seed=1) == last


def test_files_and_rows_are_held_out_whole(tmp_path: Path) -> None:
    texts = [f"{i:02}" * 50 for i in range(40)]
    for i in range(20):
        write_source(tmp_path / "in", texts[i], f"{i:02}.txt")
    rows = "".join(f'{{"text": "{text}"}}\n' for text in texts[20:])
    write_source(tmp_path / "in", gzip.compress(rows.encode()), "rows.jsonl.gz")
    dataset = prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer="bpe:260")
    found = {s: text_of(dataset, s).decode().split("<|endoftext|>") for s in ("train", "val")}
    assert sorted(t for s in found.values() for t in s if t) == texts
    assert dataset.meta["splits"]["val"]["documents"] == 4
    assert dataset.meta["sources"][0]["files"] == 21
    assert dataset.meta["sources"][0]["documents"] == 40


def test_documents_are_never_cut_at_random(tmp_path: Path) -> None:
    source = write_source(tmp_path, "a" * 900 + "<|endoftext|>" + "b" * 5)
    with pytest.raises(GptcError, match=r"2 documents cannot .*--val-by order"):
        prepare([source], tmp_path / "out", val_by="random")
    with pytest.raises(UsageError, match="--val-tokens takes the end"):
        prepare([source], tmp_path / "out", val_by="random", val_tokens=10)
    assert prepare([source], tmp_path / "out").n_tokens("val") == 92


def test_very_many_documents_are_held_out_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptc.data.scan._MAX_BORDERS", 50)
    source = documents(tmp_path)
    dataset = prepare([source], tmp_path / "out")
    val = text_of(dataset, "val").split(b"<|endoftext|>")
    whole = Path(source).read_bytes().split(b"<|endoftext|>")
    assert all(text in whole for text in val if text)
    assert 10 < len(val) < 30
