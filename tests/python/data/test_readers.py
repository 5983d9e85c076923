"""The same text is read whatever it is packed in, and damage is named.

The class: a file that is taken for something else, or an error that says neither what nor why.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corpus import text_of
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.errors import GptcError, UsageError

STORY = b"Once upon a time.\n" * 300
MARK = "\n<|endoftext|>\n"


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    # Two frames, as parallel packers write them.
    pack = zstandard.ZstdCompressor().compress
    return bytes(pack(data[:9]) + pack(data[9:]))


def tar(data: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo("inner/story.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def zipped(data: bytes, name: str = "inner/story.txt") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return packed.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "a.txt.gz": gzip.compress,
    "a.gz": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
    "a.xz": lzma.compress,
    "a.bz2": bz2.compress,
    "a.ZST": zstd,
    "a.zip": zipped,
    "a.tar": tar,
    "a.tar.gz": lambda data: gzip.compress(tar(data)),
    "a.tgz": lambda data: gzip.compress(tar(data)),
    "a.tar.xz": lambda data: lzma.compress(tar(data)),
    "a.tar.zst": lambda data: zstd(tar(data)),
}


def prepared(folder: Path, name: str, data: bytes | str, **options: Any) -> Dataset:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return prepare([str(path)], folder / "out", **options)


@pytest.mark.parametrize("name", PACKERS)
def test_packed_text_is_unpacked(tmp_path: Path, name: str) -> None:
    packed = PACKERS[name](STORY)
    assert text_of(prepared(tmp_path, name, packed)) == STORY
    assert text_of(prepare([str(tmp_path / name)], tmp_path / "raw", raw=True)) == packed


@pytest.mark.parametrize("name", PACKERS)
def test_packed_text_cut_short_is_named(tmp_path: Path, name: str) -> None:
    packed = PACKERS[name](STORY)
    with pytest.raises(GptcError, match=rf"{name}.* cannot be unpacked .*--raw"):
        prepared(tmp_path, name, packed[: len(packed) // 2])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(set(PACKERS) - {"a.tar"}))
def test_what_is_not_packed_at_all_is_named(tmp_path: Path, name: str) -> None:
    if name.lower().endswith("zst"):
        pytest.importorskip("zstandard")
    wrong = "cannot be unpacked" if name.endswith("zip") else "does not begin as .* rename it"
    with pytest.raises(GptcError, match=f"{name}.* {wrong}"):
        prepared(tmp_path, name, STORY)


def test_a_damaged_byte_inside_a_zip_is_found(tmp_path: Path) -> None:
    packed = bytearray(zipped(os.urandom(5000)))
    packed[2000] ^= 1
    with pytest.raises(GptcError, match=r"a\.zip.* cannot be unpacked \(Bad CRC"):
        prepared(tmp_path, "a.zip", bytes(packed))


ROWS = ["one", "two\nlines", 'quoted "three", with a comma', "Zoë"]


def as_csv(separator: str) -> str:
    quoted = ['"{}"'.format(row.replace('"', '""')) for row in ROWS]
    rows = "".join(f"{i}{separator}{row}\r\n" for i, row in enumerate(quoted))
    if separator == "\t":  # IANA: no quotes, and no line end in a text
        plain = [row.replace("\n", " ") for row in ROWS]
        rows = "".join(f"{i}\t{row}\r\n" for i, row in enumerate(plain))
    return f"\ufeffnumber{separator}text\r\n{rows}"


def as_parquet(folder: Path) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"number": range(len(ROWS)), "text": ROWS})
    parquet.write_table(table, folder / "made", row_group_size=3)
    return (folder / "made").read_bytes()


def rows_in(folder: Path, name: str) -> bytes:
    lines = "".join(json.dumps({"number": i, "text": row}) + "\n\n" for i, row in enumerate(ROWS))
    if name.endswith(".jsonl.gz"):
        return gzip.compress(lines.encode())
    if name.endswith(".zip"):
        return zipped(lines.encode(), "rows.jsonl")
    if name.endswith(".parquet"):
        return as_parquet(folder)
    return (lines if name.endswith(".jsonl") else as_csv("\t" if "tsv" in name else ",")).encode()


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.zip", "r.csv", "r.tsv", "r.parquet"])
def test_rows_are_documents(tmp_path: Path, name: str) -> None:
    dataset = prepared(tmp_path, name, rows_in(tmp_path, name), val_fraction=0.3, val_by="order")
    text = text_of(dataset).decode()
    rows = [row.replace("\n", " ") if "tsv" in name else row for row in ROWS]
    assert text == "".join(row + MARK for row in rows)
    val = text_of(dataset, "val").decode()
    assert val.startswith("<|endoftext|>\n")  # whole rows
    assert dataset.tokenizer.start == "<|endoftext|>\n"


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet"])
def test_a_missing_field_lists_those_there_are(tmp_path: Path, name: str) -> None:
    data = rows_in(tmp_path, name)
    with pytest.raises(GptcError, match=r"no field body, only number, text: .*--text-field"):
        prepared(tmp_path, name, data, text_field="body")
    if name != "r.csv":  # there every value is text
        with pytest.raises(GptcError, match=r"1: the field number is not text but 0"):
            prepared(tmp_path, name, data, text_field="number")


def test_rows_that_are_none_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = '{"text": "a"}\n'
    for bad, why in [
        ("{", "line 2 is not JSON:"),
        ("[" * 100_000, "line 2 is not JSON:"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"body": "b"}', "line 2 has no field text, only body"),
    ]:
        with pytest.raises(GptcError, match=why):
            prepared(tmp_path, "r.jsonl", good + bad)
    with pytest.raises(GptcError, match="is not a row"):
        prepared(tmp_path, "r.csv", 'text\n"a" b\n')
    monkeypatch.setenv("GPTC_LIMITS", "row=1000")
    with pytest.raises(GptcError, match=r"r\.jsonl: line 2 exceeds the limit of 1,000 bytes"):
        prepared(tmp_path, "r.jsonl", good + '{"text": "' + "b" * 2000)


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, package in [("a.zst", "zstandard"), ("a.parquet", "pyarrow")]:
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(GptcError, match=f"pip install {package}"):
            prepared(tmp_path, name, b"\x28\xb5\x2f\xfd" if name == "a.zst" else b"PAR1\x15")


@pytest.mark.parametrize("block", [1, 2, 64])
def test_invalid_text_is_refused_replaced_or_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    for module in ("gptc.data.archives", "gptc.data.sources", "gptc.data.encode"):
        monkeypatch.setattr(f"{module}.BLOCK_BYTES", block)
    data = "é a".encode() + b"\xff\xfe b " + "東".encode()[:2]
    with pytest.raises(GptcError, match=r"bad: byte 4 \(0xff\).*--errors replace"):
        prepared(tmp_path, "bad", data, tokenizer="char")
    with pytest.raises(UsageError, match="no tokens for single bytes"):
        prepared(tmp_path, "bad", data, tokenizer="char", errors="bytes")
    replaced = prepared(tmp_path, "bad", data, tokenizer="char", errors="replace", val_fraction=0)
    assert text_of(replaced) == data.decode(errors="replace").encode()
    options = {"tokenizer": "bpe:300", "val_fraction": 0}
    with pytest.raises(GptcError, match=r"bad: byte 4 "):
        prepare([str(tmp_path / "bad")], tmp_path / "kept", **options)
    kept = prepare([str(tmp_path / "bad")], tmp_path / "kept", errors="bytes", **options)
    assert text_of(kept) == data


def test_memory_stays_small_whatever_the_format(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "one.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b"no line ends in it " * 55_000)  # a line of 42 MB
    tracemalloc.start()
    try:
        prepare([str(path)], tmp_path / "out", jobs=2)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.tar.gz", "a.zip"])
def test_a_pointer_of_git_lfs_is_named(gptc: Any, tmp_path: Path, name: str) -> None:
    """As `git clone` without Git LFS leaves it; with --raw its bytes are text."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    (tmp_path / "other.txt").write_text("a fox and a bear\n" * 30)
    command = ["prepare", tmp_path, "--out", tmp_path / "d", "--tokenizer", "bytes"]
    ran = gptc(*command)
    assert ran.code == 1
    assert (
        f"{name} is a pointer of Git LFS to a file, and not the file: run git lfs pull" in ran.err
    )
    assert gptc(*command, "--raw").code == 0
