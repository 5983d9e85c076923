"""Bombs: a small file that unpacks to much is read in bounded memory, or refused in one line.

The class of fault: memory, or disk, as large as a file claims. Each case runs in a process whose
peak memory is measured; GPTC_LIMITS raises a limit.
"""

from __future__ import annotations

import atexit
import bz2
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from gptc.errors import GptcError, UsageError
from gptc.files.limits import LIMITS, limit, read_file
from gptc.files.values import check_values, parse_json

MOST_BYTES = 500_000_000

# The text is read, not stored: only what the readers hold is measured. One process imports them and
# forks for each file; the peak of a fork begins with what it has from there.
PROGRAM = """
import json, os, sys
from contextlib import suppress
from pathlib import Path
from gptc.data.readers import Reading, members
from gptc.data.rows import Tally
from gptc.errors import GptcError
from gptc.files.memory import peak_resident_bytes
with suppress(ImportError):
    import pyarrow.parquet

def read(path):
    n_bytes, said = 0, ""
    try:
        for _, blocks in members(path, path.name, Reading(), Tally()):
            for block in blocks:
                n_bytes += len(block)
                if n_bytes > 3 << 30:
                    raise GptcError("enough")
    except GptcError as error:
        said = str(error)
    return peak_resident_bytes(), n_bytes, said

for line in sys.stdin:
    path, os.environ["GPTC_LIMITS"] = json.loads(line)
    child = os.fork()
    if not child:
        print(json.dumps(read(Path(path))), flush=True)
        os._exit(0)
    print("end", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def reader() -> subprocess.Popen[str]:
    """The process that forks for each file."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    atexit.register(process.communicate)
    return process


def run(path: Path, limits: str = "") -> tuple[int, int, str]:
    """The peak memory of a process that reads a file, the bytes of text, and its error."""
    stdin, stdout = reader().stdin, reader().stdout
    assert stdin is not None
    assert stdout is not None
    print(json.dumps([str(path), limits]), file=stdin, flush=True)
    lines = [stdout.readline()]
    while lines[-1] and not lines[-1].startswith("end "):
        lines.append(stdout.readline())
    assert len(lines) == 2, lines  # nothing else is printed
    assert lines[1] == "end 0\n"
    peak, n_bytes, said = json.loads(lines[0])
    assert "\n" not in said
    return peak, n_bytes, said


# ---- makers ----


def tar_header(kind: bytes, size: int, name: str = "a.txt") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def tar_of_a_long_name(path: Path) -> None:
    with path.open("wb") as file:
        file.write(tar_header(tarfile.GNUTYPE_LONGNAME, 3 << 30))
        file.truncate(3 << 30)


def tar_of_attributes(path: Path) -> None:
    with path.open("wb") as file:
        file.write(tar_header(tarfile.XHDTYPE, 3 << 30))
        file.truncate(3 << 30)


def tar_of_nested_headers(path: Path) -> None:
    one = tar_header(tarfile.GNUTYPE_LONGNAME, 1 << 20) + b"a" * (1 << 20)
    path.write_bytes(one * 40)


def sparse_tar(path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.size = 512
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.name": "a.txt",
        "GNU.sparse.size": str(1 << 50),
        "GNU.sparse.map": "0,512," * 10 + f"{1 << 49},512",
    }
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(512) + bytes(1024))


def old_sparse_tar(path: Path) -> None:
    header = bytearray(tar_header(tarfile.GNUTYPE_SPARSE, 0))
    header[482] = 1  # another header with a part of the map follows
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    more = bytearray(512)
    more[504] = 1
    path.write_bytes(bytes(header) + bytes(more) * 400_000)


def xz_of_a_gigabyte(path: Path) -> None:
    packer = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "preset": 1}])
    data = bytearray(packer.compress(b"words ") + packer.flush())
    # The size of the dictionary is the byte after the filter's number, in the block's header.
    at = data.index(b"\x21\x01", 12) + 2
    data[at] = 40  # 4 GiB - 1
    size = (data[12] + 1) * 4
    data[12 + size - 4 : 12 + size] = _crc32(bytes(data[12 : 12 + size - 4]))
    path.write_bytes(data)


def _crc32(data: bytes) -> bytes:
    import zlib

    return zlib.crc32(data).to_bytes(4, "little")


def lzma_alone(path: Path) -> None:
    data = bytearray(lzma.compress(b"words", lzma.FORMAT_ALONE))
    data[1:5] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(data)


def zstd_of_runs(path: Path) -> None:
    # RFC 8878: magic number, descriptor, window of 8 MiB, blocks of one repeated byte.
    block = (128 << 10 << 3 | 2).to_bytes(3, "little") + b"a"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([13 << 3]) + block * 6_000)


def zstd_of_a_window(path: Path) -> None:
    """A window of 2 GiB, which the content fills."""
    block = (128 << 10 << 3 | 2).to_bytes(3, "little") + b"a"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + block * 20_000)


