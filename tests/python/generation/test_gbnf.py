"""A grammar matches the texts that its rules derive, and a mistake in one is named with its place.

The classes: a text that the rules do not derive; a text of a grammar without recursion that is
missing; a grammar that hangs or crashes.
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from gptc.errors import DeadEnd, UsageError
from gptc.generation import gbnf
from patterns import JSON_GRAMMAR, matches, of_bytes, texts


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


def names_in(item: Any) -> set[str]:
    if isinstance(item, str):
        return set() if item[0] == '"' else {item}
    return set().union(*map(names_in, item[1:]))


def is_recursive(rules: dict[str, Any]) -> bool:
    """Whether the rule `root` reaches a rule that reaches itself."""
    reached: dict[str, set[str]] = {name: names_in(item) for name, item in rules.items()}
    for _ in rules:
        reached = {
            name: some.union(*(reached[other] for other in some)) for name, some in reached.items()
        }
    return any(name in reached[name] for name in reached["root"] | {"root"})


def written(item: Any) -> str:
    if isinstance(item, str):
        return item
    if item[0] in "*+?":
        return f"({written(item[1])}){item[0]}"
    return "(" + (" | " if item[0] == "or" else " ").join(map(written, item[1:])) + ")"


def language(rules: dict[str, Any], most: int) -> set[str]:
    """The texts of `root` up to a length, derived until a fixed point."""
    found: dict[str, set[str]] = {name: set() for name in rules}

    def joined(left: set[str], right: set[str]) -> set[str]:
        return {a + b for a in left for b in right if len(a) + len(b) <= most}

    def derived(item: Any) -> set[str]:
        if isinstance(item, str):
            return {item[1:-1]} if item[0] == '"' else found[item]
        parts = [derived(part) for part in item[1:]]
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
            found[name] |= derived(item)
        if found == before:
            return found["root"]


@pytest.mark.parametrize("seed", range(200))
def test_a_grammar_describes_what_follows_from_it(seed: int) -> None:
    rules = random_grammar(random.Random(seed))
    text = "\n".join(f"{name} ::= {written(item)}" for name, item in rules.items())
    theirs = {word.encode() for word in language(rules, 7)}
    try:
        state = of_bytes(grammar=text).begin()
    except UsageError as error:
        refused = str(error)
        assert "only the empty text" in refused or "no text matches" in refused, text
        assert not theirs - {b""}, text
        return
    found = {word for word, complete in texts(state, b"ab", 7) if complete}
    assert found <= theirs, text
    if not is_recursive(rules):
        assert found == theirs, text


def test_the_notation() -> None:
    found = of_bytes(
        grammar="""# a comment
root  ::= (first |
           second) "!"?   # another ::=
        | ( "x"
            "y" ){ 2 , 3 }
