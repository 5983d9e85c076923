"""A pattern allows the tokens that keep a text a prefix of a match, in every kind of vocabulary.

The classes: a mask that lacks a token or has one too many; a regex that differs from Python's `re`;
a pattern that hangs, crashes, or is refused without a reason.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from gptc.errors import DeadEnd, GptcError, UsageError
from gptc.generation import constraint
from gptc.generation.constraint import Constraint, make_constraint
from gptc.generation.options import Sampling, TextOptions
from gptc.generation.request import Request, Sample
from gptc.tokenizer import scored, vocabulary
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.native import BpeTokenizer, CharTokenizer
from gptc.tokenizer.registry import make_tokenizer
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tiktoken import TiktokenTokenizer
from patterns import JSON_GRAMMAR, matches, of_bytes, reads, texts
from vocabularies import gpt2_folder, needs_gpt2

# ---- vocabularies ----


@pytest.fixture(scope="module")
def tokenizers(text_file: Path) -> dict[str, Tokenizer]:
    """A tokenizer of every kind that needs no download."""
    special = {"<|endoftext|>": 300, "<|other|>": 303}
    ranked = [bytes([i]) for i in range(256)] + [b"ab", b"\xc3\xa9", b"\xa9a", b'{"', b'": ', b'"}']
    found: dict[str, Tokenizer] = {
        "bytes": make_tokenizer("bytes"),
        "char": CharTokenizer('abc {}[]":,0123456789.-eé😀\n'),
        "bpe": BpeTokenizer.train(text_file.read_text() + 'é😀 {"a": [1, 2]}' * 50, 400),
        "tiktoken": TiktokenTokenizer("own", "[ -~]+", ranked, special),
        "sentencepiece": sentencepiece(),
    }
    found["tiktoken"].bos = 303
    return found


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a piece for each byte, and a dummy space before each text."""
    pytest.importorskip("sentencepiece")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "a", "\u2581a"]
    kinds = [scored.UNKNOWN, *[scored.CONTROL] * 2, *[scored.BYTE] * 256]
    kinds += [scored.NORMAL] * 2
    scores = [-float(i) for i in range(len(kinds))]
    made = vocabulary.from_scored(scored.Scored(pieces, scores, kinds), "a test")
    assert isinstance(made, SentencePieceTokenizer)
    return made


RULES: dict[str, dict[str, str]] = {
    "words": {"regex": "([abc]+ ){2,40}(é|😀)?"},
    "unicode": {"regex": "[^a-z]{1,20}"},
    "all": {"regex": r"[\s\S]*"},
    "json": {"grammar": JSON_GRAMMAR},
    "nested": {"grammar": 'root ::= "[" (root | [a-cé] root?)* "]" " "*'},
    "list": {"grammar": 'root ::= "a" ("b" | "c "){0,30} | "ab" | "abc" ".."'},
    "schema": {"json_schema": '{"type": "object", "properties": {"a": {"type": "integer"}}}'},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["bytes", "char", "bpe", "tiktoken", "sentencepiece"])
def test_allowed_tokens_are_those_whose_bytes_fit(
    tokenizers: dict[str, Tokenizer], name: str, rules: str
) -> None:
    tokenizer, rng = tokenizers[name], random.Random(f"{name} {rules}")
    found = make_constraint(tokenizer, tokenizer.vocab_size, **RULES[rules])
    by_bytes = of_bytes(**RULES[rules])
    n_seen = 0
    for _ in range(2):
        state, same = found.begin(), by_bytes.begin()
        for _ in range(6):
            fits, length = [], same.length
            for token, piece in enumerate(tokenizer.pieces):
                if token not in tokenizer.specials and piece and reads(same, piece):
                    fits.append(token)
                same.rewind(length)
            ends = sorted(tokenizer.ends) if same.complete else []
            assert state.allowed.tolist() == sorted(fits + ends)
            assert state.complete == same.complete
            assert state.ended == (same.complete and not fits)
            n_seen += 1
            if not fits:
                break
            token = rng.choice(fits)
            state.take(token)
            assert reads(same, tokenizer.pieces[token])
    assert n_seen > 3


