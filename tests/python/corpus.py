"""Texts, source files and small datasets, and their content read back as tokens or text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptc.data import archives, encode, parquet, sources, splits
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare

# Downloaded files, in a folder next to the checkout. Tests that need a missing one are skipped.
DOWNLOADS = Path(__file__).parents[3] / "shared" / "data"
SHAKESPEARE = DOWNLOADS / "tinyshakespeare.txt"

_WORDS = ["a", "king", "saw", "the", "fox", "and", "the", "owl", "under", "an", "old", "tree"]

MIXED = "Naïve café, 東京 😀 don't <|endoftext|>\n\n  Zoë's 12345\t\u3000x\r\n"


def nasty_text(rng: random.Random, length: int) -> str:
    """Random text of pieces that are hard for tokenizers and cuts."""
    pieces = [" ", "  ", "\n", "\t", "\r\n", "\u3000", "\u2003", "\x1c", "'s", "'", "ab", "c", "é"]
    pieces += ["東京", "😀", "12", "...", "<|endoftext|>", "<|endo", "|>", "\x00", "\u0301"]
    return "".join(rng.choice(pieces) for _ in range(length))


def write_source(folder: Path, content: str | bytes, name: str = "text.txt") -> str:
    """Writes a file below `folder` and returns its path, as prepare() takes it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_documents(folder: Path, seed: int = 1) -> Path:
    """A dataset of 400 documents of 3 to 30 words, with a tokenizer learned from them."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(_WORDS, k=rng.randint(3, 30))) for _ in range(400)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("<|endoftext|>".join(texts))
    prepare([str(folder / "text.txt")], folder / "data", tokenizer="bpe:280")
    return folder / "data"


def tokens_of(dataset: Dataset, split: str) -> list[int]:
    """The tokens of all shards of a split."""
    return [int(t) for i in range(len(dataset.shards(split))) for t in dataset.shard(split, i)]


def text_of(dataset: Dataset, *splits: str) -> bytes:
    """The text of some splits, or of both."""
    tokens = [t for split in splits or ("train", "val") for t in tokens_of(dataset, split)]
    return dataset.tokenizer.decode_bytes(tokens)


def set_block(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """Makes readers use blocks of `n_bytes`."""
    for module in (archives, encode, parquet, sources, splits):
        monkeypatch.setattr(module, "BLOCK_BYTES", n_bytes)


def counting(folder: Path, n: int, **options: Any) -> Dataset:
    """A dataset whose training tokens are their own positions, modulo 251."""
    data = bytes(i % 251 for i in range(n))
    return prepare([write_source(folder, data)], folder / "out", val_fraction=0, **options)


def fake_stories(n_bytes: int, seed: int = 0, *, wide: bool = False) -> Iterator[bytes]:
    """Replaces gptc.data.stories.corpus: short documents of 101 bytes that name their seed."""
    for i in range(-(-n_bytes // 100)):
        yield f"Story {seed} {i:04}".encode().ljust(85, b".") + b"\n<|endoftext|>\n"
