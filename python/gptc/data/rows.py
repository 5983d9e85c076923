"""Files of rows with a field of text: JSON lines, CSV, TSV and Parquet.

A row without text (null, empty, or cut off before the field) is passed over and counted.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from gptc.data.archives import named
from gptc.data.parquet import largest_page, open_parquet
from gptc.errors import GptcError
from gptc.files.limits import limit, refuse
from gptc.files.values import check_values

_RAW = "take the file as it is with --raw"
AS_IT_IS = f"or {_RAW}"
_FEWER = f"leave fields out, {_RAW}"
_ADVICE = re.compile(",?(?: or)? take (?:the file as it is|its bytes as they are) with --raw")
_MOST_DIGITS = 1000
_BATCH_ROWS = 256
_BATCH_BYTES = 32 << 20  # of a page: its rows become as large, one by one

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # of the error handler surrogateescape


def without_raw(error: GptcError, instead: str = "") -> GptcError:
    """The error with other advice than --raw, which is for texts."""
    return type(error)(_ADVICE.sub(instead, str(error)))


@dataclass
class Tally:
    """Counts of a reading."""

    n_files: int = 0  # and members of archives
    n_without_text: int = 0  # rows that were passed over


def json_rows(file: IO[bytes], name: str, text_field: str, tally: Tally) -> Iterator[bytes]:
    """The texts of JSON lines."""
    for where, characters in json_lines(file, name):
        row = json_object(characters, where)
        if text_field not in row:
            raise no_field(where, text_field, row)
        value = row[text_field]
        if isinstance(value, str) and _SURROGATE.search(value):
            twin = json_object(_ESCAPED_BYTE.sub("\ufffd", characters), where).get(text_field)
            text = _without_halves(value, twin)
        else:
            text = _field(value, where, text_field)
        if text:
            yield text
        else:
            tally.n_without_text += 1


def json_lines(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """The place and the characters of each line with JSON.

    Bytes that are not UTF-8 are kept as halves of surrogate pairs: --errors decides about them.
    """
    for number, line in enumerate(_lines(file, name), 1):
        where = f"{name}: line {number}"
        if number == 1:
            _refuse_utf16(line, name)
        line = line.removeprefix(codecs.BOM_UTF8)  # of each file, where some were joined
        if line.strip():
            check_values(line, where, "fields", f"cut it into several rows, {_RAW}")
            yield where, line.decode("utf-8", "surrogateescape")


def json_object(characters: str, where: str) -> dict[str, Any]:
    """The object that a line of JSON is. GptcError for anything else."""
    try:
        row = json.loads(characters, parse_int=_number)
    except (ValueError, RecursionError):
        raise GptcError(f"{where} is not JSON: repair it, {AS_IT_IS}") from None
    if not isinstance(row, dict):
        raise GptcError(
            f"{where} is not a JSON object: give one object with fields a line, {AS_IT_IS}"
        )
    return row


def _number(digits: str) -> float:
    """A whole number, of which int() takes only so many digits."""
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def _refuse_utf16(begin: bytes, name: str) -> None:
    """GptcError for a text of rows in UTF-16 or UTF-32, by its byte order mark."""
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise GptcError(
            f"{name} is text in UTF-16 or UTF-32: convert it to UTF-8, for instance with iconv, or "
            f"{_RAW}"
        )


def _without_halves(value: str, twin: Any) -> bytes:
    """The bytes of a text with U+FFFD for each half of a surrogate pair that JSON wrote as \\uD83D.

    In `value`, a byte that is not UTF-8 is half of a pair too. In `twin` it is something else.
    """
    if not isinstance(twin, str) or len(twin) != len(value):
        twin = value
    kept = (
        "\ufffd" if c == t and _SURROGATE.match(c) else c for c, t in zip(value, twin, strict=True)
    )
    return "".join(kept).encode("utf-8", "surrogateescape")


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The lines of a file without their ends. GptcError for one too long to be held."""
    with named(name):
        number, most = 0, limit("row")
        while line := file.readline(most + 1):
            number += 1
            if len(line) > most:
                raise _too_long(f"{name}: line {number}")
            yield line.removesuffix(b"\n").removesuffix(b"\r")


