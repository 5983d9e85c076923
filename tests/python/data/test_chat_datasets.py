"""A dataset of conversations holds every row once with its mask; batches say what is to be learned.

The class of fault: a conversation that is cut between shards or splits, a mask that does not belong
to its shard, a target in padding or in a prompt, a batch without any, an order that depends on the
past of the loader.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversing import rows, write_rows
from gptc.data.chat_loader import ChatLoader, all_batches
from gptc.data.dataset import Dataset
from gptc.data.kinds import REJECTED
from gptc.data.preparation import prepare
from gptc.data.sequences import Sequences, Windows, best_fit
from gptc.errors import GptcError, UsageError
from gptc.tokenizer.conversations import SAID

BAD = {"instruction": "Say nothing.", "output": ""}


def prepared(folder: Path, found: list[dict[str, Any]], **options: Any) -> Dataset:
    source = write_rows(folder / "rows.jsonl", found)
    return prepare([str(source)], folder / "out", **options)


def texts(dataset: Dataset, split: str) -> list[str]:
    sequences = Sequences(dataset, split)
    return [dataset.tokenizer.decode(sequences.tokens(i)) for i in range(len(sequences))]


def test_every_row_is_in_one_split_whole(tmp_path: Path) -> None:
    found = rows(40)
    dataset = prepared(tmp_path, found, shard_tokens=500)
    assert len(dataset.shards("train")) > 3
    assert len(texts(dataset, "val")) == 4
    both = texts(dataset, "train") + texts(dataset, "val")
    for row in found:
        whole = [text for text in both if row["instruction"] in text]
        assert whole
        assert all(text.endswith(row["output"] + "<|im_end|>\n") for text in whole)
    assert len(both) == 40
    again = prepare([str(tmp_path / "rows.jsonl")], tmp_path / "again", seed=1)
    assert texts(again, "val") != texts(dataset, "val")
    assert texts(prepared(tmp_path, found, shard_tokens=500), "val") == texts(dataset, "val")
    ordered = prepare([str(tmp_path / "rows.jsonl")], tmp_path / "last", val_by="order")
    assert [found[-4 + i]["output"] in text for i, text in enumerate(texts(ordered, "val"))]


def test_bad_rows_stop_or_are_counted(tmp_path: Path) -> None:
    found = [*rows(4), BAD, *rows(4, 2)]
    with pytest.raises(GptcError, match=r"rows\.jsonl: line 5: message 2 \(assistant\) is empty"):
        prepared(tmp_path, found)
    assert not (tmp_path / "out").exists()
    notes: list[str] = []
    dataset = prepared(tmp_path, found, on_bad_row="skip", notify=notes.append)
    assert len(texts(dataset, "train") + texts(dataset, "val")) == 8
    assert dataset.meta["chats"]["left_out"] == 1
    assert notes[0].startswith("note: 1 bad row left out, such as ")
    with pytest.raises(GptcError, match="has no conversation"):
        prepare(
            [str(write_rows(tmp_path / "bad.jsonl", [BAD]))], tmp_path / "none", on_bad_row="skip"
        )
    with pytest.raises(GptcError, match="already holds a dataset"):
        prepared(tmp_path, found, on_bad_row="skip", seed=4)
    assert prepared(tmp_path, found, on_bad_row="skip").already_there


@pytest.mark.parametrize("val_by", ["random", "order"])
@pytest.mark.parametrize("seed", range(4))
def test_equal_rows_are_all_in_one_split(tmp_path: Path, val_by: Any, seed: int) -> None:
    """A row that trains would be known when it validates: losses would be too low."""
    single, twice, often = rows(30), rows(6, 2), rows(1, 3) * 9
    found = single + twice + often + twice
    notes: list[str] = []
    dataset = prepared(tmp_path, found, val_by=val_by, seed=seed, notify=notes.append)
    train, val = texts(dataset, "train"), texts(dataset, "val")
    assert len(train) + len(val) == len(found)
    assert not set(train) & set(val)
    assert notes == [
        "note: 14 rows of 51 repeat others; equal rows are all trained on or all held out"
    ]
    assert len(val) in (range(4, 7) if val_by == "random" else range(1))


def test_rows_that_are_all_repeated_leave_one_to_validate(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, rows(2) * 8, val_fraction=0.05)
    assert len(set(texts(dataset, "train"))) == len(set(texts(dataset, "val"))) == 1
    (tmp_path / "one").mkdir()
    assert not texts(prepared(tmp_path / "one", rows(1) * 8), "val")


@pytest.mark.parametrize(
    ("suffix", "bad", "fault"),
    [
        ("csv", "Say 1,one,two", r"has 3 fields, and the header has 2"),
        ("csv", "Say 1", r"has no output \(only instruction\)"),
        ("csv", '"Say" 1,one', r"is not a row of CSV \(.*\)"),
        ("tsv", "Say 1\tone\ttwo", r"has 3 fields, and the header has 2"),
        ("tsv", "Say 1", r"has 1 of 2 fields"),
    ],
)
def test_rows_of_wrong_width_stop_or_are_counted(
    tmp_path: Path, suffix: str, bad: str, fault: str
) -> None:
    between = "\t" if suffix == "tsv" else ","
    lines = [f"instruction{between}output", *(f"Say {i}.{between}{i}" for i in range(9))]
    source = tmp_path / f"rows.{suffix}"
    source.write_text("\n".join([*lines[:5], bad, *lines[5:]]) + "\n")
    with pytest.raises(GptcError) as caught:
        prepare([str(source)], tmp_path / "out")
    assert str(caught.value).startswith(f"{source}: line 6")
    assert re.search(f"line 6:? {fault}", str(caught.value))
    assert str(caught.value).endswith("leave such rows out with --on-bad-row skip")
    notes: list[str] = []
    dataset = prepare([str(source)], tmp_path / "out", on_bad_row="skip", notify=notes.append)
    assert dataset.meta["chats"] | {"left_out": 1, "sequences": 9} == dataset.meta["chats"]
    assert re.match(r"note: 1 bad row left out, such as .*line 6:? " + fault, notes[0])


def test_a_template_that_refuses_a_row_names_it(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = [rows(1)[0], {**rows(1)[0], "system": "Be brief."}, *rows(3, 2)]
    options = {"chat_template": str(template), "val_fraction": 0}
    with pytest.raises(
        GptcError, match=r"rows\.jsonl: line 2: the chat template does not take.*no"
    ):
        prepared(tmp_path, found, **options)
    dataset = prepared(tmp_path, found, on_bad_row="skip", **options)
    assert len(texts(dataset, "train")) == 4
    assert texts(dataset, "train")[0].startswith("user: ")
    assert dataset.tokenizer.marks.chat_template == template.read_text()


def test_a_call_that_the_template_would_lose_is_refused(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    found = [{"messages": turns}]
    for row in rows(2):
        said = [("user", row["instruction"]), ("assistant", row["output"])]
        found.append({"messages": [{"role": role, "content": text} for role, text in said]})
    with pytest.raises(GptcError, match="line 1 calls a tool, and the chat template has no place"):
        prepared(tmp_path, found)
    dataset = prepared(tmp_path, found, on_bad_row="skip")
    assert dataset.meta["chats"]["left_out"] == 1


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--val-tokens would cut a conversation"):
        prepared(tmp_path, rows(3), val_tokens=7)
    with pytest.raises(UsageError, match="char learns from a text"):
        prepared(tmp_path, rows(3), tokenizer="char")
    text = tmp_path / "text.txt"
    text.write_text("Hello. " * 20)
    with pytest.raises(UsageError, match="--chat-template is for rows of conversations"):
        prepare([str(text)], tmp_path / "text", chat_template="x")
    mixed = [str(write_rows(tmp_path / "rows.jsonl", rows(3))), str(text)]
    with pytest.raises(GptcError, match=r"text\.txt is not a file of rows"):
        prepare(mixed, tmp_path / "mixed")


def test_rows_with_a_text_stay_texts(tmp_path: Path) -> None:
    found = [{**row, "text": row["instruction"]} for row in rows(12)]
    assert not prepared(tmp_path, found).is_chats


def test_damage_is_named(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, rows(12))
    mask = dataset.masks("train")[0]
    good = mask.read_bytes()
    mask.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(GptcError, match=r"train_000000\.mask is damaged \(wrong checksum\)"):
        Dataset.open(dataset.folder).verify()
    with pytest.raises(GptcError, match=r"train_000000\.mask is damaged \(wrong checksum\)"):
        Dataset.open(dataset.folder).kinds("train")
    mask.write_bytes(good[:-1])
    with pytest.raises(GptcError, match=r"mask .* has \d+ bytes instead of \d+"):
        Dataset.open(dataset.folder)
    mask.unlink()
    with pytest.raises(GptcError, match=r"the mask .* is missing"):
        Dataset.open(dataset.folder)
    mask.write_bytes(good)
    Dataset.open(dataset.folder).verify()
    described = json.loads((dataset.folder / "dataset.json").read_text())
    del described["splits"]["train"]["shards"][0]["mask"], described["checksum"]
    (dataset.folder / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(GptcError, match="is damaged"):
        Dataset.open(dataset.folder)


def test_preference_rows_are_pairs(tmp_path: Path) -> None:
    found = [{"prompt": "Hi", "chosen": f"Good {i}.", "rejected": "Bad."} for i in range(4)]
    dataset = prepared(tmp_path, found, val_fraction=0)
    sequences = Sequences(dataset, "train")
    worse = [bool(sequences.kinds[begin] & REJECTED) for begin in sequences.begins]
    assert worse == [False, True] * 4
    assert "Good 2." in texts(dataset, "train")[4]
    assert "Bad." in texts(dataset, "train")[5]
    windows = Windows(dataset, "train", 100)
    assert len(windows) == 4
    assert not any(b"Bad" in bytes(row.astype(np.uint8)) for row in windows.batch(range(4)).inputs)


# ---- batches ----


@pytest.mark.parametrize("train_on", ["assistant", "completion", "all"])
def test_targets_are_what_is_to_be_learned(tmp_path: Path, train_on: Any) -> None:
    turns = [
        {"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")
    ]
    dataset = prepared(tmp_path, [{"messages": turns}] * 3, val_fraction=0)
    dataset.train_on = train_on
    x, y, _ = Windows(dataset, "train", 200).batch([0, 1])
    n = int(Sequences(dataset, "train").sizes[0]) - 1
    learned = bytes(int(t) for t in y[0] if t >= 0).decode()
    said = ["assistant 0<|im_end|>\n", "assistant 1<|im_end|>\n"]
    whole = dataset.tokenizer.decode(Sequences(dataset, "train").tokens(0))
    expected = {"assistant": "".join(said), "completion": said[1], "all": whole[1:]}
    assert learned == expected[train_on]
    assert x.shape == y.shape == (2, -(-n // 16) * 16)
    assert (y[:, n:] == -1).all()
    assert (y[0, :n][y[0, :n] >= 0] == np.append(x[0, 1:n], ord("\n"))[y[0, :n] >= 0]).all()


def test_long_rows_are_cut_or_dropped_and_counted(tmp_path: Path) -> None:
    answers = ["x" * 30, "y" * 300]
    dataset = prepared(
        tmp_path, [{"prompt": "Hi", "completion": a} for a in answers], val_fraction=0
    )
    sizes = Sequences(dataset, "train").sizes.tolist()
    cut = Windows(dataset, "train", 100)
    assert (len(cut), cut.n_long, cut.n_empty) == (2, 1, 0)
    x, y, _ = cut.batch([1])
    assert x.shape == (1, 100)
    assert y[0, -1] == ord("y")
    dataset.long_rows = "drop"
    dropped = Windows(dataset, "train", 100)
    assert (len(dropped), dropped.n_long) == (1, 1)
    dataset.long_rows = "cut"
    short = Windows(dataset, "train", 20)  # the prompt alone is longer
    assert (len(short), short.n_empty) == (0, 2)
    with pytest.raises(GptcError, match=r"no conversation .* within 21 tokens"):
        ChatLoader(dataset, "train", 2, 20)
    assert len(Windows(dataset, "train", max(sizes) - 1)) == 2


def test_an_epoch_draws_each_row_once_and_the_order_is_a_function_of_the_place(
    tmp_path: Path,
) -> None:
    dataset = prepared(tmp_path, rows(30), val_fraction=0)

    def drawn(seed: int, first: int, n: int) -> list[bytes]:
        loader = ChatLoader(dataset, "train", 3, 128, seed)
        loader.position = first
        batches = [loader.next() for _ in range(n)]
        loader.close()
        return [row[: int(np.flatnonzero(row)[-1]) + 1].tobytes() for x, _ in batches for row in x]

    whole = drawn(5, 0, 20)
    assert sorted(whole[:30]) == sorted(whole[30:])
    assert len(whole[:30]) == 30
    assert whole[:30] != whole[30:]
    assert drawn(5, 12, 7) == whole[12:33]  # across an epoch
    assert drawn(6, 0, 10) != whole[:30]


def test_best_fit_loses_nothing_and_exceeds_no_bin() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 40, 300).tolist()
    bins = best_fit(range(300), sizes, 64)
    assert sorted(item for some in bins for item in some) == list(range(300))
    filled = [sum(sizes[i] for i in some) for some in bins]
    assert max(filled) <= 64
    assert len(bins) <= -(-sum(sizes) // 64) * 11 / 9 + 1
    assert best_fit([0, 1, 2, 3], [4, 3, 3, 2], 6) == [[0, 3], [1, 2]]


def test_packed_windows_have_the_same_rows_side_by_side(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, rows(30), val_fraction=0)
    alone, packed = Windows(dataset, "train", 512), Windows(dataset, "train", 512, "fit")
    assert len(packed) < len(alone) / 2

    def documents(windows: Windows) -> list[tuple[bytes, bytes]]:
        x, y, positions = windows.batch(range(len(windows)))
        if positions is None:
            positions = np.broadcast_to(np.arange(x.shape[1]), x.shape)
        found = []
        for b in range(len(x)):
            begins = [*np.flatnonzero(positions[b] == 0).tolist(), x.shape[1]]
            for begin, end in itertools.pairwise(begins):
                assert positions[b, begin:end].tolist() == list(range(end - begin))
                n = int(np.append(np.flatnonzero(y[b, begin:end] >= 0), -1).max()) + 1
                if n:  # not padding
                    found.append(
                        (x[b, begin : begin + n].tobytes(), y[b, begin : begin + n].tobytes())
                    )
        return sorted(found)

    assert documents(packed) == documents(alone)


def test_evaluation_takes_each_target_once(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, rows(20), val_fraction=0.5)
    n = int(np.count_nonzero(dataset.kinds("val") & SAID))
    batches = list(all_batches(dataset, "val", 4, 256))
    assert sum(int((y >= 0).sum()) for _, y in batches) == n
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert [len(x) for x, _ in all_batches(dataset, "val", 4, 256, 1)] == [4]