@needs_gpt2
def test_allowed_tokens_of_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    gpt2 = make_tokenizer("gpt2")
    state = make_constraint(gpt2, gpt2.vocab_size, grammar=JSON_GRAMMAR).begin()
    for token in gpt2.encode('{"name": ["é😀", {"a": [1, 2.5e3, null]}').tolist():
        assert token in state.allowed
        state.take(token)
    allowed = {gpt2.pieces[token] for token in state.allowed}
    assert {b"]", b"]}", b",", b" ]"} <= allowed
    assert not {b"}", b"a", b":", b"]]", b"]:"} & allowed
    assert gpt2.end_of_text not in state.allowed
    for token in gpt2.encode("]}").tolist():
        state.take(token)
    assert state.ended
    assert state.allowed.tolist() == [gpt2.end_of_text]


def test_special_tokens_are_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["tiktoken"]
    assert tokenizer.specials == {300, 303}
    state = make_constraint(tokenizer, tokenizer.vocab_size, regex=r"<\|endoftext\|>(ab)?").begin()
    assert state.allowed.tolist() == [ord("<")]
    for byte in b"<|endoftext|>":
        assert not {300, 303} & set(state.allowed.tolist())
        state.take(byte)
    assert state.allowed.tolist() == [ord("a"), 256, 300, 303]
    made = tokenizers["sentencepiece"]
    assert made.specials == {0, 1, 2}
    state = make_constraint(made, made.vocab_size, regex="(<s>)?( ?a)+").begin()
    assert state.allowed.tolist() == [3 + 0x20, 3 + ord("<"), 3 + ord("a"), 259, 260]
    state.take(260)
    assert state.allowed.tolist() == [2, 3 + 0x20, 3 + ord("a"), 259, 260]


def test_a_model_may_have_fewer_tokens_than_its_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["tiktoken"]
    assert make_constraint(tokenizer, 98, regex="[a-c]+").begin().allowed.tolist() == [97]
    state = make_constraint(tokenizer, 302, regex="[a-c]+").begin()
    state.take(97)
    assert state.allowed.tolist() == [97, 98, 99, 256, 300]


@pytest.mark.parametrize("rules", RULES)
def test_tokens_taken_back_leave_no_trace(tokenizers: dict[str, Tokenizer], rules: str) -> None:
    tokenizer, rng = tokenizers["bpe"], random.Random(rules)
    found = make_constraint(tokenizer, tokenizer.vocab_size, **RULES[rules])
    state, trail = found.begin(), []
    for _ in range(15):
        allowed = state.allowed.tolist()
        if state.ended:
            break
        trail.append(allowed)
        state.take(rng.choice([token for token in allowed if token not in tokenizer.ends]))
    for length in reversed(range(len(trail))):
        state.rewind(length)
        assert state.allowed.tolist() == trail[length]


def test_what_a_tokenizer_lacks_is_named_and_can_be_taken_back() -> None:
    tokenizer = CharTokenizer("abc\n")
    state = make_constraint(tokenizer, 4, regex="ab(é|😀)|ac+").begin()
    a, b, c = (tokenizer.encode(char)[0] for char in "abc")
    state.take(a)
    state.take(b)
    assert not len(state.allowed)
    with pytest.raises(DeadEnd, match="no token fits after 'ab': the rules allow 'é', '😀'; use a"):
        raise state.dead_end()
    state.rewind(1)
    assert state.allowed.tolist() == [b, c]
    state.take(c)
    state.take(c)
    assert state.allowed.tolist() == [c]
    assert state.complete


def test_tokens_that_no_text_holds_are_never_allowed() -> None:
    pieces = [b"a", b"a" * 100_000, b"\xffa", b"a\xff", b"\xff", b"aa", b"a", b""]
    state = Constraint(pieces, (7,), "start: /a*/\n", "regex").begin()
    assert state.allowed.tolist() == [0, 5, 6, 7]
    state.take(6)
    assert state.allowed.tolist() == [0, 5, 6, 7]


