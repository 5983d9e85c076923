"""A dataset describes itself completely, and a damaged one is refused."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import xxhash

from corpus import counting, write_source
from gptc.data.dataset import Dataset, counts, drawn
from gptc.data.description import DATASET_FILE, SPLITS
from gptc.data.loader import eval_batches
from gptc.data.preparation import prepare
from gptc.data.shards import write_shard
from gptc.errors import GptcError
from gptc.tokenizer.native import CharTokenizer
from gptc.tokenizer.registry import read_tokenizer


def test_the_description_is_complete(tmp_path: Path) -> None:
    dataset = prepare([write_source(tmp_path, "text " * 100)], tmp_path / "out", shard_tokens=300)
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("dataset.json", "gptc_tokenizer.json"),
        *("train_000000.bin", "train_000001.bin", "val_000000.bin"),
    ]
    meta = json.loads((folder / "dataset.json").read_text())
    assert meta == dataset.meta
    assert meta["splits"]["train"]["tokens"] == 450
    assert meta["splits"]["val"]["bytes"] == 50
    assert meta["options"]["shard_tokens"] == 300
    assert meta["tokenizer"]["fingerprint"] == read_tokenizer(folder).fingerprint()
    for split in meta["splits"].values():
        for shard in split["shards"]:
            raw = (folder / shard["file"]).read_bytes()
            assert shard["checksum"] == f"xxh3_128:{xxhash.xxh3_128_hexdigest(raw)}"


def test_datasets_of_before_xxh3_are_still_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([write_source(tmp_path, "text " * 100)], out)
    meta = json.loads((out / "dataset.json").read_text()) | {"version": 1}
    del meta["checksum"]
    for split in meta["splits"].values():
        for shard in split["shards"]:
            del shard["checksum"]
            shard["sha256"] = hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest()
    for source in meta["sources"]:
        del source["checksum"]
        source["sha256"] = hashlib.sha256(b"text " * 100).hexdigest()
    (out / "dataset.json").write_text(json.dumps(meta))
    Dataset.open(out).verify()
    assert prepare([str(tmp_path / "text.txt")], out).already_there
    shard_file = out / "val_000000.bin"
    shard_file.write_bytes(shard_file.read_bytes()[:-2] + b"zz")
    with pytest.raises(GptcError, match="wrong checksum"):
        Dataset.open(out).verify()


def test_a_dataset_that_is_not_there_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(GptcError, match=r"gptc prepare SOURCE --out .*none"):
        Dataset.open(tmp_path / "none")
    with pytest.raises(GptcError, match=r"no dataset\.json.*gptc prepare"):
        Dataset.open(tmp_path)


def test_a_damaged_dataset_is_refused(tmp_path: Path) -> None:
    out = counting(tmp_path, 1000, shard_tokens=400).folder
    good = {path: path.read_bytes() for path in out.iterdir()}

    def damaged(name: str, content: bytes | None, why: str) -> None:
        if content is None:
            (out / name).unlink()
        else:
            (out / name).write_bytes(content)
        with pytest.raises(GptcError, match=why) as caught:
            Dataset.open(out)
        assert str(out / name) in str(caught.value)
        for path, content in good.items():
            path.write_bytes(content)

    damaged("train_000001.bin", None, "is missing")
    damaged("train_000001.bin", good[out / "train_000001.bin"][:-2], "1822 bytes instead of 1824")
    damaged("dataset.json", good[out / "dataset.json"][:-20], "damaged")
    damaged("dataset.json", b"{}", "damaged")
    meta = json.loads(good[out / "dataset.json"])
    damaged("dataset.json", json.dumps(meta | {"created_by": "x"}).encode(), "is damaged")
    del meta["checksum"]
    damaged("dataset.json", json.dumps(meta | {"splits": {}}).encode(), "is damaged")
    damaged("dataset.json", json.dumps(meta | {"sources": [{"bytes": 3}]}).encode(), "is damaged")
    damaged("dataset.json", json.dumps(meta | {"version": 5}).encode(), "version 5")
    damaged("gptc_tokenizer.json", None, "no tokenizer")
    CharTokenizer("ab").save(out)
    damaged("gptc_tokenizer.json", (out / "gptc_tokenizer.json").read_bytes(), "not the tokenizer")
    Dataset.open(out).verify()


def test_a_description_that_has_no_end_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe, a device, a file of more values than memory has room for."""
    file = tmp_path / DATASET_FILE
    os.mkfifo(file)
    with pytest.raises(GptcError, match=r"dataset\.json is not a regular file"):
        Dataset.open(tmp_path)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(GptcError, match=r"dataset\.json is not a regular file"):
        Dataset.open(tmp_path)
    file.unlink()
    monkeypatch.setenv("GPTC_LIMITS", "entries=1K")
    file.write_text("[" + "[]," * 1000 + "[]]")
    with pytest.raises(GptcError, match=r"limit of 1,000 JSON values .* a larger --shard-tokens"):
        Dataset.open(tmp_path)
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(GptcError, match=r"25,165,824 bytes .* a larger --shard-tokens"):
        Dataset.open(tmp_path)


