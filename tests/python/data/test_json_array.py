"""Objects of a JSON array are rows, however the file is cut while it is read.

The class of fault: an array that is trained on as text, an object that is cut or lost between two
reads, brackets in a text that end an object, a file that is held whole.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from conversing import rows
from gptc.data import json_array
from gptc.data.chat_cache import check_rows, is_chat_file
from gptc.data.json_array import array_objects, is_json
from gptc.data.preparation import prepare
from gptc.errors import GptcError

OBJECTS: list[Any] = [
    {"output": 'a "quoted" \\ [ { , ] }', "n": [1, {"x": "]}"}]},
    {},
    {"é": "日本語 😀 \ud83d", "long": "x" * 3000},
]


def read(text: str | bytes) -> list[Any]:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return [row for _, row in array_objects(io.BytesIO(data), "a.json")]


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 2])
def test_objects_are_those_of_the_array(
    monkeypatch: pytest.MonkeyPatch, piece: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_array, "_PIECE", piece)
    text = json.dumps(OBJECTS, indent=indent)
    assert read(text) == OBJECTS
    assert read("\ufeff  " + text + "\n") == OBJECTS
    assert read(json.dumps(OBJECTS[:2], ensure_ascii=False)) == OBJECTS[:2]
    assert read("[]") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a JSON array"),
        ('{"a": 1}', "is not a JSON array"),
        ('[{"a": 1}', "row 2 is not JSON"),
        ('[{"a": 1}, {"a": "b]', "row 2 is not JSON"),
        ('[{"a": 1} {"a": 2}]', "row 2 is not JSON"),
        ('[{"a": 1},]', "row 2 is not JSON"),
        ('[{"a": 1}][{"a": 2}]', "more than one JSON array"),
        ('[{"a": ' + "[" * 100_000, "row 1 is not JSON"),
    ],
)
def test_damaged_arrays_are_refused(text: str, message: str) -> None:
    with pytest.raises(GptcError, match=rf"^a\.json.* {message}"):
        read(text)


def test_limits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTC_LIMITS", "row=200K,fields=1000")
    with pytest.raises(GptcError, match=r"a\.json: row 2.*row"):
        read(json.dumps([{}, {"a": "x" * 400_000}]))
    with pytest.raises(GptcError, match=r"a\.json: row 1.*fields"):
        read(json.dumps([{"a": [1] * 100_000}]))


def test_an_array_of_conversations_is_prepared_as_lines_are(tmp_path: Path) -> None:
    found = rows(20)
    (tmp_path / "a.json").write_text(json.dumps(found, indent=1))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    assert is_chat_file(str(tmp_path / "a.json"))
    both = [prepare([str(tmp_path / f"a.{s}")], tmp_path / s) for s in ("json", "jsonl")]
    for split in ("train", "val"):
        sums = [[s["checksum"] for s in d.meta["splits"][split]["shards"]] for d in both]
        assert sums[0] == sums[1]


def test_other_json_stays_a_text(tmp_path: Path) -> None:
    for i, value in enumerate(({"a": 1}, [1, 2], [{"text": "abc"}], [{"a": "b"}])):
        (tmp_path / f"{i}.json").write_text(json.dumps(value))
        assert not is_chat_file(str(tmp_path / f"{i}.json"))
    assert is_json("A.JSON.gz")
    assert not is_json("a.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("qa.jsonl", '{"question": "q", "answer": "a"}\n', r"fields question, answer, which no"),
        ("qa.json", '[{"question": "q", "answer": "a"}]', r"row 1 has the fields question, answer"),
        ("b.jsonl", "not json\n\n{\n", r"b.jsonl: line 1"),
        ("c.csv", "prompt;completion\na;b, c\n", r"one column, prompt;completion: separate col"),
        ("s.csv", "prompt;completion\na;b\n", r"separated by ; and not by commas\?\): name them"),
        ("d.jsonl", "{\n", r"line 1 is not JSON: repair it$"),
        ("d.jsonl.gz", "{\n", r"not begin as a .gz file does: .* again if not$"),
        ("d.parquet", "x", r"cannot be unpacked .*: copy or download it again$"),
        ("n.json", "[]", r"n.json has no rows: name a file with some$"),
        ("n.jsonl", "\n", r"n.jsonl has no rows"),
        ("h.csv", "prompt,completion\n", r"h.csv has no rows"),
        ("chats", '{"messages": []}\nx\n', r"rows of conversations, .* ends in .jsonl$"),
        ("chats.txt", '\ufeff\n{"messages": []}\n', r"rename it to one that ends in .jsonl$"),
        ("chats.txt", '[\n{"messages": []},\n', r"rename it to one that ends in .json$"),
        ("chats.txt", 'prompt,"completion"\na,b\n', r"rename it to one that ends in .csv$"),
        ("chats.txt", "prompt\tcompletion\na\tb\n", r"rename it to one that ends in .tsv$"),
    ],
)
def test_rows_of_no_layout_are_named_before_a_model_is_tuned(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(GptcError, match=message):
        check_rows(str(tmp_path / name))
    for fine in ('{"text": "a"}\n', '{"prompt": "a", "completion": "b"}\n'):
        (tmp_path / "f.jsonl").write_text(fine)
        check_rows(str(tmp_path / "f.jsonl"))
    for fine in ("prompt: a, completion: b\n", '{"a": 1}\n', '["a"]\n', "[note\n", ""):
        (tmp_path / "f.txt").write_text(fine)
        check_rows(str(tmp_path / "f.txt"))
