"""Archives and compressed files give all of their text, or an error names the damage.

The class: members that are lost or invented without a word. GNU tar exits with 2 for each of the
damaged archives here; a Mac's resource forks are not text; --include and --exclude are for members
as for files; messages name the fault and its remedy.
"""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from corpus import text_of, write_source
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.errors import GptcError

MEMBERS = {f"f{i}.txt": f"member {i} ".encode() + b"words " * 40 for i in range(6)}
JUNK = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(80)


def tar(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return packed.getvalue()


def prepared(folder: Path, name: str, data: bytes, **options: Any) -> Dataset:
    return prepare([write_source(folder, data, name)], folder / "out", val_fraction=0, **options)


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x3F]) + data[at + 1 :]


WHOLE = tar(MEMBERS)  # a member takes 1024 bytes
DAMAGED = {
    "checksum": changed(WHOLE, 3 * 1024 + 148),
    "name": changed(WHOLE, 2 * 1024 + 10),
    "cut in a header": WHOLE[: 3 * 1024 + 300],
    "cut at a member": WHOLE[: 3 * 1024],
    "cut in data": WHOLE[: 3 * 1024 + 700],
    "no end mark": WHOLE[: 6 * 1024],
    "refuse after the end": WHOLE[: 6 * 1024] + bytes(1024) + b"x" * 512,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_tar_is_refused(tmp_path: Path, damage: str, packed: bool) -> None:
    data = gzip.compress(DAMAGED[damage]) if packed else DAMAGED[damage]
    name = "a.tar.gz" if packed else "a.tar"
    with pytest.raises(GptcError, match=rf"{name}(:f3.txt)? cannot be unpacked \(.*--raw"):
        prepared(tmp_path, name, data)
    assert not (tmp_path / "out").exists()


def test_a_whole_tar_is_read_and_so_are_joined_ones(tmp_path: Path) -> None:
    text = b"".join(MEMBERS.values())
    dataset = prepared(tmp_path, "a.tar", WHOLE)
    assert text_of(dataset) == text
    assert dataset.meta["sources"][0]["files"] == dataset.meta["sources"][0]["documents"] == 6
    (tmp_path / "two").mkdir()
    assert text_of(prepared(tmp_path / "two", "b.tar", WHOLE + WHOLE)) == text + text


@pytest.mark.parametrize("pack", [tar, zipped])
def test_hidden_members_and_resource_forks_are_left_out(tmp_path: Path, pack: Any) -> None:
    members = {
        "__MACOSX/book/._ch1.txt": JUNK,
        "book/._ch1.txt": JUNK,
        "book/.DS_Store": JUNK,
        "book/.git/config": b"[core]",
        "./book/ch1.txt": b"one;",
        "book/ch2.txt": b"two;",
    }
    name = "a.tar" if pack is tar else "a.zip"
    assert text_of(prepared(tmp_path, name, pack(members))) == b"one;two;"


@pytest.mark.parametrize("pack", [tar, zipped])
def test_globs_choose_the_members_of_an_archive(tmp_path: Path, pack: Any) -> None:
    members = {"src/a.py": b"a;", "src/b.png": JUNK, "tests/c.py": b"c;", "src/tests/d.py": b"d;"}
    name = "x.tar" if pack is tar else "x.zip"
    source = write_source(tmp_path / "in", pack(members), name)

    def chosen(source: str, **options: Any) -> bytes:
        return text_of(prepare([source], tmp_path / "out", val_fraction=0, force=True, **options))

    for given in (source, str(tmp_path / "in")):
        assert chosen(given, include=["*.py"]) == b"a;c;d;"
        assert chosen(given, include=["*.py"], exclude=["tests"]) == b"a;"
        assert chosen(given, exclude=["src/*"]) == b"c;"
    assert chosen(str(tmp_path / "in"), include=["x.*"], exclude=["*.png"]) == b"a;c;d;"
    with pytest.raises(GptcError, match=r"empty.*--include"):
        chosen(source, include=["*.rs"])


def test_exclude_leaves_out_folders_by_their_name(tmp_path: Path) -> None:
    for name in ("a.py", "node_modules/x/b.py", "sub/node_modules/c.py", "sub/build/d.py"):
        write_source(tmp_path / "in", f"{name};", name)

    def chosen(*exclude: str) -> bytes:
        source = str(tmp_path / "in")
        out = tmp_path / "out"
        return text_of(prepare([source], out, val_fraction=0, force=True, exclude=exclude))

    assert chosen("node_modules") == b"a.py;sub/build/d.py;"
    assert chosen("node_modules/", "sub/build") == b"a.py;"


def test_a_zip_with_a_password_says_so(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.txt": b"secret"}))
    central = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[central + 8] |= 1
    with pytest.raises(GptcError, match=r"a\.zip:a\.txt is encrypted: .*password"):
        prepared(tmp_path, "a.zip", bytes(data))


@pytest.mark.parametrize(
    "changes",
    [
        {8: b"\0\x08", 46: b"\xff"},  # the name shall be UTF-8
        {46: b"\0"},  # the name ends where it begins
        {42: b"\xf0\xff\xff\x7f"},  # the member begins behind the end
        {46 + 5 + 16: b"\xff\xff\0\0"},  # the list does, so that members begin before 0
    ],
)
def test_a_zip_with_wrong_fields_cannot_be_unpacked(
    tmp_path: Path, changes: dict[int, bytes]
) -> None:
    """Python's zipfile raises errors of many sorts for these."""
    data = bytearray(zipped({"a.txt": b"some words"}))
    central = data.index(b"PK\x01\x02")
    for at, change in changes.items():
        data[central + at : central + at + len(change)] = change
    with pytest.raises(GptcError, match=r"^[^\n]*a\.zip cannot be unpacked [^\n]*$"):
        prepared(tmp_path, "a.zip", bytes(data))


@pytest.mark.parametrize("log", [28, 31])
def test_zstd_frames_with_long_windows_are_read(
    tmp_path: Path, log: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zstandard")
    monkeypatch.setenv("GPTC_LIMITS", "window=2Gi")
    # RFC 8878: magic number, descriptor, window descriptor (its exponent), a last raw block.
    block = (len(b"words") << 3 | 1).to_bytes(3, "little") + b"words"
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([log - 10 << 3]) + block
    assert text_of(prepared(tmp_path, "a.zst", frame)) == b"words"


def test_a_python_without_a_module_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lzma

    packed = lzma.compress(b"words")
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(GptcError, match="module lzma, which this Python was built without"):
        prepared(tmp_path, "a.xz", packed)


def test_a_file_that_ends_with_the_mark_gets_no_second_one(tmp_path: Path) -> None:
    mark = "<|endoftext|>"
    contents = [f"one{mark}", f"two{mark}\n", "three", f"{mark}four", "", "five"]
    for i, content in enumerate(contents):
        write_source(tmp_path / "in", content, f"{i}.txt")
    rows = "".join(f'{{"text": "{row}"}}\n' for row in (f"six{mark}", f"{mark}seven", mark))
    write_source(tmp_path / "in", rows, "9.jsonl")
    dataset = prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer="bpe:300", val_fraction=0)
    text = text_of(dataset).decode()
    assert text == "one|two|\nthree|four|five|six|seven".replace("|", mark)
    assert dataset.meta["sources"][0]["documents"] == 7