def gzip_of_a_line(path: Path) -> None:
    import gzip

    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(bytes(1 << 20))


def zip_of_members(path: Path) -> None:
    entry = b"PK\x01\x02" + bytes(24) + b"\x01\0" + bytes(16) + b"a"
    n_bytes = len(entry) * 700_000
    end = b"PK\x05\x06" + bytes(8) + n_bytes.to_bytes(4, "little") + bytes(6)
    path.write_bytes(entry * 700_000 + end)


def zip_of_bzip2(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive,
        archive.open("a.txt", "w") as file,
    ):
        for _ in range(100):
            file.write(bytes(1 << 20))


def zip_of_a_window(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.txt", b"words")
    data = bytearray(path.read_bytes())
    at = 30 + len("a.txt") + 4 + 1
    data[at : at + 4] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(data)


def json_of_lists(path: Path) -> None:
    path.write_bytes(b'{"text": "a", "b": [' + b"[]," * (10 << 20) + b"[]]}\n")


def json_of_a_line(path: Path) -> None:
    path.write_bytes(b'{"text": "' + b"a" * (40 << 20) + b'"}\n')


def csv_of_columns(path: Path) -> None:
    path.write_bytes(b"text," + b"ab," * (10 << 20) + b"\n")


def csv_of_fields(path: Path) -> None:
    lines = (b"b" * 1000 + b"\n") * 40_000
    path.write_bytes(b"text\n" + b'"' + b"a" * (30 << 20) + b'",\n"' + lines)


def csv_of_long_fields(path: Path) -> None:
    field = b'"' + (b"a" * 1000 + b"\n") * 30_000 + b'",'
    with path.open("wb") as file:
        file.write(b"text\n")
        file.writelines([field] * 20)


def tsv_of_columns(path: Path) -> None:
    path.write_bytes(b"text" + b"\tab" * (10 << 20) + b"\n")


def parquet_of(path: Path, texts: list[bytes], **options: object) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.binary())})
    parquet.write_table(table, path, compression="zstd", **options)


def parquet_of_a_page(path: Path) -> None:
    parquet_of(path, [bytes(1 << 20)] * 200, use_dictionary=False, data_page_size=1 << 30)


def parquet_of_one_text(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    # As parquet_of would write 20 equal texts: one entry of a dictionary, to which all refer.
    entry, rows = pyarrow.array([bytes(30 << 20)], pyarrow.binary()), pyarrow.array([0] * 20)
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(rows, entry)})
    parquet.write_table(table, path, compression="zstd", store_schema=False)


def parquet_of_prefixes(path: Path) -> None:
    texts = [b"a" * (8 << 20) + b"%04d" % i for i in range(40)]
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    parquet_of(path, texts, use_dictionary=False, column_encoding=encoding)


def parquet_of_contents(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"PAR1")
        file.truncate(2 << 30)
        file.seek(2 << 30)
        file.write((1 << 30).to_bytes(4, "little") + b"PAR1")


REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    ("long.tar", tar_of_a_long_name, "header"),
    ("attributes.tar", tar_of_attributes, "header"),
    ("nested.tar", tar_of_nested_headers, "too many headers"),
    ("sparse.tar", sparse_tar, "holes"),
    ("old.tar", old_sparse_tar, "holes"),
    ("window.xz", xz_of_a_gigabyte, "window"),
    ("alone.xz", lzma_alone, "window"),
    ("window.zst", zstd_of_a_window, "window"),
    ("members.zip", zip_of_members, "directory"),
    ("window.zip", zip_of_a_window, "window"),
    ("lists.jsonl", json_of_lists, "fields"),
    ("line.jsonl", json_of_a_line, "row"),
    ("line.jsonl.gz", gzip_of_a_line, "row"),
    ("columns.csv", csv_of_columns, "fields"),
    ("fields.csv", csv_of_fields, "row"),
    ("long.csv", csv_of_long_fields, "row"),
    ("columns.tsv", tsv_of_columns, "fields"),
    ("page.parquet", parquet_of_a_page, "page"),
    ("contents.parquet", parquet_of_contents, "directory"),
]


@pytest.mark.parametrize(("name", "make", "why"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_a_bomb_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None], why: str
) -> None:
    make(tmp_path / name)
    peak, _, said = run(tmp_path / name)
    assert peak < MOST_BYTES
    assert name in said
    if why in LIMITS:
        assert f"exceeds the limit of {LIMITS[why].default:,} {LIMITS[why].what}" in said
        assert f"GPTC_LIMITS={why}=SIZE" in said
    else:
        assert why in said