First ::= "no"
first ::= [a-c\\x2d] [^a-z\\]]{2} . "é\\u00e9\\U0001F600\\"\\n"
second-1 ::= ""\r
second::=   | second-1
start ::= [^] 'never used'
""".replace(" 'never used'", "")
    )
    for word in ('aAB\néé😀"\n', '-AB\u1234éé😀"\n!', "!", "xyxy", "xyxyxy"):
        assert matches(found, word), word
    assert found.begin().complete
    for word in ('dAB\néé😀"\n', 'a]B\néé😀"\n', "xy", "xyxyxyxy", "xyxy!", "no"):
        assert not matches(found, word), word


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('root ::= "a/b" [/] "$.*" [.*^-]', ["a/b/$.*^", "a/b/$.*-"]),
        ('root ::= "\x01\x7f\u2028" "\\t" "\t"', ["\x01\x7f\u2028\t\t"]),
        ('root ::= Foo foo start\nFoo ::= "a"\nfoo ::= "b"\nstart ::= "c"', ["abc"]),
        ('root ::= a-b a_b\na-b ::= "1"\na_b ::= 2\n2 ::= "2"', ["12"]),
        ('root ::= root "+" [0-9] | [0-9]', ["1", "1+2+3"]),
        ('root ::= "ab" "c" | "a" "bcd"', ["abc", "abcd"]),
        ("root ::= [a-z]+ last\nlast ::= [a-z]", ["ab", "abc"]),
        ('root ::= [a-z]* "x" ("(" root ")")?', ["fx", "xx(ax)"]),
        ("root ::= [&~[|-]", ["&", "~", "[", "|", "-"]),
    ],
)
def test_texts_of_a_grammar(text: str, words: list[str]) -> None:
    found = of_bytes(grammar=text)
    for word in words:
        assert matches(found, word), word
        assert not matches(found, word + "?"), word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1:1 of the grammar: no rule is called root"),
        ('start ::= "a"', "no rule is called root"),
        ('root ::= "a" other', "1:14 of the grammar: no rule is called other"),
        ('root ::= "a"\nroot ::= "b"', "2:1 of the grammar: root is already defined"),
        ('root = "a"', "1:6 of the grammar: after the name root, ::= is expected"),
        ('root ::= "a', '1:10 of the grammar: the " that closes a text is missing'),
        ("root ::= [a", "1:10 of the grammar: the ] of a class is missing"),
        ('root ::= "a" )', "1:14 of the grammar: this ) has no ("),
        ('root ::= (\n("a")\n', "1:10 of the grammar: this ( has no )"),
        ('root ::= ("a"\nx ::= "b"', "1:10 of the grammar: this ( has no )"),
        ('root ::=\n  "a" !', "2:7 of the grammar: unexpected '!': a name,"),
        ('root ::= "a"\n "b"', "2:2 of the grammar: unexpected '\"b\"': a name and ::= are"),
        ("root ::= []", "1:10 of the grammar: this class is empty"),
        ("root ::= [z-a]", "1:10 of the grammar: this range is reversed: swap its ends"),
        ('root ::= "\\q"', r"1:11 of the grammar: unknown escape \q"),
        ('root ::= "\\u12"', r"1:11 of the grammar: \u needs 4 hexadecimal digits"),
        ('root ::= "\\uD800"', "1:11 of the grammar: U+D800 is not a character"),
        ('root ::= "a"{,3}', "1:13 of the grammar: {m}, {m,} or {m,n} with numbers of"),
        ('root ::= "a"{3,2}', "1:13 of the grammar: {3,2} has its minimum above its maximum"),
        ('root ::= "a"*?', "1:14 of the grammar: a second repetition sign"),
        ('root ::= * "a"', "1:10 of the grammar: * has nothing before it to repeat"),
        ("root ::= root root", "no text matches the grammar"),
        ('root ::= "a"{' + "9" * 5000 + "}", "1:13 of the grammar: {m}, {m,} or {m,n} with"),
        ('root ::= "a"{1,' + "9" * 5000 + "}", "1:13 of the grammar: {m}, {m,} or {m,n} with"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "the grammar is refused"),
        ("root ::= " + '"a"? ' * 20_000, "too big"),
        ("root ::= " + '("a" root)? ' * 9000, "too big"),
    ],
)
def test_a_bad_grammar_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        of_bytes(grammar=text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


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
    found, rng = of_bytes(grammar=JSON_GRAMMAR), random.Random(1)
    for _ in range(40):
        value = [random_json(rng)]
        for layout in ({}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}):
            text = json.dumps(value, **layout)  # type: ignore[arg-type]
            assert matches(found, text), text
            broken = list(text)
            broken[rng.randrange(len(text))] = rng.choice('"]},:x1')
            if matches(found, "".join(broken)):
                json.loads("".join(broken))


# ---- work ----


@pytest.mark.parametrize("layout", ["\n", "\n#", "#", " ", "\n # | x"])
def test_layout_is_read_once(layout: str) -> None:
    """A search for the next | once took a time that doubled with each #."""
    filler = layout * (60_000 // len(layout))
    assert matches(of_bytes(grammar=f'root ::= "a"\n{filler}\n| "b"\n{filler}'), "b")


def test_long_chains_of_rules_and_deep_texts() -> None:
    rules = [f'r{i} ::= "{i % 10}" r{i + 1}' for i in range(300)]
    found = of_bytes(grammar="root ::= r0\n" + "\n".join(rules) + '\nr300 ::= "." | "x" root')
    assert matches(found, "0123456789" * 30 + "x" + "0123456789" * 30 + ".")
    for last in ('"a"', '"a" | "(" root ")"'):  # one lexeme, or rules
        rules = [f"r{i} ::= " + "(" * 20 + f"r{i + 1}" + ")" * 20 for i in range(1000)]
        deep = of_bytes(grammar="root ::= r0\n" + "\n".join(rules) + f"\nr1000 ::= {last}")
        assert matches(deep, "a")
    # Lexemes of many levels took the library minutes.
    rules = [f'r{i} ::= {"(" * 9}r{i + 1} "{i}"?{")" * 9}' for i in range(500)]
    chain = "root ::= r0\n" + "\n".join(rules) + '\nr500 ::= "a"'
    assert sum(line.startswith("R") for line in gbnf.lark(chain).splitlines()) == 50
    assert matches(of_bytes(grammar=chain), "a4993")
    nested = of_bytes(grammar='root ::= "(" root ")" | "x"')
    assert matches(nested, "(" * 500 + "x" + ")" * 500)


@pytest.mark.parametrize(
    "text",
    [
        'root ::= s\ns ::= [a-z ] s s | ""',
        'root ::= s\ns ::= "a" s s | ""',
        'root ::= s*\ns ::= (s | "a"?)* "b"?',
        "root ::= r0\n" + "\n".join(f'r{i} ::= r{i + 1} "x" | r{i + 1} "y"' for i in range(20))
        + '\nr20 ::= "a" root?',
    ],
)  # fmt: skip
def test_an_ambiguous_grammar_ends_with_a_text_or_a_reason(text: str) -> None:
    """Two lines of 30 bytes once hung for hours."""
    state, rng = of_bytes(grammar=text).begin(), random.Random(1)
    try:
        for _ in range(200):
            if state.ended:
                break
            state.take(rng.choice(state.allowed.tolist()))
    except DeadEnd as error:
        assert "the text can be parsed in too many ways" in str(error)  # noqa: PT017
    assert state.length > 3


def test_a_word_is_read_as_far_as_it_goes() -> None:
    """The limit that docs/inference.md states: a rule without recursion, used by one with it."""
    word = 'word ::= [a-z]+\nroot ::= word "x" | "(" root ")"'
    assert not matches(of_bytes(grammar=word), "fx")
    assert matches(of_bytes(grammar=word.replace('"x"', '"!"')), "f!")
    assert matches(of_bytes(grammar='word ::= [a-z]+\nroot ::= word "x"'), "fx")
    assert all(
        matches(of_bytes(grammar='root ::= [a-z]+ "x" | "(" root ")"'), f"{'(' * n}fx{')' * n}")
        for n in itertools.islice(itertools.count(), 3)
    )
