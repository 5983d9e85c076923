"""Rows are neither lost, merged nor altered: each text is what the format's standard says.

The class: a reader that takes a row for something else without a word. TSV has no quoting (IANA,
text/tab-separated-values); CSV keeps line ends inside quotes (RFC 4180); a lone half of a surrogate
pair in JSON is U+FFFD, as in tiktoken; a byte-order mark is not a part of the first name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corpus import text_of, write_source
from gptc.data.preparation import prepare
from gptc.errors import GptcError

MARK = b"\n<|endoftext|>\n"


def rows_of(folder: Path, name: str, data: str | bytes, **options: Any) -> list[bytes]:
    source = write_source(folder, data, name)
    dataset = prepare([source], folder / "out", val_fraction=0, force=True, **options)
    return text_of(dataset).split(MARK)[:-1]


def test_quotes_in_tsv_are_characters(tmp_path: Path) -> None:
    table = 'id\ttext\n1\t"To be or not\n2\tsecond\n3\tends "\n4\t"Hello" she said\n5\t5" pipe\n'
    expected = [b'"To be or not', b"second", b'ends "', b'"Hello" she said', b'5" pipe']
    assert rows_of(tmp_path, "r.tsv", table) == expected
    with pytest.raises(GptcError, match=r"r\.tsv: line 3 has 1 of 2 fields"):
        rows_of(tmp_path, "r.tsv", 'id\ttext\n1\t"two\nlines"\n')
    with pytest.raises(GptcError, match=r"r\.tsv: line 2 has 3 fields, and the header has 2"):
        rows_of(tmp_path, "r.tsv", "id\ttext\n1\ta\tb\n")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_inside_quotes_are_kept(tmp_path: Path, end: str) -> None:
    rows = ["id,text", '1,"one\r\ntwo"', '2,"a\r\n\r\nb"', '3,"CR\r\r\n next\n"', "4,plain", ""]
    expected = [b"one\r\ntwo", b"a\r\n\r\nb", b"CR\r\r\n next\n", b"plain"]
    assert rows_of(tmp_path, "r.csv", end.join(rows)) == expected


def test_bad_rows_are_named_by_the_line_in_which_they_begin(tmp_path: Path) -> None:
    start = 'id,text\n1,"a\nb\nc"\n\n'  # the next row begins in line 6
    for bad, why in [
        ('2,"d" e\nf\n', "line 6 is not a row of CSV"),
        ('2,"never closed\n3,b\n4,c\n', "line 6 is not a row of CSV .*unexpected end"),
        ('2,"one\nmore", two\n', "line 6 has 3 fields, and the header has 2"),
    ]:
        with pytest.raises(GptcError, match=why):
            rows_of(tmp_path, "r.csv", start + bad)
    with pytest.raises(GptcError, match="has 2 columns text"):
        rows_of(tmp_path, "r.csv", "text,id,text\na,1,b\n")
    assert rows_of(tmp_path, "r.csv", "id,text\n1,a,\n") == [b"a"]  # as spreadsheets write


def test_lone_halves_of_surrogate_pairs_become_replacement_characters(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    lines = [
        rb'{"text": "good \ud83d\ude00 pair"}',
        rb'{"text": "half \ud83d end"}',
        rb'{"text": "low \udcb2 end"}',
        rb'{"text": "mixed caf\u00e9 \udcc3\udca9 end"}',
    ]
    # As tiktoken: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").
    expected = [
        json.loads(line)["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for line in lines
    ]
    assert expected[3] == "mixed café \ufffd\ufffd end"
    for tokenizer in ("bytes", "char"):
        found = rows_of(tmp_path, "r.jsonl", b"\n".join(lines), tokenizer=tokenizer)
        assert [text.decode() for text in found] == expected


def test_bytes_that_are_not_utf8_stay_so_next_to_an_escaped_half(tmp_path: Path) -> None:
    line = b'{"text": "raw \xe9 and \\ud83d, \\udce9\xe9"}\n'
    assert rows_of(tmp_path, "r.jsonl", line) == [b"raw \xe9 and \xef\xbf\xbd, \xef\xbf\xbd\xe9"]
    with pytest.raises(GptcError, match=r"r\.jsonl: byte 4 \(0xe9\) is not UTF-8"):
        rows_of(tmp_path, "r.jsonl", line, tokenizer="char")
    replaced = rows_of(tmp_path, "r.jsonl", line, tokenizer="char", errors="replace")
    assert replaced == ["raw \ufffd and \ufffd, \ufffd\ufffd".encode()]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("r.jsonl", '{"text": "one, 1"}\n{"text": "two"}\n'),
        ("r.csv", 'text,id\r\n"one, 1",1\r\ntwo,2\r\n'),
        ("r.csv", '"text","id"\r\n"one, 1","1"\r\n"two","2"\r\n'),
        ("r.tsv", "text\tid\r\none, 1\t1\r\ntwo\t2\r\n"),
    ],
)
def test_a_byte_order_mark_is_not_a_part_of_a_name(tmp_path: Path, name: str, data: str) -> None:
    assert rows_of(tmp_path, name, "\ufeff" + data) == [b"one, 1", b"two"]


def test_byte_order_marks_of_joined_files_are_passed_over(tmp_path: Path) -> None:
    one = '\ufeff{"text": "one"}\n'
    assert rows_of(tmp_path, "r.jsonl", one + one + "\ufeff\n") == [b"one", b"one"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.tsv"])
def test_other_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    text = '{"text": "one"}\n' if name == "r.jsonl" else "text\none\n"
    data = text.encode(encoding)
    data = data if encoding != "utf-16-be" else b"\xfe\xff" + data
    with pytest.raises(GptcError, match=f"{name} is text in UTF-16 or UTF-32: convert"):
        rows_of(tmp_path, name, data)


def test_a_number_of_many_digits_is_json(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "r.jsonl", f'{{"text": "one", "n": {"9" * 5000}}}') == [b"one"]
    with pytest.raises(GptcError, match="the field text is not text but 99999"):
        rows_of(tmp_path, "r.jsonl", f'{{"text": {"9" * 50}}}')


def as_parquet(folder: Path, texts: Any, kind: str = "string") -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(texts, type=getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), folder / "made")
    return (folder / "made").read_bytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("r.jsonl", '{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n'),
        ("r.csv", "id,text\n1,one\n2,\n3\n4,two\n"),
        ("r.tsv", "text\tid\none\t1\n\t2\n\ntwo\t3\n\t4\n"),
        ("r.parquet", ["one", None, "", "two"]),
    ],
)
def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, name: str, data: Any) -> None:
    data = as_parquet(tmp_path, data) if name.endswith("parquet") else data
    notes: list[str] = []
    assert rows_of(tmp_path, name, data, notify=notes.append) == [b"one", b"two"]
    assert len(notes) == 1
    assert "2 rows without text left out" in notes[0]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary"])
def test_parquet_keeps_each_byte_and_opens_each_name(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    name = "b\udcffd.parquet"  # a byte that is not UTF-8
    assert rows_of(tmp_path, name, as_parquet(tmp_path, ["é", "b"], kind)) == ["é".encode(), b"b"]
    column = pyarrow.array([b"raw \xe9", b"b"])  # marked as text, but not UTF-8
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, column.buffers())
    if kind == "string":
        found = rows_of(tmp_path, name, as_parquet(tmp_path, bad))
        assert found == [b"raw \xe9", b"b"]


@pytest.mark.parametrize(("name", "header"), [("h.csv", "a,b\n"), ("h.tsv", "a\tb\n")])
def test_a_table_of_a_header_alone_has_no_rows(tmp_path: Path, name: str, header: str) -> None:
    with pytest.raises(GptcError, match=r"has no rows, only a header \(a, b\)"):
        rows_of(tmp_path, name, header)
    with pytest.raises(GptcError, match="has no field text, only a, b"):
        rows_of(tmp_path, name, 2 * header)