# ---- regexes ----


def random_regex(rng: random.Random, depth: int = 0) -> str:
    """A regex over a, b and c."""
    kind = rng.randrange(6 if depth < 3 else 2)
    if kind == 0:
        return rng.choice(["a", "b", "c", "ab", "ca"])
    if kind == 1:
        return rng.choice(
            ["[ab]", "[^a]", ".", r"\w", r"[\w]", "[a-c]", "[^b-z]", r"\x61", "", "[-b]"]
        )
    if kind == 2:
        return "".join(random_regex(rng, depth + 1) for _ in range(rng.randrange(1, 4)))
    group = rng.choice(["(%s)", "(?:%s)"])
    if kind == 3:
        n = rng.randrange(1, 4)
        return group % "|".join(random_regex(rng, depth + 1) for _ in range(n))
    count = rng.choice(["*", "+", "?", "{2}", "{1,}", "{0,2}", "{1,3}", "{0}"])
    return group % random_regex(rng, depth + 1) + count


TEXTS = ["".join(text) for n in range(6) for text in itertools.product("abc", repeat=n)]


@pytest.mark.parametrize("seed", range(150))
def test_a_regex_matches_what_re_matches(seed: int) -> None:
    text = random_regex(random.Random(seed))
    whole = {word for word in TEXTS if re.fullmatch(text, word, re.ASCII)}
    if not any(re.fullmatch(text, chr(i), re.ASCII) for i in range(128)) and whole == {""}:
        with pytest.raises(UsageError, match="only the empty text matches the regex"):
            of_bytes(regex=text)
        return
    state = of_bytes(regex=text).begin()
    found = {word.decode(): complete for word, complete in texts(state, b"abc", 5)}
    assert {word for word, complete in found.items() if complete} == whole, text
    begun = {word[:n] for word in whole for n in range(len(word) + 1)}
    assert begun <= found.keys(), text


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [("a{16}", 16, 16), ("a{17,40}", 17, 40), ("a{3,33}", 3, 33), ("(aa?){16,}", 16, 99),
     ("(a|aa){0,19}", 0, 38), ("a{40,}", 40, 99), ("(a{16}){2}", 32, 32), ("a{0,31}", 0, 31),
     ("(a{0,3}){20}", 0, 60), ("a{0,15}|a{16}", 0, 16), ("(a?b?){2}a{2,18}", 2, 20)],
)  # fmt: skip
def test_many_repetitions(text: str, least: int, most: int) -> None:
    # Given matches: re takes hours for some of these.
    state = of_bytes(regex=text).begin()
    for n in range(100):
        assert state.complete == (least <= n <= most), n
        if ord("a") not in state.allowed:
            assert n == most
            break
        state.take(ord("a"))


@pytest.mark.parametrize(
    "text",
    [r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", ".", r"[^\d\s]", r"[\W_]", r"[à-ÿ]", "[^à-ÿa-z]",
     r"[\u0800-\uFFFF]", "[\\U00010000-\\U0010FFFF]", "[😀-😂é]", r"[\x00-\x7f]", r"\.",
     "[]a]", "[^]]", r"[\]\-\\]", "[a-]", "/", r"\/", "[^\\x00-\\u07FE]"],
)  # fmt: skip
def test_characters_are_those_of_re(text: str) -> None:
    found, theirs = of_bytes(regex=text), re.compile(text, re.ASCII)
    edges = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFF, 0x1000, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    near = {edge + d for edge in edges for d in range(-2, 3)} | set(range(0x180))
    for code in near | {*range(0x1F5F0, 0x1F610), *range(0x180, 0x110000, 0x24F1)}:
        if 0 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
            assert matches(found, chr(code)) == bool(theirs.fullmatch(chr(code))), hex(code)


