"""Regexes match like Python's re, and grammars match the texts that their rules derive."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest

from gptc.errors import UsageError
from gptc.generation.grammar.parser import parse_grammar, parse_regex
from machines import JSON_GRAMMAR, after, matches, shortest_end

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
    # Given matches: re takes hours for some of these.
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
        ("x[a-", "character 4 of the regex: the ] of a class is missing at the end"),
        ("[z-a]", "character 1 of the regex: this range is reversed"),
        (r"[\d-z]", "a range needs one character at each end"),
        (r"[^\s\S]", "character 0 of the regex: this class is empty"),
        ("*a", "character 0 of the regex: * has nothing before it to repeat"),
        ("(|{2})", "{ has nothing before it to repeat"),
        ("a*?", "character 1 of the regex: a second repetition sign: leave it out"),
        ("a++", "lazy and possessive signs"),
        ("a{2}{3}", "put the first into a group"),
        (r"(a)\1", r"character 3 of the regex: \1: back references to groups are unsupported"),
        ("(?=a)", "character 0 of the regex: groups with ? are unsupported"),
        ("(?P<x>a)", "except (?:…)"),
        (r"a\b", r"character 1 of the regex: unknown escape \b"),
        ("a^b", r"leave out ^, or write \^"),
        ("a$b", r"leave out $, or write \$"),
        (r"\x4", r"\x needs 2 hexadecimal digits"),
        (r"\ud83d", "U+D83D is not a character"),
        ("a\udcff", "character 1 of the regex: U+DCFF is half of a surrogate pair"),
        ("\\", "the character after a \\ is missing at the end"),
        ("a{3,2}", "{3,2} has its minimum above its maximum"),
        ("a{1,1000000}", "the regex is more than 100,000 steps"),
        ("(((((a{15}){15}){15}){15}){15})", "the regex is more than 100,000 steps"),
        ("((){9999999}){9999999}", "the regex is more than 100,000 steps"),
        ("a{9999999999999}", "is more than 100,000 steps"),
        ("a{" + "9" * 5000 + "}", "is more than 100,000 steps"),
        ("(" * 5000, "groups are nested more than 100 deep"),
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
    """The texts of each rule up to a length, derived until a fixed point."""
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
        named = re.search("no finite text matches (.*): add", refused)
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
        ('root ::= "a"\nroot ::= "b"', "2:1 of the grammar: root is already defined"),
        ('root = "a"', "1:6 of the grammar: after the name root, ::= is expected"),
        ('root ::= "a', '1:12 of the grammar: the " that closes a text is missing at the end'),
        ('root ::= "a" )', "1:14 of the grammar: this ) has no ("),
        ('root ::= (\n("a")\n', "1:10 of the grammar: this ( has no )"),
        ('root ::=\n  "a" !', "2:7 of the grammar: unexpected '!': a name,"),
        ("root ::= []", "1:10 of the grammar: this class is empty"),
        ('root ::= "\\q"', r"1:11 of the grammar: unknown escape \q"),
        ('root ::= "a"{,3}', "1:13 of the grammar: {m}, {m,} or {m,n} with numbers is expected"),
        ('root ::= * "a"', "1:10 of the grammar: * has nothing before it to repeat"),
        ('root ::= "a"{1,1000000}', "the grammar is more than 100,000 steps"),
        ('root ::= "a" root', "1:1 of the grammar: no finite text matches root"),
        ('root ::= "a" | x\nx ::= "(" x ")"', "2:1 of the grammar: no finite text matches x"),
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
