"""Values that are nested deeply are refused by depth, not by what the stack has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptc.data.preparation import prepare
from gptc.errors import GptcError, UsageError
from gptc.files.values import MOST_DEEP, nests_deeply
from gptc.generation.options import TextOptions
from gptc.tokenizer.chat import chat_prompt
from gptc.tokenizer.conversations import with_template
from gptc.tokenizer.registry import make_tokenizer

TURNS = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"%s}]'
GOOD = '{"messages": ' + TURNS % "" + "}\n"
ROWS = {
    "a tool": '{"tools": [%s], "messages": ' + TURNS % "" + "}",
    "a message": '{"messages": ' + TURNS % ', "x": %s' + "}",
    "another field": '{"other": %s, "messages": ' + TURNS % "" + "}",
}


def deep(n: int) -> Any:
    value: Any = 1
    for _ in range(n):
        value = {"a": value}
    return value


def test_the_depth_of_a_value() -> None:
    assert not nests_deeply(deep(MOST_DEEP))
    assert nests_deeply(deep(MOST_DEEP + 1))
    assert not nests_deeply(["text"] * 10_000)
    twice: list[Any] = []
    for _ in range(100):
        twice = [twice, twice]
    assert not nests_deeply(twice)  # in no more steps than it has lists
    twice[0] = twice
    assert nests_deeply(twice)


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_nested_deeply(tmp_path: Path, name: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(GOOD * 3 + ROWS[name] % json.dumps(deep(150)) + "\n")
    assert prepare([str(path)], tmp_path / "150").meta["chats"]["left_out"] == 0
    bad = [ROWS[name] % ('{"a":' * n + "1" + "}" * n) for n in (250, 490, 700, 970, 5000)]
    path.write_text("\n".join(bad) + "\n" + GOOD * 3)
    with pytest.raises(GptcError, match="line 1 has lists and objects that are nested more than"):
        prepare([str(path)], tmp_path / "out")
    found = prepare([str(path)], tmp_path / "out", on_bad_row="skip")
    assert found.meta["chats"]["left_out"] == len(bad)


def test_a_text_may_have_other_fields_of_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "abc", "other": ' + '{"a":' * 700 + "1" + "}" * 700 + "}\n")
    assert prepare([str(path)], tmp_path / "out").n_tokens("all") > 0


@pytest.mark.parametrize("n", [250, 490, 980, 5000])
def test_prompts_and_schemas_that_are_nested_deeply(n: int) -> None:
    tokenizer = make_tokenizer("bytes")
    with_template(tokenizer)
    said = [{"role": "user", "content": "a"}]
    for options in ({"tools": [deep(n)]}, {"documents": [deep(n)]}, {"variables": {"x": deep(n)}}):
        with pytest.raises(UsageError, match="nested more than 197 deep"):
            chat_prompt(tokenizer, said, **options)
    with pytest.raises(UsageError, match="nested more than 197 deep"):
        chat_prompt(tokenizer, [{**said[0], "x": deep(n)}])


def test_a_schema_that_has_no_text() -> None:
    for schema in (deep(5000), {"a": object()}, {"a": {1, 2}}):
        with pytest.raises(UsageError, match="json_schema has no text in JSON"):
            TextOptions(json_schema=schema)
