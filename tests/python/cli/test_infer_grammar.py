"""`gptc infer` follows a regex, a grammar or a JSON schema, and names a mistake in one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc.engine.config import GPTConfig
from gptc.tokenizer.native import CharTokenizer
from small_models import varied

Config = Callable[..., GPTConfig]


def test_infer_with_a_regex_or_a_grammar(infer: Callable[..., Any], tmp_path: Path) -> None:
    ran = infer("-p", "x", "--regex", r"\d{3}-[é-ü]+!", "--max-tokens", 9)
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(r"x\d{3}-[é-ü]+!?\ufffd?\n", ran.out)
    (tmp_path / "g").write_text('\ufeffroot ::= "<" [a-c]{1,5} ">" "\\n"\n', "utf-8")
    ran = infer("-p", "x", "--grammar", tmp_path / "g", "--num-samples", 3, "--json")
    samples = json.loads(ran.out)["samples"]
    assert len(samples) == 3
    for sample in samples:
        assert re.fullmatch("<[a-c]{1,5}>\n", sample["text"])
        assert sample["finish"] == "stop"
    assert infer("-p", "x", "--grammar", tmp_path / "g").out == f"x{samples[0]['text']}\n"
    assert infer("-p", "x", "--grammar", 'root ::= "ab" "/"*').out.startswith("xab")


def test_infer_with_a_json_schema(infer: Callable[..., Any], tmp_path: Path) -> None:
    schema = {"type": "array", "items": {"enum": [1, "é"]}, "minItems": 2, "maxItems": 3}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    given = ("-p", "x", "--num-samples", 4, "--json", "--json-schema")
    ran = infer(*given, tmp_path / "s.json")
    assert (ran.code, ran.err) == (0, "")
    samples = json.loads(ran.out)["samples"]
    assert json.loads(infer(*given, " " + json.dumps(schema)).out)["samples"] == samples
    for sample in samples:
        assert sample["finish"] == "stop"
        value = json.loads(sample["text"])
        assert 2 <= len(value) <= 3
        assert set(value) <= {1, "é"}


def test_lines_with_rules_of_their_own(infer: Callable[..., Any], tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a"},
        {"prompt": "b", "regex": "[xy]{4}", "num_samples": 2},
        {"prompt": "c", "grammar": 'root ::= "(" root ")" | "é"'},
        {"prompt": "d", "regex": "(a"},
        {"prompt": "e", "grammar": "root ::= x"},
        {"prompt": "f", "regex": "a", "grammar": 'root ::= "a"'},
        {"prompt": "g", "regex": 5},
        {"prompt": "h", "max_tokens": 3},
        {"prompt": "i", "json_schema": {"enum": ["left", "right"]}},
        {"prompt": "j", "json_schema": '{"const": [1, 2]}'},
        {"prompt": "k", "json_schema": {"type": "foo"}},
        {"prompt": "l", "json_schema": 5},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    ran = infer("--prompts", file, "--regex", "[0-9]{6}")
    assert ran.code == 1
    assert "6 of 12 prompts failed" in ran.err
    answers = [json.loads(line) for line in ran.out.splitlines()]
    texts = [[s["text"] for s in answer.get("samples", [])] for answer in answers]
    assert re.fullmatch("[0-9]{6}", texts[0][0])
    assert all(re.fullmatch("[xy]{4}", text) for text in texts[1])
    assert re.fullmatch(r"\(*é\)*", texts[2][0])
    assert re.fullmatch("[0-9]{3}", texts[7][0])
    assert json.loads(texts[8][0]) in ("left", "right")
    assert json.loads(texts[9][0]) == [1, 2]
    errors = [answer.get("error") for answer in answers]
    assert errors[:3] == [None] * 3
    assert "the regex is refused: unclosed group" in errors[3]
    assert "1:10 of the grammar: no rule is called x" in errors[4]
    assert "a regex and a grammar exclude each other" in errors[5]
    assert "regex is 5; it must be text" in errors[6]
    assert "Invalid type: foo" in errors[10]
    assert "json_schema is 5; it must be text" in errors[11]


def test_a_line_that_no_token_continues_stops_no_other(
    gptc: Callable[..., Any], config: Config, tmp_path: Path
) -> None:
    with varied(config(vocab_size=5)) as model:
        model.save(tmp_path / "m", CharTokenizer("abcx\n"))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "regex": "abé", "num_samples": 2}\n{"prompt": "a"}\n')
    ran = gptc("infer", "-m", tmp_path / "m", "--prompts", file, "--max-tokens", 9)
    assert ran.code == 1
    first, second = [json.loads(line) for line in ran.out.splitlines()]
    assert "no token fits after 'ab': the rules allow 'é'" in first["error"]
    assert second["samples"][0]["tokens"] == 9
    ran = gptc("infer", "-m", tmp_path / "m", "-p", "a", "--regex", "abé")
    assert ran.code == 1
    assert ran.err.startswith("gptc: error: no token fits after 'ab'")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--regex", "(a"], 2, "the regex is refused: unclosed group"),
        (["--regex", "a", "--grammar", "g"], 2, "--regex and --grammar exclude each other"),
        (["--regex", "a", "--beams", "2"], 2, "--beams and --regex exclude each other"),
        (["--grammar", "nowhere"], 1, "cannot read the grammar nowhere: No such file"),
        (["--grammar", "root ::= b"], 2, "1:10 of the grammar: no rule is called b"),
        (["--json-schema", '{"type": 3}'], 2, "type"),
        (["--grammar", "{bad}"], 2, "2:7 of the grammar: no rule is called b"),
        (["--grammar", "{bytes}"], 1, "is not UTF-8"),
        (["--regex", "()"], 2, "only the empty text matches the regex"),
        (["--json-schema", "nowhere"], 1, "cannot read the JSON schema nowhere: No such file"),
        (["--json-schema", "{bad}"], 2, "the JSON schema is not JSON"),
        (["--json-schema", "s", "--grammar", "g"], 2, "--grammar and --json-schema exclude each"),
        (["--json-schema", "s", "--beams", "2"], 2, "--beams and --json-schema exclude each other"),
        (["--grammar", "/dev/zero"], 1, "/dev/zero exceeds the limit of 131,072 bytes for a regex"),
    ],
)
def test_infer_names_what_is_wrong(
    infer: Callable[..., Any], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    files = {"{bad}": b"root ::= a\na ::=\tb\n", "{bytes}": b'root ::= "\xff"'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ran = infer("-p", "x", *(tmp_path / a if a in files else a for a in arguments))
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1


def test_the_limit_of_a_pattern_can_be_raised(
    infer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g").write_text('root ::= "ab"\n' + "# a long comment\n" * 8000)
    given = ("-p", "x", "--grammar", tmp_path / "g")
    assert "GPTC_LIMITS=pattern=SIZE" in infer(*given).err
    monkeypatch.setenv("GPTC_LIMITS", "pattern=200k")
    assert infer(*given).out == "xab\n"
