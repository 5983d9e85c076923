"""Rows of every layout become the right messages, and a bad row is one line with its place.

The class of fault: a column or a role that is taken for another, a turn that is lost, a bad row
that is passed over in silence.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gptc.data.chats import COLUMNS, recognised
from gptc.data.objects import objects
from gptc.data.readers import Reading
from gptc.data.rows import Tally
from gptc.errors import GptcError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "messages": ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
    "messages with a system": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello."}, [USER, ANSWER]),
    "of messages": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    "instruction": ({"instruction": "Hi", "input": "", "output": "Hello."}, [USER, ANSWER]),
    "instruction with input": (
        {"instruction": "Add.", "input": "2, 3", "output": "5"},
        [{"role": "user", "content": "Add.\n\n2, 3"}, {"role": "assistant", "content": "5"}],
    ),
    "conversations": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
            ]
        },
        [USER, ANSWER],
    ),
    "conversations with a system": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": "Hi"},
                {"from": "assistant", "value": "Hello."},
            ],
        },
        [SYSTEM, USER, ANSWER],
    ),
}


def chats_of(row: dict[str, Any], where: str = "f.jsonl: line 7") -> list[Any]:
    kind = recognised(row)
    assert kind is not None
    return [chat.messages for chat in kind.chats(row, where)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout(name: str) -> None:
    row, expected = LAYOUTS[name]
    assert chats_of(row) == [expected]


def test_preference_rows_are_two_conversations() -> None:
    worse = {"role": "assistant", "content": "Go away."}
    plain = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}
    repeated = {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, worse]}
    for row in (plain, repeated, {**repeated, "prompt": None}):
        assert chats_of(row) == [[USER, ANSWER], [USER, worse]]
    for row, why in (
        ({**plain, "rejected": "Hello."}, "are the same"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, worse]}, "differ before the last"),
    ):
        with pytest.raises(GptcError, match=why):
            chats_of(row)


BAD = {
    "no turn of the assistant": {"messages": [USER]},
    r"message 2 \(user\) comes after user, where assistant is expected": {
        "messages": [USER, USER, ANSWER]
    },
    r"message 1 \(assistant\) comes first": {"messages": [ANSWER, USER]},
    r"message 3 \(system\) comes after assistant": {"messages": [USER, ANSWER, SYSTEM, USER]},
    "it ends with user, not with the assistant": {"messages": [USER, ANSWER, USER]},
    "message 1 has the role 'bot'": {"messages": [{**USER, "role": "bot"}, ANSWER]},
    "its messages are 'Hi', not a list": {"messages": "Hi"},
    r"its messages are \['Hi'\], not a list of objects": {"messages": ["Hi"]},
    "it has no messages": {"messages": []},
    r"message 2 \(assistant\) is empty": {"messages": [USER, {**ANSWER, "content": " "}]},
    "the content of message 1 is 7": {"messages": [{**USER, "content": 7}, ANSWER]},
    "its output is 5, not text": {"instruction": "Add.", "output": 5},
    "its output is null": {"instruction": "Add.", "output": None},
    "message 1 is from 'dog'": {"conversations": [{"from": "dog", "value": "x"}]},
    "its messages are null": {"messages": None},
    "answers are texts, which need a prompt": {"chosen": "a", "rejected": "b"},
    "its system prompt is 3": {"messages": [USER, ANSWER], "system": 3},
    "its tools are 'x'": {"messages": [USER, ANSWER], "tools": "x"},
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_row_is_one_line_with_its_place(why: str) -> None:
    with pytest.raises(GptcError, match=why) as error:
        chats_of(BAD[why])
    assert str(error.value).startswith("f.jsonl: line 7")
    assert "--on-bad-row skip" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_rows_are_not_recognised() -> None:
    assert recognised(["text"]) is None
    assert recognised(["prompt", "chosen"]) is None


# ---- files ----


def read(path: Path) -> list[Any]:
    return list(objects(path, path.name, Reading(), COLUMNS, Tally()))


def test_rows_of_all_formats_are_equal(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [{"messages": [USER, ANSWER]}, {"messages": [SYSTEM, USER, ANSWER]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    cells = [json.dumps(row["messages"]).replace('"', '""') for row in rows]
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.csv").write_text("messages\n" + "".join(f'"{cell}"\n' for cell in cells))
    (tmp_path / "a.tsv").write_text(
        "messages\n" + "".join(json.dumps(row["messages"]) + "\n" for row in rows)
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet"):
        assert [row for _, row in read(tmp_path / name)] == rows, name
    assert [where for where, _ in read(tmp_path / "a.csv")] == ["a.csv: line 2", "a.csv: line 3"]
    assert next(where for where, _ in read(tmp_path / "a.parquet")) == "a.parquet: row 1"


def test_faults_of_rows_are_values_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n[1]\nx\n{"prompt": "\xff"}\n')
    found = [str(row) for _, row in read(path)]
    assert found[1].startswith("b.jsonl: line 2 is not a JSON object")
    skip = ", or leave such rows out with --on-bad-row skip"
    assert found[2] == f"b.jsonl: line 3 is not JSON: repair it{skip}"
    assert found[3] == f"b.jsonl: line 4 is not UTF-8 text: convert it{skip}"
    (tmp_path / "c.jsonl").write_text('{"prompt": "a\\ud83d", "completion": "b"}')
    assert read(tmp_path / "c.jsonl")[0][1]["prompt"] == "a\ufffd"
    (tmp_path / "d.txt").write_text("text")
    with pytest.raises(GptcError, match=r"d\.txt is not a file of rows"):
        read(tmp_path / "d.txt")
    (tmp_path / "e.csv").write_text("prompt,prompt,completion\na,b,c\n")
    with pytest.raises(GptcError, match="several columns prompt"):
        read(tmp_path / "e.csv")