def _too_long(where: str) -> GptcError:
    return refuse(where, "row", f"cut it into several rows, {_RAW}")


# ---- tables ----


def csv_rows(file: IO[bytes], name: str, text_field: str, tally: Tally) -> Iterator[bytes]:
    """The texts of a CSV file."""
    column = None
    table = csv_table(file, name)
    for _, fields in table:
        row = raised(fields)
        if column is None:
            column = _column(row, name, text_field, table)
            continue
        text = row[column] if column < len(row) else ""
        if text:
            yield text.encode("utf-8", "surrogateescape")
        else:
            tally.n_without_text += 1


Fields: TypeAlias = list[str] | GptcError
"""The fields of a row of a table, or what is wrong with it."""


def csv_table(file: IO[bytes], name: str) -> Iterator[tuple[str, Fields]]:
    """The place and the fields of the header of a CSV file (RFC 4180), then those of its rows.

    Quoted fields may hold line ends, which are kept. A row that cannot be read is an error in its
    place.
    """
    csv.field_size_limit(limit("row"))
    row_lines = _RowLines(_text_lines(file, name), name)
    rows = csv.reader(row_lines, strict=True)
    begin, header = 1, list[str]()
    while True:
        fields: Fields | None
        try:
            fields = next(rows, None)
        except csv.Error as e:
            fields = GptcError(
                f"{name}: line {begin} is not a row of CSV ({e}): repair it, {AS_IT_IS}"
            )
        if fields is None:
            return
        where, begin = f"{name}: line {begin}", rows.line_num + 1
        row_lines.end()
        if not fields:
            continue
        if not header and isinstance(fields, list):
            header = fields
        yield where, _of_width(fields, header, where, "quote it")


class _RowLines:
    """The lines of a CSV file, with limits for a row of several lines: its size, its fields."""

    def __init__(self, lines: Iterator[str], name: str) -> None:
        self._lines = enumerate(lines, 1)
        self._name = name
        self._longest, self._widest = limit("row"), limit("fields")
        self.end()

    def end(self) -> None:
        """Begins another row."""
        self._n_characters = self._n_fields = 0
        self._quoted = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self._n_characters += len(line)
        if self._n_characters > self._longest:
            raise _too_long(f"{self._name}: line {number}")
        n_fields = line.count(",")
        if n_fields + self._n_fields > self._widest:  # not in quotes?
            n_fields = sum(part.count(",") for part in line.split('"')[self._quoted :: 2])
        self._n_fields += n_fields
        if self._n_fields > self._widest:
            raise refuse(f"{self._name}: line {number}", "fields", _FEWER)
        self._quoted ^= line.count('"') % 2 == 1
        return line


def _text_lines(file: IO[bytes], name: str) -> Iterator[str]:
    """The lines of a file with their ends: LF, CRLF or CR."""
    # Bytes that are not UTF-8 are kept: --errors decides about them later.
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    try:
        with named(name):
            number, most = 0, limit("row")
            while line := text.readline(most + 1):
                number += 1
                if len(line) > most:
                    raise _too_long(f"{name}: line {number}")
                if number == 1:
                    _refuse_utf16(line[:4].encode("utf-8", "surrogateescape"), name)
                    line = line.removeprefix("\ufeff")
                yield line
    finally:
        with suppress(ValueError):  # closed already
            text.detach()  # whoever has opened the file closes it


def tsv_rows(file: IO[bytes], name: str, text_field: str, tally: Tally) -> Iterator[bytes]:
    """The texts of a TSV file."""
    column = None
    table = tsv_table(file, name)
    for _, found in table:
        fields = raised(found)
        if column is None:
            column, n_columns = _column(fields, name, text_field, table), len(fields)
            continue
        text = fields[column] if column < len(fields) else ""
        if text:
            yield text.encode("utf-8", "surrogateescape")
        elif fields != [""] or n_columns == 1:
            tally.n_without_text += 1


