"""`gptc eval` measures all of the text that it was given.

The class: text that is left out without a word. It was the end of each split, shorter than a
window, and nine tenths of a file; and a split next to nothing gave a number that meant nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.errors import UsageError
from gptc.eval.loss import evaluate

Gptc = Callable[..., Any]


@pytest.fixture
def run(gptc: Gptc, arguments: list[str], options: dict[str, Any]) -> Path:
    """A run of a few steps, with a context of 16."""
    assert gptc("train", *arguments, "--dtype", "fp32").code == 0
    return Path(options["out"])


def test_every_token_but_the_first_is_predicted(model: Model, tmp_path: Path) -> None:
    """By hand, from the logits of each window."""
    (tmp_path / "x").write_bytes(bytes(range(60, 110)) * 3)
    dataset = prepare([str(tmp_path / "x")], tmp_path / "d", val_tokens=39)
    tokens = np.empty(39, dtype=np.int32)
    dataset.read("val", 0, tokens)
    nats = []
    for begin in range(0, 38, 16):
        window = tokens[begin : begin + 17]
        logits = model.logits(window[None, :-1])[0].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nats += [-row[token] for row, token in zip(log_probabilities, window[1:], strict=True)]
    for batch_size in (1, 4):
        result = evaluate(model, dataset, batch_size=batch_size, seq_len=16)
        assert result.tokens == 38
        assert result.loss == pytest.approx(np.mean(nats), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_sliding_windows_give_each_token_more_context(
    model: Model, tmp_path: Path, stride: int
) -> None:
    """By hand: each token once, by the first window that has it."""
    (tmp_path / "x").write_bytes(bytes(range(60, 110)) * 3)
    dataset = prepare([str(tmp_path / "x")], tmp_path / "d", val_tokens=39)
    tokens = np.empty(39, dtype=np.int32)
    dataset.read("val", 0, tokens)
    nats: dict[int, float] = {}
    for begin in [*range(0, 22, stride), 22]:
        window = tokens[begin : begin + 17]
        logits = model.logits(window[None, :-1])[0].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for i, token in enumerate(window[1:]):
            nats.setdefault(begin + i, -float(logits[i, token]))
    assert sorted(nats) == list(range(38))
    for batch_size in (1, 4):
        sizes = {"batch_size": batch_size, "seq_len": 16}
        result = evaluate(model, dataset, stride=stride, **sizes)
        assert result.tokens == 38
        assert result.loss == pytest.approx(np.mean(list(nats.values())), rel=1e-5)
    with pytest.raises(UsageError, match="--stride is 17; it must be 1 to 16"):
        evaluate(model, dataset, stride=17, seq_len=16)


def test_the_command_slides(gptc: Gptc, run: Path) -> None:
    plain, slid = (
        json.loads(gptc("eval", "-m", run, "--json", *more).out)["results"][0]
        for more in ((), ("--stride", 4))
    )
    assert slid["tokens"] == plain["tokens"]
    assert slid["loss"] != plain["loss"]


def test_a_text_file_is_evaluated_whole(gptc: Gptc, run: Path, tmp_path: Path) -> None:
    text = tmp_path / "other text.txt"
    text.write_text("a king saw the fox under a tree. " * 40)
    n = len(text.read_bytes())
    ran = gptc("eval", "-m", run, "--data", text, "--json")
    found = json.loads(ran.out)
    assert (ran.err, found["split"], found["results"][0]["tokens"]) == ("", "all", n - 1)
    val = json.loads(gptc("eval", "-m", run, "--data", text, "--split", "val", "--json").out)
    assert val["results"][0]["tokens"] < n / 8
    # The same text, prepared as one split.
    folder = tmp_path / "d"
    assert gptc("prepare", text, "--out", folder, "--val-fraction", 0).code == 0
    ran = gptc("eval", "-m", run, "--data", folder, "--split", "train", "--json")
    assert json.loads(ran.out)["results"] == found["results"]
    assert found["results"][0]["bpb"] == pytest.approx(
        found["results"][0]["loss"] / math.log(2), rel=1e-9
    )


def test_all_is_both_splits_in_order(dataset_folder: Path) -> None:
    dataset = Dataset.open(dataset_folder)
    parts = [np.empty(dataset.n_tokens(split), np.int32) for split in ("train", "val", "all")]
    for split, part in zip(("train", "val", "all"), parts, strict=True):
        dataset.read(split, 0, part)
    assert np.concatenate(parts[:2]).tolist() == parts[2].tolist()
    assert dataset.n_bytes("all") == dataset.n_bytes("train") + dataset.n_bytes("val")


def test_the_own_text_of_a_run(
    gptc: Gptc, text_file: Path, arguments: list[str], tmp_path: Path
) -> None:
    """Without --data, the validation split of the run; the whole only if asked for, with a note."""
    assert gptc("train", *arguments[2:], "--data", text_file).code == 0
    run, n = tmp_path / "run", len(text_file.read_bytes())
    ran = gptc("eval", "-m", run, "--json")
    assert (json.loads(ran.out)["split"], ran.err) == ("val", "")
    for more in (["--split", "all"], ["--data", text_file]):
        ran = gptc("eval", "-m", run, "--json", *more)
        assert json.loads(ran.out)["results"][0]["tokens"] == n - 1
        assert "note: the model was trained on a part of this text; --split val" in ran.err


def test_a_split_of_fewer_than_two_windows_is_refused(
    gptc: Gptc, run: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a king saw the fox " * 12)
    ran = gptc("eval", "-m", run, "--data", text, "--split", "val")
    assert ran.code == 1
    assert f"error: {text} (val) has 23 tokens, fewer than two windows of 16" in ran.err
    assert "use --seq-len 11 or less or --split all or more text" in ran.err
    for more in (["--split", "val", "--seq-len", 11], ["--split", "all"]):
        assert gptc("eval", "-m", run, "--data", text, *more).code == 0
    text.write_text("a king")
    ran = gptc("eval", "-m", run, "--data", text)
    assert (ran.code, "use --seq-len 2 or less or more text" in ran.err) == (1, True)
    assert gptc("eval", "-m", run, "--data", text, "--seq-len", 2).code == 0


def test_rows_without_text_are_noted(gptc: Gptc, run: Path, tmp_path: Path) -> None:
    """Also where the cache holds the text already, under another name."""
    for name in ("rows.jsonl", "rows.jsonl", "other.jsonl"):
        rows = tmp_path / name
        rows.write_text('{"text": "a king saw the fox"}\n{"text": null}\n' * 40)
        ran = gptc("eval", "-m", run, "--data", rows)
        assert ran.code == 0
        assert ran.err == f"note: {rows}: 40 rows without text left out\n"
        assert ran.out.splitlines()[0].startswith(f"{run}/ckpt-")
        assert f" on {rows} (all, " in ran.out