def test_a_flipped_bit_of_a_file_of_a_dataset_is_noticed(tmp_path: Path) -> None:
    """A number of dataset.json stays a number, and a token stays in the vocabulary."""
    out = tmp_path / "out"
    whole = prepare([write_source(tmp_path, "text " * 100)], out, shard_tokens=300).meta
    del whole["checksum"]
    for path in sorted(out.iterdir()):
        good = path.read_bytes()
        step = 1 if path.name == DATASET_FILE else len(good) // 9
        for at in range(0, len(good), step):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with suppress(GptcError):
                dataset = Dataset.open(out)
                for split in SPLITS:
                    for i in range(len(dataset.shards(split))):
                        dataset.shard(split, i)
                assert {name: dataset.meta[name] for name in whole} == whole, at
                assert path.name == DATASET_FILE  # spaces between its values, or "checksum" itself
        path.write_bytes(good)
    shard = out / "val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(GptcError, match=r"val_000000.bin is damaged \(wrong checksum\)"):
        Dataset.open(out).shard("val", 0)


WRONG = (None, True, -1, 2**63, 1.5, "x", "", [], ["x"], {}, {"a": 1})


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size", "options", "created_by", "sources", "tokenizer.kind", "tokenizer.fingerprint",
        "splits.train.bytes", "splits.val.documents", "splits.train.shards",
        "splits.train.shards.0.file", "splits.train.shards.0.tokens", "sources.0.source",
        "sources.0.bytes", "sources.0.files", "sources.0.documents", "sources.0.licence",
    ],
)  # fmt: skip
def test_a_wrong_value_in_dataset_json_is_one_line(tmp_path: Path, field: str) -> None:
    """Whichever value is wrong: whoever reads the file finds the types that `prepare` wrote."""
    out = counting(tmp_path, 100).folder
    whole = (out / "dataset.json").read_bytes()
    *path, last = [int(key) if key.isdigit() else key for key in field.split(".")]
    refused = 0
    for value in WRONG:
        meta = json.loads(whole)
        del meta["checksum"]
        inside = meta
        for key in path:
            inside = inside[key]
        inside[last] = value
        (out / "dataset.json").write_text(json.dumps(meta))
        try:
            dataset = Dataset.open(out)
            json.dumps(dataset.describe())
            drawn(dataset.meta["splits"]["val"])
            counts(dataset.meta["sources"][0])
        except GptcError as error:
            refused += "\n" not in str(error)
    assert refused >= len(WRONG) - 3


def test_verify_finds_a_changed_token(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 1000, shard_tokens=400)
    path = dataset.shards("train")[1]
    raw = bytearray(path.read_bytes())
    raw[1100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(GptcError, match=r"train_000001\.bin is damaged"):
        Dataset.open(dataset.folder).verify()


def test_a_token_outside_the_vocabulary_is_found(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 1000, shard_tokens=400)
    write_shard(dataset.shards("train")[1], [7] * 399 + [256], 257)
    dataset = Dataset.open(dataset.folder)
    with pytest.raises(GptcError, match=r"train_000001\.bin holds token 256"):
        list(eval_batches(dataset, "train", 4, 9))


def test_describe_shows_what_is_inside(tmp_path: Path) -> None:
    text = "Once upon a time. " * 50
    dataset = prepare([write_source(tmp_path, text)], tmp_path / "out", tokenizer="char")
    told = dataset.describe()
    assert told["tokenizer"] == "char"
    assert told["splits"]["train"]["tokens"] == 810
    assert told["splits"]["train"]["vocab_used"] == dataset.vocab_size == len(set(text))
    assert told["splits"]["train"]["sample"] == text[:200]
    assert told["splits"]["val"]["sample"] == text[810:]
    json.dumps(told)


def test_a_shard_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    """An access to a mapped page behind the end of its file would end the process."""
    dataset = prepare([write_source(tmp_path, "text " * 20_000)], tmp_path / "out")
    batches = eval_batches(dataset, "train", batch_size=8, seq_len=16)
    next(batches)
    os.truncate(dataset.shards("train")[0], 4096)
    with pytest.raises(GptcError, match=r"train_000000\.bin became shorter while it was in use"):
        list(batches)
