"""Archives and compressed files give all of their text, or an error names the damage.

The class: members that are lost or invented without a word. GNU tar exits with 2 for each of the
damaged archives here; a Mac's resource forks are not text; --include and --exclude are for members
as for files; messages name the fault and its remedy.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import stat
import struct
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


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("damage", ["first byte", "cut", "refuse"])
def test_damage_in_a_second_stream_is_found(tmp_path: Path, suffix: str, damage: str) -> None:
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    if suffix == "zst":
        zstandard = pytest.importorskip("zstandard")
        packers["zst"] = zstandard.ZstdCompressor().compress
    one, two = (packers[suffix](word * 20) for word in (b"one ", b"two "))
    assert text_of(prepared(tmp_path, f"a.{suffix}", one + two)) == b"one " * 20 + b"two " * 20
    second = {"first byte": changed(two, 0), "cut": two[:3], "refuse": b"end"}[damage]
    with pytest.raises(GptcError, match=rf"b.{suffix} cannot be unpacked"):
        prepared(tmp_path, f"b.{suffix}", one + second)


def of_type(archive: bytes, name: str, sort: bytes) -> bytes:
    """A tar archive with another type of a member."""
    at = archive.index(name.encode())
    header = bytearray(archive[at : at + 512])
    header[156:157] = sort
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return archive[:at] + bytes(header) + archive[at + 512 :]


def test_members_of_unknown_types_are_files(tmp_path: Path) -> None:
    for sort in (b"7", b"A", b"z"):
        (folder := tmp_path / sort.decode()).mkdir()
        text = text_of(prepared(folder, "a.tar", of_type(WHOLE, "f3.txt", sort)))
        assert text == b"".join(MEMBERS.values())
    for sort in (b"V", b"D"):  # a label, a list of names
        (folder := tmp_path / sort.decode()).mkdir()
        text = text_of(prepared(folder, "a.tar", of_type(WHOLE, "f3.txt", sort)))
        assert text == b"".join(MEMBERS[name] for name in MEMBERS if name != "f3.txt")
    with pytest.raises(GptcError, match=r"a\.tar .*f3\.txt in it began in another volume"):
        prepared(tmp_path, "a.tar", of_type(WHOLE, "f3.txt", b"M"))


def without_first(archive: bytes) -> bytes:
    """A zip archive whose list lacks its first member, which is in the file."""
    end = archive.rindex(b"PK\5\6")
    begin = struct.unpack_from("<I", archive, end + 16)[0]
    listed = archive[archive.index(b"PK\1\2", begin + 4) : end]
    n = struct.unpack_from("<H", archive, end + 8)[0] - 1
    tail = b"PK\5\6" + struct.pack("<4H2IH", 0, 0, n, n, len(listed), begin, 0)
    return archive[:begin] + listed + tail


def test_a_zip_with_members_that_its_list_lacks_is_refused(tmp_path: Path) -> None:
    whole = zipped(MEMBERS)
    for i, data in enumerate((whole + whole, without_first(whole))):
        with pytest.raises(GptcError, match=rf"{i}\.zip holds a member behind byte 0"):
            prepared(tmp_path, f"{i}.zip", data)
    # A program that unpacks itself begins with its code.
    text = text_of(prepared(tmp_path, "a.zip", b"#!/bin/sh\nexec unzip $0\n" + whole))
    assert text == b"".join(MEMBERS.values())


def test_a_zip_of_windows_has_folders_and_links_are_left_out(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in ("d\\", "d\\a.txt", "d\\.git\\b.txt", "__MACOSX\\d\\c.txt", "e\\f.txt"):
            info = zipfile.ZipInfo(name)
            info.filename = name
            info.create_system = 0
            archive.writestr(info, name[-5:] if name[-1] != "\\" else "")
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "d/a.txt")
    assert text_of(prepared(tmp_path, "a.zip", packed.getvalue(), exclude=["e"])) == b"a.txt"


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


@pytest.mark.parametrize("target", [".hidden/a.txt", "old/a.txt", "a.blob"])
def test_a_hard_link_to_a_member_that_is_not_read_is_named(tmp_path: Path, target: str) -> None:
    """A tar archive holds a file of two names once, under the first."""
    members = {"f.txt": b"text " * 9, "sub/b.txt": b"", target: b"linked " * 9}
    archive = of_type(tar(members), "sub/b.txt", b"1")
    at = archive.index(b"sub/b.txt") + 157
    archive = archive[:at] + target.encode().ljust(100, b"\0") + archive[at + 100 :]
    archive = of_type(archive, "sub/b.txt", b"1")  # the checksum again
    chosen = {"include": ("*.txt",), "exclude": ("old",)}
    where = "a.tar:sub/b.txt is a hard link to " + target
    with pytest.raises(GptcError, match=f"{re.escape(where)}, which is hidden or not chosen"):
        prepared(tmp_path, "a.tar", archive, **chosen)
    if not target.startswith("."):  # both names are read: the text comes once
        assert text_of(prepared(tmp_path, "b.tar", archive)) == b"text " * 9 + b"linked " * 9
    chosen["exclude"] += ("sub",)  # neither is
    assert text_of(prepared(tmp_path / "sub", "a.tar", archive, **chosen)) == b"text " * 9


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
    with pytest.raises(GptcError, match="empty"):  # nothing but that member
        prepared(tmp_path, "a.zip", bytes(data), exclude=["a.txt"])


NAMED_WRONG = {
    "a.tar": (gzip.compress(WHOLE), ".gz"),
    "b.tar.gz": (lzma.compress(WHOLE), ".xz"),
    "c.csv": (zipped({"sheet.xml": b"<x/>"}), ".zip"),
    "d.jsonl": (bz2.compress(b"{}"), ".bz2"),
    "e.zip": (gzip.compress(b"text"), ".gz"),
}


@pytest.mark.parametrize("name", NAMED_WRONG)
def test_a_whole_file_with_another_name_is_not_called_damaged(tmp_path: Path, name: str) -> None:
    data, suffix = NAMED_WRONG[name]
    with pytest.raises(GptcError) as caught:
        prepared(tmp_path, name, data)
    assert f"{name} begins as a {suffix} file does: give it a name that ends in" in str(
        caught.value
    )
    assert "again" not in str(caught.value)


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
    with pytest.raises(
        GptcError, match=r"^[^\n]*a\.zip (cannot be unpacked|holds a member) [^\n]*$"
    ):
        prepared(tmp_path, "a.zip", bytes(data))


@pytest.mark.parametrize("log", [28, 31])
def test_zstd_frames_with_long_windows_are_read(tmp_path: Path, log: int) -> None:
    pytest.importorskip("zstandard")
    # RFC 8878: magic number, descriptor, window descriptor (its exponent), a last raw block.
    block = (len(b"words") << 3 | 1).to_bytes(3, "little") + b"words"
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([log - 10 << 3]) + block
    skipped = b"\x50\x2a\x4d\x18" + (40).to_bytes(4, "little") + bytes(40)
    packed = frame + skipped + frame
    assert text_of(prepared(tmp_path, "a.zst", packed)) == b"wordswords"


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
    contents += ["six" + mark + "\n" * 200, f"\n {mark}seven", f"\ufeff{mark}eight"]
    for i, content in enumerate(contents):
        write_source(tmp_path / "in", content, f"{i}.txt")
    rows = (f"nine{mark}", f"{mark}ten", mark, f"\n{mark}{mark}eleven{mark} {mark}", f" {mark} ")
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    write_source(tmp_path / "in", lines, "9.jsonl")
    dataset = prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer="bpe:300", val_fraction=0)
    text = text_of(dataset).decode()
    files = "one|two|\nthree|four|five|six|" + "\n" * 200 + "\n |seven\ufeff|eight"
    assert text == f"{files}|nine|ten|eleven".replace("|", mark)
    assert dataset.meta["sources"][0]["documents"] == 11