def test_what_is_no_utf8_never_matches() -> None:
    found = of_bytes(regex=r"[\s\S]")
    for text in (b"\x80", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf8",
                 b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xff"):  # fmt: skip
        assert not reads(found.begin(), text)


def test_anchors_at_the_ends_mean_what_is_so_anyway() -> None:
    found = of_bytes(regex="^a|b$")
    assert [word for word in TEXTS if matches(found, word)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(ab", "the regex is refused: unclosed group; correct or simplify it"),
        ("ab)c", "unopened group"),
        ("x[a-", "unclosed character class"),
        ("[z-a]", "invalid character class range, the start must be <= the end"),
        (r"[^\s\S]", "no text matches the regex"),
        ("*a", "repetition operator missing expression"),
        (r"(a)\1", "backreferences are not supported"),
        ("(?=a)", "look-around, including look-ahead and look-behind, is not supported"),
        (r"a\b", "lookarounds not supported"),
        ("a^b", "lookarounds not supported"),
        (r"\x4", "incomplete escape sequence"),
        (r"\ud83d", "hexadecimal literal is not a Unicode scalar value"),
        ("a\udcff", "character 1 of the regex is the byte 0xFF, which is not UTF-8 (U+DCFF)"),
        ("a{3,2}", "invalid repetition count range"),
        ("a{,2}", "repetition quantifier expects a valid decimal"),
        ("a{" + "9" * 5000 + "}", "decimal literal invalid"),
        ("(" * 5000, "unclosed group"),
        ("(" * 5000 + "a" + ")" * 5000, "nest"),
        ("()", "only the empty text matches the regex"),
        ("", "only the empty text matches the regex"),
    ],
)
def test_a_bad_regex_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        of_bytes(regex=text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


# ---- JSON schemas ----

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "born": {"type": "integer", "minimum": 1900, "maximum": 2030},
        "tags": {"type": "array", "items": {"enum": ["a", "é"]}, "maxItems": 2},
        "more": {"$ref": "#/$defs/more"},
    },
    "required": ["name", "born"],
    "additionalProperties": False,
    "$defs": {"more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
}


def test_a_schema_allows_the_json_that_it_describes() -> None:
    found = of_bytes(json_schema=json.dumps(PERSON))
    good = {"name": "Ada é", "born": 1915, "tags": ["é", "a"], "more": None}
    for layout in ({}, {"indent": 1}, {"separators": (",", ":")}):
        assert matches(found, json.dumps(good, ensure_ascii=False, **layout))  # type: ignore[arg-type]
    assert matches(found, '{"name": "", "born": 2030}')
    for bad in (
        {"name": "Ada"},
        {**good, "born": 1815},
        {**good, "name": "Turing"},
        {**good, "tags": ["b"]},
        {**good, "x": 1},
        {**good, "more": 0},
    ):
        assert not matches(found, json.dumps(bad, ensure_ascii=False)), bad
    assert not matches(found, '{"name": "",  "born": 2030}')  # two spaces: whitespace ends


def test_the_layout_of_a_schema_can_be_chosen() -> None:
    schema = {"type": "array", "items": {"type": "null"}}
    assert matches(of_bytes(json_schema=json.dumps(schema)), "[null, null]")
    compact = json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}})
    assert matches(of_bytes(json_schema=compact), "[null,null]")
    assert not matches(of_bytes(json_schema=compact), "[null, null]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the JSON schema is not JSON: Expecting"),
        ("[]", 'the JSON schema is not an object, such as {"type": "object"}'),
        ("false", "is not an object"),
        ('{"type": "foo"}', "Invalid type: foo"),
        ('{"$ref": "http://x/y"}', "does not fetch"),
        ('{"$ref": "#"}', "no text matches the JSON schema"),
        ('{"not": {}}', 'Unimplemented keys: ["not"]'),
        ('{"type": "string", "format": "foo"}', "Unknown format: foo"),
        ('{"type": "string", "pattern": "(?=a)"}', "look-around"),
        ('{"enum": ["\\ud800"]}', "hex escape"),
        ('{"const": NaN}', "expected value"),
        ('{"type": "object", "x-guidance": 5}', "invalid type: integer `5`"),
        ("[" * 100_000, "the JSON schema is nested too deeply"),
        ('{"items": ' * 400 + "{}" + "}" * 400, "recursion limit"),
    ],
)
def test_a_bad_schema_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        of_bytes(json_schema=text)
    assert message in str(caught.value)


