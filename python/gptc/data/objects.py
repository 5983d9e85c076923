"""Rows of files as objects: all fields of a row of JSON (lines or an array), CSV, TSV and Parquet.

`rows.py` gives the field of text alone. Here a row that cannot be read is a value, so that the
caller may leave it out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from gptc.data.json_array import array_objects, is_json
from gptc.data.parquet import largest_page, open_parquet
from gptc.data.readers import OpenFile, Reading, opened
from gptc.data.rows import (
    Fields,
    Tally,
    csv_table,
    json_lines,
    json_object,
    raised,
    tsv_table,
    without_raw,
)
from gptc.errors import GptcError
from gptc.files.limits import limit, refuse
from gptc.files.values import MOST_DEEP, nests_deeply

Row: TypeAlias = tuple[str, dict[str, Any] | GptcError]
"""The place of a row, such as "chats.jsonl: line 7", and its fields or the fault."""

LEAVE_OUT = "or leave such rows out with --on-bad-row skip"

LISTS = ("messages", "conversations", "tools")
"""Columns with lists, which a table holds as JSON."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_BATCH_ROWS = 64


def objects(
    path: Path, name: str, reading: Reading, columns: Sequence[str], tally: Tally
) -> Iterator[Row]:
    """The rows of the file at `path`, called `name`, or of the members of an archive.

    Of Parquet, only `columns` are read. Text with JSON in one of the columns LISTS becomes a list.
    GptcError for a file that is damaged, or not a file of rows.
    """
    try:
        yield from _objects(path, name, reading, columns, tally)
    except GptcError as error:
        raise without_raw(error) from error.__cause__


def _objects(
    path: Path, name: str, reading: Reading, columns: Sequence[str], tally: Tally
) -> Iterator[Row]:
    for found in opened(path, name, reading, tally):
        if found.format == ".parquet":
            yield from _parquet_objects(found.path, found.name, columns)
        elif found.format in (".jsonl", ".ndjson"):
            yield from _json_objects(found)
        elif found.format:
            tables = {".csv": csv_table, ".tsv": tsv_table}
            yield from _table_objects(tables[found.format](found.file, found.name), columns)
        elif is_json(found.name):
            yield from _array_rows(found)
        else:
            raise GptcError(
                f"{found.name} is not a file of rows, as the other sources are: give .jsonl, "
                ".json, .csv, .tsv or .parquet, or leave it out with --exclude"
            )


def _not_utf8(where: str) -> GptcError:
    return GptcError(f"{where} is not UTF-8 text: convert it, {LEAVE_OUT}")


def _json_objects(found: OpenFile) -> Iterator[Row]:
    for where, characters in json_lines(found.file, found.name):
        try:
            characters.encode()
            yield where, _good(json_object(characters, where), where)
        except UnicodeEncodeError:
            yield where, _not_utf8(where)
        except GptcError as error:
            yield where, without_raw(error, f", {LEAVE_OUT}")


def _array_rows(found: OpenFile) -> Iterator[Row]:
    for where, row in array_objects(found.file, found.name):
        yield where, row if isinstance(row, GptcError) else _good(row, where)


def _table_objects(table: Iterator[tuple[str, Fields]], columns: Sequence[str]) -> Iterator[Row]:
    where, first = next(table, ("", []))
    header = raised(first)
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None and twice in columns:
        raise GptcError(f"{where} has several columns {twice}: rename all but one")
    for where, fields in table:
        if isinstance(fields, GptcError):
            yield where, without_raw(fields, f", {LEAVE_OUT}")
            continue
        if _SURROGATE.search("".join(fields)):
            yield where, _not_utf8(where)
            continue
        row = dict(zip(header, fields, strict=False))
        yield where, _good({name: _cell(row[name], name) for name in row}, where)


def _parquet_objects(path: Path, name: str, columns: Sequence[str]) -> Iterator[Row]:
    with open_parquet(path, name) as file:
        chosen = [column for column in file.schema_arrow.names if column in columns]
        n_rows, number, longest = _BATCH_ROWS, 0, limit("row")
        for column in chosen:
            if largest_page(path, name, column) > longest:
                n_rows = 1
        for batch in file.iter_batches(n_rows, columns=chosen, use_threads=False):
            if batch.nbytes > longest * max(1, batch.num_rows):
                raise refuse(f"{name}: row {number + 1}", "row", "cut it into several rows")
            for i in range(batch.num_rows):
                number += 1
                where = f"{name}: row {number}"
                try:
                    row = {c: batch.column(j)[i].as_py() for j, c in enumerate(chosen)}
                except UnicodeDecodeError:
                    yield where, _not_utf8(where)
                    continue
                yield where, _good({c: _cell(value, c) for c, value in row.items()}, where)


def _cell(value: Any, column: str) -> Any:
    """A cell's value: a list, where its text is that of one."""
    if isinstance(value, str) and column in LISTS:
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _good(row: dict[str, Any], where: str) -> dict[str, Any] | GptcError:
    """The row as text that can be encoded, or its fault."""
    if nests_deeply(row):
        return GptcError(
            f"{where} has lists and objects that are nested more than {MOST_DEEP} deep: leave it "
            f"out, {LEAVE_OUT}"
        )
    return {_whole(name): _whole(value) for name, value in row.items()}


def _whole(value: Any) -> Any:
    """The value with U+FFFD for each half of a surrogate pair in its texts."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value) if _SURROGATE.search(value) else value
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    return value