def tsv_table(file: IO[bytes], name: str) -> Iterator[tuple[str, Fields]]:
    """The place and the fields of the header and the rows of a TSV file: a line each, no quoting.

    The format is text/tab-separated-values of IANA. A row of wrong width is an error in its place.
    """
    header: list[str] = []
    widest = limit("fields")
    for number, ended in enumerate(_text_lines(file, name), 1):
        line = ended.rstrip("\r\n")
        if line.count("\t") > widest:
            raise refuse(f"{name}: line {number}", "fields", _FEWER)
        fields: Fields = line.split("\t")
        where = f"{name}: line {number}"
        if not header:
            header = line.split("\t")
        elif line and len(line.split("\t")) < len(header):
            fields = GptcError(
                f"{where} has {len(line.split(chr(9)))} of {len(header)} fields: TSV knows no "
                f"quotes around tabs and line ends, so give CSV, {AS_IT_IS}"
            )
        yield where, _of_width(fields, header, where, "a text cannot hold one in TSV, so give CSV")


def _column(
    header: list[str], name: str, text_field: str, rows: Iterator[tuple[str, Fields]]
) -> int:
    """The index of the column of text. `rows` are those that follow."""
    n = header.count(text_field)
    if not n:
        if next(rows, None) is None:
            raise GptcError(
                f"{name} has no rows, only a header ({', '.join(header):.100}): add rows, or name "
                "another file"
            )
        raise no_field(name, text_field, header)
    if n > 1:
        raise GptcError(
            f"{name} has {n} columns {text_field}: rename those that are not to be read, or choose "
            "another with --text-field NAME"
        )
    return header.index(text_field)


def _of_width(fields: Fields, header: list[str], where: str, advice: str) -> Fields:
    """The fields, or an error if there are more than in the header: a text was cut."""
    if isinstance(fields, GptcError) or not any(fields[len(header) :]):
        return fields
    if len(header) == 1 and ";" in header[0]:
        return GptcError(
            f"{where}: the header has one column, {header[0]:.100}: separate columns by commas, "
            "not by semicolons"
        )
    return GptcError(
        f"{where} has {len(fields)} fields, and the header has {len(header)} (a separator in a "
        f"text: {advice}): repair it, {AS_IT_IS}"
    )


def raised(fields: Fields) -> list[str]:
    """The fields. GptcError for a row that cannot be read."""
    if isinstance(fields, GptcError):
        raise fields
    return fields


def parquet_rows(path: Path, name: str, text_field: str, tally: Tally) -> Iterator[bytes]:
    """The texts of a Parquet file."""
    with open_parquet(path, name) as file:
        import pyarrow

        fields = file.schema_arrow.names
        if text_field not in fields:
            raise no_field(name, text_field, fields)
        kind = file.schema_arrow.field(text_field).type
        if pyarrow.types.is_nested(kind):
            raise _not_text(f"{name}: row 1", text_field, str(kind))
        page = largest_page(path, name, text_field)
        n_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, page)))
        number, longest = 0, limit("row")
        for batch in file.iter_batches(n_rows, columns=[text_field], use_threads=False):
            for cell in _plain(batch.column(0)):
                number += 1
                text = _field(cell.as_py(), f"{name}: row {number}", text_field)
                if len(text) > longest:
                    raise _too_long(f"{name}: row {number}")
                if text:
                    yield text
                else:
                    tally.n_without_text += 1


def _plain(column: Any) -> Any:
    """A column of text as bytes, which need not be UTF-8; other columns as they are."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type):
        return column.cast(pyarrow.binary())
    if pyarrow.types.is_large_string(column.type):
        return column.cast(pyarrow.large_binary())
    return column


def _field(value: Any, where: str, text_field: str) -> bytes:
    """The bytes of a row's text; none for null."""
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise _not_text(where, text_field, f"{value!r:.40}")
    return value.encode("utf-8", "surrogateescape")


def _not_text(where: str, text_field: str, found: str) -> GptcError:
    return GptcError(
        f"{where}: the field {text_field} is not text but {found}: choose another with "
        "--text-field NAME"
    )


def no_field(where: str, text_field: str, fields: Iterable[str]) -> GptcError:
    """The error for a row or file without the field of text."""
    names = [str(field) for field in fields]
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return GptcError(
        f"{where} has no field {text_field}, only {listed or 'none'}: choose one with "
        "--text-field NAME, or take the file as it is with --raw"
    )