# ---- work ----


def chain(n: int, last: dict[str, Any]) -> str:
    """A schema of n definitions, each of which is the next one."""
    defs: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(n)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": {**defs, f"a{n}": last}})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"regex": "a?" * 20_000}, "too big"),
        ({"regex": "|".join(f"w{i * 7919 % 99991}" for i in range(40_000))}, "131,072"),
        ({"json_schema": json.dumps({"enum": [f"a value {i}" for i in range(7000)]})}, "too big"),
        ({"json_schema": json.dumps({"allOf": [
            {"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(10)]}
            for i in range(8)]})}, "too large"),
        ({"json_schema": '{"multipleOf": 2147483648}'}, "more than 65,536 remainders"),
        ({"json_schema": '{"type": "number", "multipleOf": 9999991e-3}'}, "remainders"),
        ({"json_schema": json.dumps({"allOf": [{"multipleOf": 997}, {"multipleOf": 991.0}]})},
         "remainders"),
        ({"json_schema": json.dumps({"items": [{"a": {"multipleOf": 99999.0}}]})}, "remainders"),
    ],
)  # fmt: skip
def test_a_pattern_that_would_take_long_is_refused(pattern: dict[str, str], message: str) -> None:
    with pytest.raises(GptcError, match=message):
        of_bytes(**pattern)


@pytest.mark.parametrize(
    ("multiple", "number", "other"),
    [("1000000", "3000000", "7"), ("0.01", "1.25", "1.255"), ("30e1", "600", "650"),
     ("2.5", "7.5", "7"), ("997", "1994", "1995")],
)  # fmt: skip
def test_usual_multiples_take_little_work(multiple: str, number: str, other: str) -> None:
    found = of_bytes(json_schema=f'{{"type": "number", "multipleOf": {multiple}}}')
    assert matches(found, number)
    assert not matches(found, other)


def test_large_patterns_that_take_little_work() -> None:
    words = "|".join(f"word{i * 7919 % 99991}" for i in range(2000))
    assert matches(of_bytes(regex=words), "word7919")
    assert matches(of_bytes(regex="a{1,1000000}b"), b"a" * 1000 + b"b")
    assert matches(of_bytes(json_schema=chain(3000, {"type": "null"})), "null")


def test_one_text_alone_fails_when_it_takes_too_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(constraint.LIMITS, "step_max_items", 60)
    found = of_bytes(grammar='root ::= "a" s\ns ::= [a-z] s s | ""')
    state, other = found.begin(), found.begin()
    with pytest.raises(DeadEnd, match="the text can be parsed in too many ways"):  # noqa: PT012
        for _ in range(100):
            assert ord("a") in state.allowed
            state.take(ord("a"))
    assert other.allowed.tolist() == [ord("a")]
    state.rewind(1)
    assert ord("a") in state.allowed


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    constraint._vocabulary.cache_clear()
    for pattern in ({"regex": "ab"}, {"grammar": 'root ::= "z"'}, {"json_schema": "{}"}):
        with pytest.raises(GptcError, match=r"needs a package: .*pip install 'llguidance>="):
            of_bytes(**pattern)


def test_only_a_whole_text_loses_the_space_that_its_tokens_add() -> None:
    made = sentencepiece()
    made.bos = 1
    a, spaced_a = 259, 260
    for prompt, rule, text in [
        ([], None, "aa"),
        ([1], None, "aa"),
        ([a], None, " aa"),
        ([], make_constraint(made, 261, regex=" a+"), " aa"),
    ]:
        request = Request(prompt, Sampling(), TextOptions(max_tokens=2), rule)
        sample = Sample(0, request, made)
        assert sample.append(spaced_a, 9) + sample.append(a, 9) == text == sample.text
