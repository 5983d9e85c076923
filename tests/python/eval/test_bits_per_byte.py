"""Bits per byte count bytes of text: special tokens, such as end-of-text marks, have none.

The class: one quantity that was counted by two rules. The bytes of a split are those of its
tokens, however the split was asked for. Training, `gptc eval` and `gptc info` divide by the same
number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.eval.loss import bits_per_byte
from gptc.tokenizer.registry import make_tokenizer

Gptc = Callable[..., Any]
ROWS = [f"row {i % 7}{'x' * (i % 5)}" for i in range(400)]
N_BYTES = sum(map(len, ROWS))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Short rows, each a document: a mark of 13 characters precedes each row."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return path


def test_marks_have_no_bytes_however_a_split_is_asked_for(rows: Path, tmp_path: Path) -> None:
    spec = "bpe:270"
    fraction = prepare(
        [str(rows)], tmp_path / "a", tokenizer=spec, val_fraction=0.2, val_by="order"
    )
    n_val = fraction.n_tokens("val")
    counted = prepare([str(rows)], tmp_path / "b", tokenizer=spec, val_tokens=n_val)
    for split in ("train", "val"):
        assert fraction.n_tokens(split) == counted.n_tokens(split)
        assert fraction.n_bytes(split) == counted.n_bytes(split)
        assert fraction.describe()["splits"][split]["bytes"] == fraction.n_bytes(split)
    assert fraction.n_bytes("train") + fraction.n_bytes("val") == N_BYTES
    last = fraction.tokenizer.decode(_tokens(fraction, "val")).split("<|endoftext|>")
    assert fraction.n_bytes("val") == sum(map(len, last))
    # By hand: a loss of ln 2 a token is one bit a token.
    expected = n_val / fraction.n_bytes("val")
    assert bits_per_byte(math.log(2), fraction, "val") == pytest.approx(expected)


def test_resuming_a_preparation_counts_the_same(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"tokenizer": "bpe:270", "shard_tokens": 300, "val_by": "order"}
    whole = prepare([str(rows)], tmp_path / "a", **how)

    def stop(action: str, n_done: int, n_bytes: int | None) -> None:
        if action == "encoding" and n_done > 3000:
            raise KeyboardInterrupt

    monkeypatch.setattr("gptc.data.encode.BLOCK_BYTES", 512)
    with pytest.raises(KeyboardInterrupt):
        prepare([str(rows)], tmp_path / "b", **how, progress=stop)
    assert (tmp_path / "b" / ".partial" / "journal.jsonl").read_text().count("\n") > 1
    again = prepare([str(rows)], tmp_path / "b", **how)
    assert again.meta["splits"] == whole.meta["splits"]


def test_a_dataset_of_an_older_version_is_counted_again(rows: Path, tmp_path: Path) -> None:
    """Version 2 recorded the bytes of the source, marks included."""
    new = prepare([str(rows)], tmp_path / "d", tokenizer="bpe:270")
    meta = json.loads((tmp_path / "d" / "dataset.json").read_text())
    meta["version"] = 2
    del meta["checksum"]
    for split in meta["splits"].values():
        split["bytes"] *= 3
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(meta))
    old = Dataset.open(tmp_path / "d")
    for split in ("train", "val"):
        assert old.bytes_per_token(split) == new.bytes_per_token(split)


def test_train_eval_and_info_agree(gptc: Gptc, rows: Path, arguments: list[str]) -> None:
    data = rows.parent / "d"
    assert gptc("prepare", rows, "--out", data, "--tokenizer", "bpe:270").code == 0
    arguments[arguments.index("--eval-batches") + 1] = "0"
    ran = gptc("train", *arguments[2:], "--data", data, "--dtype", "fp32", "--json")
    trained = json.loads(ran.out)
    run = arguments[arguments.index("--out") + 1]
    result = json.loads(gptc("eval", "-m", run, "--json").out)["results"][0]
    info = json.loads(gptc("info", data, "--json").out)["splits"]["val"]
    assert result["bpb"] == pytest.approx(trained["val_bpb"], rel=1e-6)
    by_hand = result["loss"] / math.log(2) * info["tokens"] / info["bytes"]
    assert result["bpb"] == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe:260"])
def test_tokens_of_text_have_the_bytes_of_the_text(kind: str) -> None:
    """The bytes tokenizer has no special token: a mark in the text is text."""
    text = "one<|endoftext|>two é"
    tokenizer = make_tokenizer(kind, [text.encode()])
    expected = len(text.encode()) - (13 if kind == "bpe:260" else 0)
    assert tokenizer.count_bytes(tokenizer.encode(text)) == expected


def _tokens(dataset: Dataset, split: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    tokens = np.empty(dataset.n_tokens(split), dtype=np.int32)
    dataset.read(split, 0, tokens)
    return tokens