@pytest.mark.parametrize(
    ("name", "make", "n_bytes"),
    [
        ("runs.txt.zst", zstd_of_runs, 6_000 * (128 << 10)),
        ("bzip2.zip", zip_of_bzip2, 100 << 20),
        ("one.parquet", parquet_of_one_text, 20 * (30 << 20)),
        ("prefixes.parquet", parquet_of_prefixes, 40 * ((8 << 20) + 4)),
    ],
)
def test_a_bomb_is_read_block_by_block(
    tmp_path: Path, name: str, make: Callable[[Path], None], n_bytes: int
) -> None:
    make(tmp_path / name)
    peak, found, said = run(tmp_path / name)
    assert peak < (200_000_000 if name == "bzip2.zip" else MOST_BYTES)
    if said:  # the blocks of runs have no last one
        assert "within a frame" in said
    assert n_bytes <= found < n_bytes + 1000


def test_a_limit_is_raised(tmp_path: Path) -> None:
    json_of_a_line(tmp_path / "a.jsonl")
    assert run(tmp_path / "a.jsonl", "row=64M")[1:] == (40 << 20, "")


# ---- streams and folders ----


def prepare_command(folder: Path, source: str, limits: str = "", stdin: object = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gptc", "prepare", source, "--out", str(folder / "out")],
        stdin=stdin,  # type: ignore[call-overload]
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "GPTC_LIMITS": limits},
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (folder / "out").exists()
    return done.stderr


def test_sources_without_an_end(tmp_path: Path) -> None:
    assert "/dev/zero is a device" in prepare_command(tmp_path, "/dev/zero")
    with Path("/dev/zero").open("rb") as zero:
        assert "standard input is a device" in prepare_command(tmp_path, "-", stdin=zero)
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        said = prepare_command(tmp_path, "-", "stream=10M", endless.stdout)
        assert "standard input exceeds the limit of 10,000,000 bytes" in said
        endless.kill()


def test_links_that_leave_a_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "text").write_text("words " * 99)
    (tmp_path / "in" / "again").symlink_to("a/text")
    for target in ("../secret", "../secret/key"):
        (tmp_path / "in" / "link").symlink_to(target)
        said = prepare_command(tmp_path, str(tmp_path / "in"), "links=0")
        assert f"link is a link to {tmp_path}/secret" in said
        assert "exceeds the limit of 0 followed links" in said
        (tmp_path / "in" / "link").unlink()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_file_that_is_not_regular(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x.json")
    with pytest.raises(GptcError, match=r"x\.json is not a regular file"):
        read_file(tmp_path / "x.json")


def test_a_file_beyond_its_limit(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(GptcError, match=r"x\.json exceeds the limit of 67,108,864 bytes"):
        read_file(tmp_path / "x.json")


def test_a_prompt_without_an_end(tmp_path: Path) -> None:
    from gptc.cli.infer import _read_prompt

    with pytest.raises(GptcError, match="the prompt exceeds the limit"):
        _read_prompt(None, Path("/dev/zero"))


# ---- the table ----


def test_the_override(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit("row") == 32 << 20
    monkeypatch.setenv("GPTC_LIMITS", "row=64M, page=2Gi")
    assert (limit("row"), limit("page"), limit("fields")) == (64 * 10**6, 2 << 30, 1_000_000)
    for wrong, why in (("rows=1", "'rows' is not one of row, "), ("row", "not a whole number")):
        monkeypatch.setenv("GPTC_LIMITS", wrong)
        with pytest.raises(UsageError, match=why):
            limit("row")


def test_values_in_texts_are_not_counted() -> None:
    text = b'{"a": "' + b',[{\\\\\\"' * 400_000 + b'"}'
    check_values(text, "x", "values", "cut it")
    assert len(parse_json(text, "x")["a"]) == 5 * 400_000
    for broken in (b'"' + b'\\"' * 1_000_000 + b",", b'"\\' * 900_000 + b"," * 900_000, b'",'):
        with pytest.raises(GptcError):
            parse_json(broken * 2, "x")


def test_every_limit_is_documented() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()
    for name, (_, what) in LIMITS.items():
        assert f"| `{name}` |" in text, name
        assert what in text, name


def test_tars_that_are_whole_are_read(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(3):
            info = tarfile.TarInfo("long/" * 60 + f"{i}.txt")
            info.size, info.pax_headers = 6, {"comment": "x" * 1000}
            archive.addfile(info, io.BytesIO(b"words "))
    for name, data in (
        ("a.tar", out.getvalue()),
        ("a.tar.xz", lzma.compress(out.getvalue())),
        ("a.tar.bz2", bz2.compress(out.getvalue())),
    ):
        (tmp_path / name).write_bytes(data)
        assert run(tmp_path / name)[1:] == (18, "")


def test_xz_streams_that_were_joined(tmp_path: Path) -> None:
    one = lzma.compress(b"words ")
    (tmp_path / "a.xz").write_bytes(one + bytes(8) + one + bytes(4))
    assert run(tmp_path / "a.xz")[1:] == (12, "")
    (tmp_path / "a.xz").write_bytes(one + one[:-3])
    assert "within a stream" in run(tmp_path / "a.xz")[2]
