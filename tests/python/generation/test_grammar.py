"""Texts that must match: regexes and grammars against others' reading, tokens by brute force."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import varied
from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.errors import DeadEnd, GptcError, UsageError
from gptc.generation.beam import beam_search
from gptc.generation.decoder import Generation, generate, stream
from gptc.generation.drafts import ModelDraft, NgramDraft
from gptc.generation.grammar import automaton, constraint
from gptc.generation.grammar.automaton import Machine
from gptc.generation.grammar.constraint import Constraint, Place, make_constraint
from gptc.generation.grammar.parser import parse_grammar, parse_regex
from gptc.generation.request import make_request
from gptc.generation.sampling import Sampling, sample_token, token_logprob
from gptc.tokenizer import scored, vocabulary
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.native import BpeTokenizer, CharTokenizer
from gptc.tokenizer.pretrained import SentencePieceTokenizer, TiktokenTokenizer
from gptc.tokenizer.registry import make_tokenizer

Config = Callable[..., GPTConfig]
JSON_GRAMMAR = (Path(__file__).resolve().parents[3] / "docs" / "json.gbnf").read_text()


def after(machine: Machine, text: bytes) -> Any:
    """The place after `text`."""
    stacks = machine.start
    for byte in text:
        stacks = machine.step(stacks, byte)
    return stacks


def matches(machine: Machine, text: str | bytes) -> bool:
    return None in after(machine, text.encode() if isinstance(text, str) else text)


def shortest_end(machine: Machine, stacks: Any, alphabet: bytes, most: int = 8) -> bytes | None:
    """The fewest bytes by which a text becomes complete."""
    level = {b"": stacks}
    for _ in range(most + 1):
        for text, here in level.items():
            if None in here:
                return text
        level = {
            text + bytes([byte]): there
            for text, here in level.items()
            for byte in alphabet
            if (there := machine.step(here, byte))
        }
        level = dict({here: (text, here) for text, here in level.items()}.values())
    return None


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
    count = rng.choice(["*", "+", "?", "{2}", "{1,}", "{,2}", "{1,3}", "{0}"])
    return group % random_regex(rng, depth + 1) + count


TEXTS = ["".join(text) for n in range(6) for text in itertools.product("abc", repeat=n)]


@pytest.mark.parametrize("seed", range(150))
def test_a_regex_matches_what_re_matches(seed: int) -> None:
    text = random_regex(random.Random(seed))
    machine, theirs = parse_regex(text), re.compile(text, re.ASCII)
    whole = {word for word in TEXTS if theirs.fullmatch(word)}
    begun = {word[:n] for word in whole for n in range(len(word) + 1)}
    for word in TEXTS:
        stacks = after(machine, word.encode())
        assert (None in stacks) == (word in whole), (text, word)
        if not stacks:
            assert word not in begun, (text, word)
        elif (end := shortest_end(machine, stacks, b"abc")) is not None:
            assert theirs.fullmatch(word + end.decode()), (text, word, end)
        else:
            assert word not in begun, (text, word)


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [("a{16}", 16, 16), ("a{17,40}", 17, 40), ("a{3,33}", 3, 33), ("(aa?){16,}", 16, 99),
     ("(a|aa){0,19}", 0, 38), ("a{40,}", 40, 99), ("(a{16}){2}", 32, 32), ("a{,31}", 0, 31),
     ("(a{0,3}){20}", 0, 60), ("a{0,15}|a{16}", 0, 16), ("(a?b?){2}a{2,18}", 2, 20)],
)  # fmt: skip
def test_many_repetitions(text: str, least: int, most: int) -> None:
    # What they are said to match: re takes hours for some of them.
    machine = parse_regex(text)
    for n in range(100):
        assert matches(machine, "a" * n) == (least <= n <= most), n


@pytest.mark.parametrize(
    "text",
    [r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", ".", r"[^\d\s]", r"[\W_]", r"[à-ÿ]", "[^à-ÿa-z]",
     r"[\u0800-\uFFFF]", "[\\U00010000-\\U0010FFFF]", "[😀-😂é]", r"[\x00-\x7f]", r"\.", r"\é",
     "[]a]", "[^]]", r"[\]\-\\]", "[a-]", "{", "a{", "x{,y}", "[^\\x00-\\u07FE]"],
)  # fmt: skip
def test_characters_are_those_of_re(text: str) -> None:
    machine, theirs = parse_regex(text), re.compile(text, re.ASCII)
    edges = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFF, 0x1000, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    near = {edge + d for edge in edges for d in range(-2, 3)} | set(range(0x180))
    codes = near | {*range(0x1F5F0, 0x1F610), *range(0x180, 0x110000, 0x4F1)}
    for code in codes:
        if 0 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
            assert matches(machine, chr(code)) == bool(theirs.fullmatch(chr(code))), hex(code)


def test_what_is_no_utf8_never_matches() -> None:
    machine = parse_regex(r"[\s\S]")
    for text in (b"\x80", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf8",
                 b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xff"):  # fmt: skip
        assert not after(machine, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(ab", "character 0 of the regex: this ( has no )"),
        ("ab)c", "character 2 of the regex: this ) has no ("),
        ("x[a-", "character 4 of the regex: it ends where the ] of a class is missing"),
        ("[z-a]", "character 1 of the regex: this range runs backwards"),
        (r"[\d-z]", "a range needs one character at each end"),
        (r"[^\s\S]", "character 0 of the regex: no character is in this class"),
        ("*a", "character 0 of the regex: nothing stands before * to be repeated"),
        ("(|{2})", "nothing stands before { to be repeated"),
        ("a*?", "character 1 of the regex: a second repetition sign: lazy and possessive ones"),
        ("a++", "lazy and possessive ones"),
        ("a{2}{3}", "put the first into a group"),
        (r"(a)\1", r"character 3 of the regex: \1: a regex here cannot refer back to a group"),
        ("(?=a)", "character 0 of the regex: of groups with ? there is (?:…) alone"),
        ("(?P<x>a)", "(?:…) alone"),
        (r"a\b", r"character 1 of the regex: \b is not known here"),
        ("a^b", r"leave out ^, or write \^"),
        ("a$b", r"leave out $, or write \$"),
        (r"\x4", r"\x needs 2 hexadecimal digits"),
        (r"\ud83d", "U+D83D is no character"),
        ("a\udcff", "character 1 of the regex: U+DCFF is half of a character"),
        ("\\", "it ends where the character after a"),
        ("a{3,2}", "{3,2} asks for more than it allows"),
        ("a{1,1000000}", "the regex is more than 100,000 steps"),
        ("(((((a{15}){15}){15}){15}){15})", "the regex is more than 100,000 steps"),
        ("((){9999999}){9999999}", "the regex is more than 100,000 steps"),
        ("a{9999999999999}", "is more than 100,000 steps"),
        ("a{" + "9" * 5000 + "}", "is more than 100,000 steps"),
        ("(" * 5000, "more than 100 groups in each other"),
    ],
)
def test_a_bad_regex_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_regex(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_anchors_at_the_ends_mean_what_is_so_anyway() -> None:
    machine = parse_regex("^a|b$")
    assert [word for word in TEXTS if matches(machine, word)] == ["a", "b"]


# ---- grammars ----


def random_grammar(rng: random.Random) -> dict[str, Any]:
    """Rules over a and b: a text, a name, ("row", ...), ("or", ...) or ("*+?", item)."""
    names = ["root", "one", "two"]

    def item(depth: int) -> Any:
        kind = rng.randrange(7 if depth < 2 else 3)
        if kind < 2:
            return rng.choice(['"a"', '"b"', '"ab"', '""'])
        if kind == 2:
            return rng.choice(names)
        if kind == 3:
            return (rng.choice("*+?"), item(depth + 1))
        parts = tuple(item(depth + 1) for _ in range(rng.randrange(1, 4)))
        return ("or" if kind == 4 else "row", *parts)

    return {name: item(0) for name in names}


def written(item: Any) -> str:
    if isinstance(item, str):
        return item
    if item[0] in "*+?":
        return f"({written(item[1])}){item[0]}"
    return "(" + (" | " if item[0] == "or" else " ").join(map(written, item[1:])) + ")"


def language(rules: dict[str, Any], most: int) -> dict[str, set[str]]:
    """The texts of each rule up to a length: what follows from what, until nothing does."""
    found: dict[str, set[str]] = {name: set() for name in rules}

    def joined(left: set[str], right: set[str]) -> set[str]:
        return {a + b for a in left for b in right if len(a) + len(b) <= most}

    def texts(item: Any) -> set[str]:
        if isinstance(item, str):
            return {item[1:-1]} if item[0] == '"' else found[item]
        parts = [texts(part) for part in item[1:]]
        if item[0] == "or":
            return set().union(*parts)
        if item[0] == "row":
            out = {""}
            for part in parts:
                out = joined(out, part)
            return out
        out = {""} if item[0] in "*?" else set()
        for _ in range(most + 1):
            out = out | joined(out, parts[0]) | parts[0] if item[0] != "?" else out | parts[0]
        return out

    while True:
        before = {name: set(some) for name, some in found.items()}
        for name, item in rules.items():
            found[name] |= texts(item)
        if found == before:
            return found


@pytest.mark.parametrize("seed", range(200))
def test_a_grammar_describes_what_follows_from_it(seed: int) -> None:
    rules = random_grammar(random.Random(seed))
    text = "\n".join(f"{name} ::= {written(item)}" for name, item in rules.items())
    theirs = language(rules, 7)
    machine, refused = None, ""
    try:
        machine = parse_grammar(text)
    except UsageError as error:
        refused = str(error)
    if machine is None:
        named = re.search("no text of (.*) ever ends", refused)
        assert not theirs[named[1]] if named else "begins with itself" in refused, text
        return
    begun = {word[:n] for word in theirs["root"] for n in range(len(word) + 1)}
    for n in range(6):
        for letters in itertools.product("ab", repeat=n):
            word = "".join(letters)
            stacks = after(machine, word.encode())
            assert (None in stacks) == (word in theirs["root"]), (text, word)
            end = shortest_end(machine, stacks, b"ab") if stacks else None
            if end is None:
                assert word not in begun, (text, word)
            elif len(word) + len(end) <= 7:
                assert word + end.decode() in theirs["root"], (text, word)


def test_the_notation() -> None:
    machine = parse_grammar(
        """# a comment
