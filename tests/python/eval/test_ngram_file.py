"""Counted n-grams in a folder are those that were counted, and damage is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.data.dataset import Dataset
from gptc.errors import GptcError
from gptc.eval.ngram import NgramModel, count_ngrams, evaluate_ngrams
from gptc.eval.ngram_file import COUNTS, NGRAMS, is_ngrams, open_ngrams, save_ngrams
from gptc.tokenizer.registry import make_tokenizer

Gptc = Callable[..., Any]


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    text = b"The cat sat on the mat. The dog saw the cat. " * 3
    model = NgramModel.count(np.frombuffer(text, np.uint8), 256, 3)
    save_ngrams(tmp_path / "counted", model, make_tokenizer("bytes"), "text")
    return tmp_path / "counted"


def _rewrite(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / NGRAMS).read_text())
    (folder / NGRAMS).write_text(json.dumps(meta | changes))


def test_a_folder_holds_what_was_counted(dataset_folder: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(dataset_folder)
    model = count_ngrams(dataset, 4)
    save_ngrams(tmp_path / "new" / "m", model, dataset.tokenizer, "fable")
    read = open_ngrams(tmp_path / "new" / "m")
    for one, other in zip(model.orders, read.model.orders, strict=True):
        for kind in ("keys", "counts", "before"):
            assert np.array_equal(getattr(one, kind), getattr(other, kind))
    assert read.model.vocab_size == model.vocab_size
    assert evaluate_ngrams(dataset, 4, "val", read.model) == evaluate_ngrams(dataset, 4)
    assert read.describe()["counted_tokens"] == dataset.n_tokens("train")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m"]  # nothing else is left


def test_a_folder_is_not_replaced_unasked(counted: Path, tmp_path: Path) -> None:
    file = open_ngrams(counted)
    with pytest.raises(GptcError, match="counted exists: add --force"):
        save_ngrams(counted, file.model, file.tokenizer, "again")
    save_ngrams(counted, file.model, file.tokenizer, "again", replace=True)
    assert open_ngrams(counted).meta["data"] == "again"
    (tmp_path / "mine").mkdir()
    for replace in (False, True):
        with pytest.raises(GptcError, match="mine exists and holds no n-grams"):
            save_ngrams(tmp_path / "mine", file.model, file.tokenizer, "x", replace)
    assert not is_ngrams(tmp_path / "mine")


def test_each_sort_of_damage_is_one_line(counted: Path) -> None:
    data = (counted / COUNTS).read_bytes()
    meta = (counted / NGRAMS).read_bytes()
    n = json.loads(meta)["ngrams"][0]

    def with_number(at: int, kind: str, value: int) -> bytes:
        out = bytearray(data)
        out[at : at + np.dtype(kind).itemsize] = np.array([value], kind).tobytes()
        return bytes(out)

    broken = {
        "bytes instead of": data[:-1],
        "its checksum is wrong": with_number(8 * n, "<u4", 2),
        "the 1-grams are not in order": with_number(8, "<i8", 0),
        "a 1-gram has a count of 0": with_number(12 * n, "<u4", 0),
        "its counts do not add up": with_number(8 * n, "<u4", 77),
        "the 2-grams are not in order": with_number(16 * n, "<i8", -1),
    }
    for how, content in broken.items():
        (counted / COUNTS).write_bytes(content)
        with pytest.raises(GptcError, match=how) as caught:
            open_ngrams(counted, check_sum="checksum" in how)
        assert "\n" not in str(caught.value)
    beyond = with_number(8 * (n - 1), "<i8", 256)  # a token that there is not
    (counted / COUNTS).write_bytes(beyond)
    with pytest.raises(GptcError, match="the 1-grams are not in order"):
        open_ngrams(counted, check_sum=False)
    (counted / COUNTS).write_bytes(data)
    for how, changes in {
        "it does not describe n-grams": {"format": "others"},
        "has version 2, and this gptc knows 1": {"version": 2},
        "vocab_size is 0": {"vocab_size": 0},
        "tokens is 1.5": {"tokens": 1.5},
        "data is 7": {"data": 7},
        "ngrams is not a list of sizes": {"ngrams": [10**9]},
        "it is not the tokenizer of the n-grams": {"tokenizer": "another"},
        "the tokenizer has 256 tokens": {"vocab_size": 2**31 - 1},
    }.items():
        (counted / NGRAMS).write_bytes(meta)
        _rewrite(counted, **changes)
        with pytest.raises(GptcError, match=how):
            open_ngrams(counted)
    (counted / NGRAMS).write_bytes(meta)
    open_ngrams(counted)


def test_the_commands_take_ngrams(gptc: Gptc, dataset_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    ran = gptc("ngram", dataset_folder, "--order", 12, "--tokens", 5000, "--out", out, "--json")
    assert ran.code == 0, ran.err
    evaluated = gptc("eval", "-m", out, "--json")
    assert json.loads(evaluated.out)["results"] == json.loads(ran.out)["results"]
    shown = gptc("info", out).out
    assert "12, Kneser-Ney" in shown
    assert f"5,000 tokens of {dataset_folder}" in shown
    assert "checksum right, keys in order" in gptc("verify", out).out
    prompt = ["-m", out, "-p", "the king ", "--max-tokens", 30]
    told = gptc("infer", *prompt, "--seed", 3)
    assert told.out.startswith("the king ")
    assert told.out == gptc("infer", *prompt, "--seed", 3).out
    assert told.out != gptc("infer", *prompt, "--seed", 4).out
    greedy = gptc("infer", *prompt, "--temperature", 0, "--json", "--num-samples", 2)
    texts = [sample["text"] for sample in json.loads(greedy.out)["samples"]]
    assert texts[0] == texts[1]
    # The text is of few words, which it writes.
    assert any(word in texts[0] for word in ("under", "tree", "the", "fox", "bear"))
    stopped = gptc("infer", *prompt, "--seed", 3, "--no-echo", "--stop", " ")
    assert " " not in stopped.out


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("infer", "--beams", 2), "--beams needs a model, and {} holds n-grams"),
        (("infer", "--chat"), "--chat needs a model, and {} holds n-grams"),
        (("eval", "--ngram", 2), "--ngram needs a model, and {} holds n-grams"),
        (("export", "--to", "gguf", "--out", "x"), "{} holds no checkpoint: it holds n-grams"),
    ],
)
def test_what_needs_a_model_says_so(
    gptc: Gptc, counted: Path, arguments: tuple[Any, ...], answer: str
) -> None:
    ran = gptc(arguments[0], "-m", counted, *arguments[1:])
    assert ran.code != 0
    assert answer.format(counted) in ran.err
    assert ran.err.count("\n") == 1


def test_other_tokens_are_refused(gptc: Gptc, counted: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words " * 400)
    data = tmp_path / "data"
    chars = gptc("prepare", tmp_path / "text.txt", "--out", data, "--tokenizer", "char")
    assert chars.code == 0, chars.err
    ran = gptc("eval", "-m", counted, "--data", data)
    assert ran.code == 1
    assert f"{data} has other tokens than {counted}" in ran.err
    assert gptc("ngram", data, "--data", data).code == 2
    assert gptc("ngram", data, "--out", data).err.startswith(f"gptc: error: {data} exists and")