root  ::= (first |
           second) "!"?   # another
        | ( "x"
            "y" ){ 2 , 3 }
first ::= [a-c\\x2d] [^a-z\\]]{2} . "é\\u00e9\\U0001F600\\"\\n"
second-1 ::= ""\r
second::=   | second-1
"""
    )
    for word in ('aAB\néé😀"\n', '-AB\u1234éé😀"\n!', "", "!", "xyxy", "xyxyxy"):
        assert matches(machine, word), word
    for word in ('dAB\néé😀"\n', 'a]B\néé😀"\n', "xy", "xyxyxyxy", "xyxy!"):
        assert not matches(machine, word), word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1:1 of the grammar: no rule is called root"),
        ('start ::= "a"', "no rule is called root"),
        ('root ::= "a" other', "1:14 of the grammar: no rule is called other"),
        ('root ::= "a"\nroot ::= "b"', "2:1 of the grammar: root has been defined before"),
        ('root = "a"', "1:6 of the grammar: after the name root, ::= is expected"),
        ('root ::= "a', '1:12 of the grammar: it ends where the " that closes a text is missing'),
        ('root ::= "a" )', "1:14 of the grammar: this ) has no ("),
        ('root ::= (\n("a")\n', "1:10 of the grammar: this ( has no )"),
        ('root ::=\n  "a" !', "2:7 of the grammar: '!' begins nothing: a name,"),
        ("root ::= []", "1:10 of the grammar: no character is in this class"),
        ('root ::= "\\q"', r"1:11 of the grammar: \q is not known"),
        ('root ::= "a"{,3}', "1:13 of the grammar: {m}, {m,} or {m,n} with numbers is expected"),
        ('root ::= * "a"', "1:10 of the grammar: nothing stands before * to be repeated"),
        ('root ::= "a"{1,1000000}', "the grammar is more than 100,000 steps"),
        ('root ::= "a" root', "1:1 of the grammar: no text of root ever ends"),
        ('root ::= "a" | x\nx ::= "(" x ")"', "2:1 of the grammar: no text of x ever ends"),
        ('root ::= root "a" | "b"', "root begins with itself (root → root)"),
        (
            'root ::= "x" a\na ::= b "y" | "z"\nb ::= "w"? c\nc ::= a b',
            "2:1 of the grammar: a begins with itself (a → b → c → a)",
        ),
        ('root ::= (root? "a"){20}', "root begins with itself"),
        ('root ::= e root | "a"\ne ::= "x"*', "root begins with itself"),
    ],
)  # fmt: skip
def test_a_bad_grammar_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_grammar(text)
    assert message in str(caught.value)


def test_thousands_of_rules() -> None:
    rules = [f'r{i} ::= "{i % 10}" r{i + 1}' for i in range(5000)]
    machine = parse_grammar("root ::= r0\n" + "\n".join(rules) + '\nr5000 ::= "."')
    assert matches(machine, "0123456789" * 500 + ".")
    rules[-1] = 'r4999 ::= r0 | "x"'
    assert parse_grammar("root ::= r0\n" + "\n".join(rules) + '\nr5000 ::= "."')
    rules = [f"r{i} ::= r{i + 1}" for i in range(5000)]
    with pytest.raises(UsageError, match="r0 begins with itself"):
        parse_grammar("root ::= r0\n" + "\n".join(rules) + '\nr5000 ::= r0 | "."')


def test_depth_costs_nothing_but_memory() -> None:
    machine = parse_grammar('root ::= "(" root ")" | "x"')
    stacks = after(machine, b"(" * 100_000)
    assert len(stacks) == 2
    for byte in b"x" + b")" * 100_000:
        stacks = machine.step(stacks, byte)
    assert stacks == {None}
    right = parse_grammar('root ::= "a" root | "b"')
    assert after(right, b"a" * 1000) == after(right, b"a")


def test_too_many_ways_are_refused() -> None:
    rules = [f'r{i} ::= r{i + 1} "x" | r{i + 1} "y"' for i in range(20)]
    with pytest.raises(DeadEnd, match="read in more than 10,000 ways"):
        parse_grammar("root ::= r0\n" + "\n".join(rules) + '\nr20 ::= "a"')


def random_json(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 4 else 5)
    if kind < 3:
        return rng.choice([None, True, False, 0, -17, 2.5, 1e-7, 123456, -0.25, 6e22])
    if kind < 5:
        return "".join(rng.choice('ab"\\\n\té😀/\x1f ') for _ in range(rng.randrange(6)))
    items = [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return (
        items
        if kind == 5
        else {random.Random(i).choice("xyzé") + str(i): v for i, v in enumerate(items)}
    )


def test_the_grammar_of_json() -> None:
    machine, rng = parse_grammar(JSON_GRAMMAR), random.Random(1)
    for _ in range(100):
        value = [random_json(rng)]
        for layout in ({}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}):
            text = json.dumps(value, **layout)  # type: ignore[arg-type]
            assert matches(machine, text), text
            broken = list(text)
            broken[rng.randrange(len(text))] = rng.choice('"]},:x1')
            if matches(machine, "".join(broken)):
                json.loads("".join(broken))


# ---- which tokens are allowed ----


@pytest.fixture(scope="module")
def tokenizers(text_file: Path) -> dict[str, Tokenizer]:
    """Of every sort that needs no download, and of GPT-2 where its vocabulary is kept."""
    special = {"<|endoftext|>": 300, "<|other|>": 303}
    ranked = [bytes([i]) for i in range(256)] + [b"ab", b"\xc3\xa9", b"\xa9a", b'{"', b'": ', b'"}']
    found: dict[str, Tokenizer] = {
        "bytes": make_tokenizer("bytes"),
        "char": CharTokenizer('abc {}[]":,0123456789.-eé😀\n'),
        "bpe": BpeTokenizer.train(text_file.read_text() + 'é😀 {"a": [1, 2]}' * 50, 400),
        "tiktoken": TiktokenTokenizer("own", "[ -~]+", ranked, special),
    }
    found["tiktoken"].bos = 303
    return found


def by_force(place: Place) -> list[int]:
    """The tokens after which a text can still become complete, one by one."""
    machine, found = place.constraint.machine, []
    for token, piece in enumerate(place.constraint.pieces):
        stacks = place.stacks
        for byte in piece:
            stacks = machine.step(stacks, byte) if stacks else stacks
        if piece and stacks:
            found.append(token)
    return found


RULES = {
    "words": {"regex": "([abc]+ ){2,40}(é|😀)?"},
    "unicode": {"regex": "[^a-z]{1,20}"},
    "all": {"regex": r"[\s\S]*"},
    "json": {"grammar": JSON_GRAMMAR},
    "nested": {"grammar": 'root ::= "[" (root | [a-cé] root?)* "]" " "*'},
    "list": {"grammar": 'root ::= "a" ("b" | "c "){0,30} | "ab" | "abc" ".."'},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["bytes", "char", "bpe", "tiktoken"])
def test_allowed_tokens_are_those_that_fit(
    tokenizers: dict[str, Tokenizer], name: str, rules: str
) -> None:
    tokenizer, rng = tokenizers[name], random.Random(f"{name} {rules}")
    found = make_constraint(tokenizer, tokenizer.vocab_size, **RULES[rules])  # type: ignore[arg-type]
    assert found
    ends = sorted(token for token in {tokenizer.end_of_text, tokenizer.bos} if token is not None)
    n_seen = 0
    for _ in range(8):
        place = found.start
        for _ in range(30):
            fits, complete = by_force(place), None in place.stacks
            assert place.allowed.tolist() == sorted(fits + (ends if complete else []))
            assert place.ended == (complete and not fits)
            n_seen += 1
            if not fits:
                break
            place = place.after(rng.choice(fits))
    assert n_seen > 20


def test_allowed_tokens_of_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        gpt2 = make_tokenizer("gpt2")
    except GptcError:
        pytest.skip("GPT-2's vocabulary is not here")
    found = make_constraint(gpt2, gpt2.vocab_size, grammar=JSON_GRAMMAR)
    assert found
    text = '{"name": ["é😀", {"a": [1, 2.5e3, null]}'
    place = found.start
    for i, token in enumerate(gpt2.encode(text).tolist()):
        if i % 4 == 0:
            assert place.allowed.tolist() == by_force(place)
        place = place.after(token)
    assert gpt2.end_of_text not in place.allowed
    for token in gpt2.encode("]}").tolist():
        place = place.after(token)
    assert place.ended
    assert place.allowed.tolist() == [gpt2.end_of_text]


def test_special_tokens_are_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["tiktoken"]
    assert tokenizer.specials == {300, 303}
    found = make_constraint(tokenizer, tokenizer.vocab_size, regex=r"<\|endoftext\|>(ab)?")
    assert found
    assert found.start.allowed.tolist() == [ord("<")]
    place = found.start
    for byte in b"<|endoftext|>":
        assert not {300, 303} & set(place.allowed.tolist())
        place = place.after(byte)
    assert place.allowed.tolist() == [ord("a"), 256, 300, 303]
    pytest.importorskip("sentencepiece")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "a", "\u2581a"]
    kinds = [scored.UNKNOWN, *[scored.CONTROL] * 2, *[scored.BYTE] * 256]
    kinds += [scored.NORMAL] * 2
    scores = [-float(i) for i in range(len(kinds))]
    made = vocabulary.from_scored(scored.Scored(pieces, scores, kinds), "a test")
    assert isinstance(made, SentencePieceTokenizer)
    assert made.specials == {0, 1, 2}
    found = make_constraint(made, made.vocab_size, regex="(<s>)?( ?a)+")
    assert found
    assert found.start.allowed.tolist() == [3 + 0x20, 3 + ord("<"), 3 + ord("a"), 259, 260]
    assert found.start.after(260).allowed.tolist() == [2, 3 + 0x20, 3 + ord("a"), 259, 260]


def test_what_is_kept_is_bounded(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["bpe"]
    machine, pieces = parse_grammar(JSON_GRAMMAR), list(tokenizer.pieces)
    texts: list[list[tuple[int, list[int]]]] = []
    held = []
    for limits in ({}, {"MOST_BYTES": 20_000, "_MOST_STATES": 30}):
        for name, limit in limits.items():
            monkeypatch.setattr(constraint, name, limit)
        found, rng, most = Constraint(machine, pieces, []), random.Random(3), 0
        place, drawn = found.start, []
        for _ in range(300):
            token = rng.choice(place.allowed.tolist())
            drawn.append((token, place.allowed.tolist()))
            place = place.after(token)
            place = found.start if place.ended else place
            most = max(most, found._held)
        texts.append(drawn)
        held.append(most)
    assert texts[0] == texts[1]
    assert held[1] < 25_000 < held[0]


def test_equal_stacks_are_one_object_and_go_with_the_last_text() -> None:
    machine = parse_grammar('root ::= "(" root ")" | "x"')
    before = len(machine._stacks)
    one, two = after(machine, b"((("), after(machine, b"(((")
    assert one == two
    assert len(machine._stacks) > before
    del one, two
    assert len(machine._stacks) == before


# ---- drawing ----


def test_a_draw_among_some_is_as_if_the_others_were_banned() -> None:
    rng = np.random.default_rng(5)
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.6},
        {"min_p": 0.2}, {"typical_p": 0.5},
        {"repetition_penalty": 1.8, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"bias": ((3, 2.0), (17, -1.0), (5, float("-inf"))), "penalty_last_n": 0},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "temperature": 1e30},
    ]  # fmt: skip
    for trial in range(300):
        options = {"temperature": 1.0, **kinds[trial % len(kinds)]}
        logits = rng.normal(0, 2, 40).astype(np.float32)
        allowed = np.flatnonzero(rng.random(36) < 0.3)
        allowed = np.union1d(allowed, [2])
        history = rng.integers(0, 40, 20).tolist()
        own = Sampling(seed=trial, **options)
        bans = [(i, float("-inf")) for i in range(36) if i not in allowed]
        banned = Sampling(seed=trial, **{**options, "bias": (*own.bias, *bans)})
        mine = sample_token(logits, own, trial, 36, history, allowed)
        assert mine == sample_token(logits, banned, trial, 36, history)
        assert mine in allowed


def test_draws_follow_the_probabilities_of_what_is_allowed() -> None:
    logits = np.array([0.3, 2.0, -1.0, 1.0, 0.5, 3.0, -0.5], np.float32)
    allowed = np.array([0, 2, 3, 4, 6])
    n, expected = 20_000, np.exp(logits[allowed].astype(np.float64))
    expected *= n / expected.sum()
    draws = [sample_token(logits, Sampling(1.0, seed=s), 9, 7, (), allowed) for s in range(n)]
    counts = np.bincount(draws, minlength=7)
    assert counts[[1, 5]].sum() == 0
    chi_squared = ((counts[allowed] - expected) ** 2 / expected).sum()
    assert chi_squared < 23.5  # 4 degrees of freedom: one in 10,000 is above


# ---- texts ----


CLOSE = tuple((ord(char), 3.0) for char in '"]},:0')  # so that lists and strings end


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_texts_are_json(writer: Model, tokenizer: Tokenizer, temperature: float) -> None:
    generation = Generation(
        writer, tokenizer, "A value: ", grammar=JSON_GRAMMAR, num_samples=12, max_tokens=400,
        context_shift=True, stop=(), sampling=Sampling(temperature, bias=CLOSE, typical_p=0.95),
    )  # fmt: skip
    for _ in generation:
        pass
    machine, n_ended = parse_grammar(JSON_GRAMMAR), 0
    for sample in generation.samples:
        assert after(machine, tokenizer.decode_bytes(sample.tokens))
        if sample.finish == "stop":
            json.loads(sample.text)
            n_ended += 1
        else:
            assert (sample.finish, sample.n_tokens) == ("length", 400)
    assert n_ended >= (0 if temperature == 0 else 4)


@pytest.mark.parametrize("seed", range(5))
def test_characters_come_whole_from_bytes(writer: Model, tokenizer: Tokenizer, seed: int) -> None:
    regex = "[à-ÿ]{2}[一-龥]😀?[^\\x00-\\uFFFF]"
    (text,) = generate(writer, tokenizer, "x", regex=regex, seed=seed, temperature=1.0)
    assert re.fullmatch(regex, text)
    assert "".join(stream(writer, tokenizer, "x", regex=regex, seed=seed, temperature=1.0)) == text


def test_the_most_likely_of_what_is_allowed(writer: Model, tokenizer: Tokenizer) -> None:
    generation = Generation(
        writer, tokenizer, "ab", regex="[k-p]{6}", sampling=Sampling(0), logprobs=3
    )
    for _ in generation:
        pass
    (sample,) = generation.samples
    assert sample.finish == "stop"
    for i, token in enumerate(sample.tokens):
        logits = writer.logits(np.array([sample.sequence[: 2 + i]]))[0, -1]
        assert token == ord("k") + int(logits[ord("k") : ord("p") + 1].argmax())
        # Log-probabilities are the model's own.
        own = token_logprob(logits, token, 3, 256)
        assert sample.logprobs[i].logprob == pytest.approx(own.logprob, abs=1e-3)
        assert [t for t, _ in sample.logprobs[i].top] == [t for t, _ in own.top]


def test_what_allows_all_changes_nothing(config: Config) -> None:
    tokenizer = CharTokenizer("".join(map(chr, range(64, 104))) + "é😀")
    with varied(config(vocab_size=48)) as model:
        options: dict[str, Any] = {"max_tokens": 40, "num_samples": 3, "frequency_penalty": 0.3}
        free = generate(model, tokenizer, "A", **options)
        assert generate(model, tokenizer, "A", regex=r"[\s\S]*", **options) == free
        assert generate(model, tokenizer, "A", grammar="root ::= .+", **options) == free


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_writes_the_same(
    writer: Model, config: Config, tokenizer: Tokenizer, temperature: float
) -> None:
    options: dict[str, Any] = {
        "regex": r"(ab|ba|é|\d+ ){3,25}!", "temperature": temperature, "seed": 4, "num_samples": 2,
        "max_tokens": 120, "context_shift": True, "frequency_penalty": 0.1,
    }  # fmt: skip
    alone = generate(writer, tokenizer, "ab ab ab", **options)
    same = ModelDraft(writer, tokenizer, n_seq=2)
    with varied(config(n_layer=1), seed=9) as small:
        drafts: list[Any] = [same, ModelDraft(small, tokenizer, n_seq=2), NgramDraft()]
        for draft in drafts:
            assert generate(writer, tokenizer, "ab ab ab", draft=draft, **options) == alone
    assert same.n_right == same.n_guessed > 20


def test_samples_do_not_depend_on_each_other(writer: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"regex": "([a-f]|[0-9]{3}){1,40}[.]", "temperature": 1.2}
    together = generate(writer, tokenizer, "x", num_samples=5, seed=7, **options)
    apart = [generate(writer, tokenizer, "x", seed=7 + i, **options)[0] for i in range(5)]
    assert together == apart
    assert len(set(together)) == 5


def test_a_text_may_end_where_it_is_complete(writer: Model, tokenizer: Tokenizer) -> None:
    tokenizer.end_of_text = 0
    ends = ((0, 2.0),)
    lengths = set()
    for seed in range(10):
        generation = Generation(
            writer, tokenizer, "x", regex="(abc)+\\x00?", sampling=Sampling(seed=seed, bias=ends)
        )
        for _ in generation:
            pass
        (sample,) = generation.samples
        assert re.fullmatch("(abc)+", sample.text)
        assert sample.finish == "stop"
        lengths.add(len(sample.text))
    assert len(lengths) > 1


def test_a_stop_string_ends_it_before_it_is_complete(writer: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"regex": "[a-c]{5}--[a-c]{5}", "temperature": 1.0}
    (text,) = generate(writer, tokenizer, "x", stop=("--",), **options)
    assert re.fullmatch("[a-c]{5}", text)
    assert generate(writer, tokenizer, "x", **options)[0].startswith(f"{text}--")


def test_where_no_token_goes_on(config: Config) -> None:
    tokenizer = CharTokenizer("abc\n")
    with varied(config(vocab_size=4)) as model:
        with pytest.raises(GptcError, match=r"after 'ab': what may follow is 'é', '한'; use ano"):
            generate(model, tokenizer, "a", regex="ab(é|한)")
        with pytest.raises(
            GptcError, match="no token begins the text: what may follow is 'x', 'y'"
        ):
            generate(model, tokenizer, "a", regex="[xyz]*")
        with pytest.raises(GptcError, match="'d', 'e', 'f', 'g', 'h', 'i', 'j', 'k', …"):
            generate(model, tokenizer, "a", regex="[d-z]")
        assert generate(model, tokenizer, "a", regex="a[d-z]*") == ["a"]  # complete, at least
        with pytest.raises(UsageError, match="no text but the empty one matches the regex"):
            generate(model, tokenizer, "a", regex="(|){3}")
        with pytest.raises(GptcError, match="leave no token to draw"):
            generate(model, tokenizer, "a", regex="a", bias=((1, float("-inf")),))


def test_a_byte_that_is_missing_is_named() -> None:
    machine = parse_regex("é")
    assert machine.coming(after(machine, b"\xc3")) == ["byte 0xA9"]


def test_too_many_ways_fail_one_text_alone(
    writer: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(writer, tokenizer, "x", regex="a(b?){60}c", max_tokens=9)
    monkeypatch.setattr(automaton, "MOST_STACKS", 20)
    from gptc.generation.decoder import Decoder

    other = make_request(writer, tokenizer, "x", max_tokens=9, stop=())
    samples = [*request.samples(tokenizer), *other.samples(tokenizer)]
    for _ in Decoder(writer, tokenizer, 2).run(samples):
        pass
    assert samples[0].finish == "error"
    assert "more than 20 ways" in str(samples[0].error)
    assert (samples[1].finish, samples[1].n_tokens) == ("length", 9)


def test_what_excludes_each_other(writer: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        generate(writer, tokenizer, "a", regex="a", grammar='root ::= "a"')
    request = make_request(writer, tokenizer, "a", regex="[a-z]+")
    with pytest.raises(UsageError, match="beams know no regex or grammar: leave out --beams"):
        beam_search(writer, tokenizer, request, 2)


# ---- the command ----


@pytest.fixture
def infer(gptc: Callable[..., Any], saved: Path) -> Callable[..., Any]:
    return lambda *arguments: gptc("infer", "-m", saved, "--dtype", "fp32", "--seed", 4, *arguments)


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
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    ran = infer("--prompts", file, "--regex", "[0-9]{6}")
    assert ran.code == 1
    assert "4 of 8 prompts failed" in ran.err
    answers = [json.loads(line) for line in ran.out.splitlines()]
    texts = [[s["text"] for s in answer.get("samples", [])] for answer in answers]
    assert re.fullmatch("[0-9]{6}", texts[0][0])
    assert all(re.fullmatch("[xy]{4}", text) for text in texts[1])
    assert re.fullmatch(r"\(*é\)*", texts[2][0])
    assert re.fullmatch("[0-9]{3}", texts[7][0])
    errors = [answer.get("error") for answer in answers]
    assert errors[:3] == [None] * 3
    assert "this ( has no )" in errors[3]
    assert "1:10 of the grammar: no rule is called x" in errors[4]
    assert "a regex and a grammar exclude each other" in errors[5]
    assert "regex is 5; it must be a text" in errors[6]


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
    assert "no token goes on after 'ab': what may follow is 'é'" in first["error"]
    assert second["samples"][0]["tokens"] == 9
    ran = gptc("infer", "-m", tmp_path / "m", "-p", "a", "--regex", "abé")
    assert ran.code == 1
    assert ran.err.startswith("gptc: error: no token goes on after 'ab'")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--regex", "(a"], 2, "character 0 of the regex: this ( has no )"),
        (["--regex", "a", "--grammar", "g"], 2, "--regex and --grammar exclude each other"),
        (["--regex", "a", "--beams", "2"], 2, "--beams and --regex exclude each other"),
        (["--grammar", "nowhere"], 1, "cannot read the grammar nowhere: No such file"),
        (["--grammar", "{bad}"], 2, "2:7 of the grammar: no rule is called b"),
        (["--grammar", "{bytes}"], 1, "is no UTF-8"),
        (["--regex", "()"], 2, "no text but the empty one matches the regex"),
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
