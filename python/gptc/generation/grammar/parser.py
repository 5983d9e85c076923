"""Parsers of regexes and of grammars in llama.cpp's GBNF.

    machine = parse_grammar('root ::= "(" root ")" | [0-9]+')

Both produce the expressions of automaton.py.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from gptc.errors import UsageError
from gptc.generation.grammar.automaton import (
    LAST,
    MOST_NODES,
    Chars,
    Choice,
    Concat,
    Expression,
    Graph,
    Machine,
    Name,
    Ranges,
    Repeat,
    others,
    united,
)

_MOST_NESTED = 100  # groups in groups
_SIGNS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_CONTROLS = {"n": 0x0A, "t": 0x09, "r": 0x0D}
_HEX = {"x": 2, "u": 4, "U": 8}


class _Parser(ABC):
    """The syntax that regexes and grammars share."""

    stops: tuple[str, ...] = ("|", ")")  # characters that end a row
    count = r"\{(\d*)(,?)(\d*)\}"  # {m}, {m,}, {m,n}

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    @abstractmethod
    def where(self, at: int) -> str:
        """A position in words, for an error."""

    @abstractmethod
    def atom(self, depth: int) -> Expression:
        """Parses an item that can be repeated. The text does not end here."""

    @abstractmethod
    def escape(self) -> Ranges:
        """Parses an escape after its backslash."""

    def skip(self, lines: bool) -> None:  # noqa: B027
        """Skips blanks and comments, with `lines` also newlines. A regex has none."""

    def fail(self, message: str, at: int | None = None) -> UsageError:
        return UsageError(f"{self.where(self.at if at is None else at)}: {message}")

    def here(self, *words: str) -> bool:
        """Whether one of the words is next."""
        return self.text.startswith(words, self.at)

    def take(self, word: str) -> bool:
        """Whether the word is next; if so, it is read."""
        found = self.here(word)
        self.at += len(word) * found
        return found

    def char(self, wanted: str) -> str:
        """Reads a character. UsageError at the end of the text, where `wanted` is missing, or for
        half of a surrogate pair."""
        if self.at == len(self.text):
            raise self.fail(f"{wanted} is missing at the end")
        self.at += 1
        code = ord(self.text[self.at - 1])
        if 0xD800 <= code <= 0xDFFF:
            raise self.fail(
                f"U+{code:04X} is half of a surrogate pair; give the whole character", self.at - 1
            )
        return self.text[self.at - 1]

    def choice(self, depth: int = 0) -> Expression:
        if depth > _MOST_NESTED:
            raise self.fail(f"groups are nested more than {_MOST_NESTED} deep; use fewer")
        options = [self.row(depth)]
        while self.bar():
            options.append(self.row(depth))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def bar(self) -> bool:
        """Whether another alternative follows, on this line or the next ones."""
        before = self.at
        self.skip(lines=True)
        if not self.take("|"):
            self.at = before
            return False
        self.skip(lines=True)
        return True

    def row(self, depth: int) -> Expression:
        items = []
        while True:
            self.skip(lines=depth > 0)
            if self.at == len(self.text) or self.here(*self.stops):
                break
            items.append(self.repeated(self.atom(depth)))
        return items[0] if len(items) == 1 else Concat(tuple(items))

    def group(self, depth: int) -> Expression:
        """Parses a group after its (."""
        begin = self.at - 1
        inner = self.choice(depth + 1)
        self.skip(lines=True)
        if not self.take(")"):
            raise self.fail("this ( has no )", begin)
        return inner

    def repeated(self, item: Expression) -> Expression:
        begin = self.at
        times = self.times()
        if times is None:
            return item
        if self.times() is not None:
            raise self.fail(
                "a second repetition sign: leave it out (lazy and possessive signs, *? and *+, "
                "change nothing), or put the first into a group",
                begin,
            )
        return Repeat(item, *times)

    def times(self) -> tuple[int, int | None] | None:
        """Parses a repetition: its least and most; None if there is none here."""
        begin = self.at
        for sign, found in _SIGNS.items():
            if self.take(sign):
                return found
        braces = re.compile(self.count, re.ASCII).match(self.text, self.at)
        if not braces or not (braces[1] or braces[2]):
            return None
        if max(len(braces[1]), len(braces[3])) > 9:
            raise self.fail(f"{braces[0][:24]}… is more than {MOST_NODES:,} steps", begin)
        self.at = braces.end()
        least = int(braces[1] or 0)
        most = int(braces[3]) if braces[3] else None if braces[2] else least
        if most is not None and most < least:
            raise self.fail(f"{braces[0]} has its minimum above its maximum: swap them", begin)
        return least, most

    def char_class(self, empty: bool) -> Chars:
        """Parses a class after its [; with `empty`, a ] that comes first ends it."""
        begin = self.at - 1
        negated = self.take("^")
        ranges: list[tuple[int, int]] = []
        first = self.at
        while (not empty and self.at == first) or not self.here("]"):
            low_at = self.at
            low = self.class_char()
            if not self.here("-") or self.here("-]"):
                ranges += low
                continue
            self.at += 1
            high = self.class_char()
            for end in (low, high):
                if len(end) != 1 or end[0][0] != end[0][1]:
                    raise self.fail("a range needs one character at each end", low_at)
            if low[0][0] > high[0][0]:
                raise self.fail("this range is reversed: swap its ends", low_at)
            ranges.append((low[0][0], high[0][0]))
        self.at += 1
        found = others(ranges) if negated else united(ranges)
        if not found:
            raise self.fail("this class is empty: add a character", begin)
        return Chars(found)

    def class_char(self) -> Ranges:
        char = self.char("the ] of a class")
        return self.escape() if char == "\\" else ((ord(char),) * 2,)

    def code(self, kind: str) -> Ranges:
        """Parses the hex digits of \\xHH, \\uHHHH or \\UHHHHHHHH."""
        digits = self.text[self.at : self.at + _HEX[kind]]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{_HEX[kind]}}}", digits):
            raise self.fail(f"\\{kind} needs {_HEX[kind]} hexadecimal digits", self.at - 2)
        code = int(digits, 16)
        if code > LAST or 0xD800 <= code <= 0xDFFF:
            raise self.fail(f"U+{code:04X} is not a character", self.at - 2)
        self.at += len(digits)
        return ((code, code),)


_DIGIT = ((0x30, 0x39),)
_WORD = (*_DIGIT, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE = ((0x09, 0x0D), (0x20, 0x20))
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CLASSES |= {name.upper(): others(ranges) for name, ranges in _CLASSES.items()}


class _RegexParser(_Parser):
    """A subset of Python's `re` with re.ASCII: no lookaround, names, \\b or back references."""

    def where(self, at: int) -> str:
        return f"character {at} of the regex"

    def atom(self, depth: int) -> Expression:
        begin, char = self.at, self.char("more")
        if char == "(":
            if not self.take("?:") and self.here("?"):
                raise self.fail(
                    "groups with ? are unsupported (names, lookaround) except (?:…)", begin
                )
            return self.group(depth)
        if char == "[":
            return self.char_class(empty=False)
        if char == ".":
            return Chars(others([(0x0A, 0x0A)]))
        if char == "\\":
            return Chars(self.escape())
        if char in "^$" and self.at == (1 if char == "^" else len(self.text)):
            return Concat(())
        if char in "^$":
            raise self.fail(
                f"the whole text always matches: leave out {char}, or write \\{char}", begin
            )
        self.at = begin
        if self.times() is not None:
            raise self.fail(f"{char} has nothing before it to repeat", begin)
        self.at = begin + 1
        return Chars(((ord(char),) * 2,))

    def escape(self) -> Ranges:
        begin, char = self.at - 1, self.char("the character after a \\")
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _HEX:
            return self.code(char)
        if "1" <= char <= "9":
            raise self.fail(f"\\{char}: back references to groups are unsupported", begin)
        if char.isalnum() and char.isascii() and char not in _CONTROLS:
            raise self.fail(
                f"unknown escape \\{char}; known: \\n \\t \\r \\xHH \\uHHHH \\d \\w \\s and \\ "
                "before punctuation",
                begin,
            )
        return ((_CONTROLS.get(char, ord(char)),) * 2,)


class _GrammarParser(_Parser):
    """The rules of llama.cpp's GBNF: name ::= alternatives, to the end of the line."""

    stops = ("|", ")", "\n")
    count = r"\{[ \t]*(\d+)[ \t]*(,?)[ \t]*(\d*)[ \t]*\}"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.rules: dict[str, Expression] = {}
        self.defined: dict[str, int] = {}  # position of each definition
        self.used: dict[str, int] = {}  # position of each first use

    def where(self, at: int) -> str:
        line = self.text.count("\n", 0, at) + 1
        return f"{line}:{at - self.text.rfind(chr(10), 0, at)} of the grammar"

    def parse(self) -> None:
        """Parses all rules. UsageError names the position of a mistake."""
        self.skip(lines=True)
        while self.at < len(self.text):
            begin, name = self.at, self.name()
            self.skip(lines=False)
            if not self.take("::="):
                raise self.fail(f"after the name {name}, ::= is expected")
            if name in self.defined:
                raise self.fail(f"{name} is already defined: join the two with |", begin)
            self.defined[name] = begin
            self.skip(lines=True)
            self.rules[name] = self.choice()
            if self.at < len(self.text) and not self.here("\n"):
                raise self.fail("this ) has no (")
            self.skip(lines=True)
        for name, at in self.used.items():
            if name not in self.rules:
                raise self.fail(f"no rule is called {name}", at)
        if "root" not in self.rules:
            raise self.fail("no rule is called root: define the rule that the text must match", 0)

    def skip(self, lines: bool) -> None:
        space = r"(?:[ \t\r\n]|#[^\n]*)*" if lines else r"(?:[ \t\r]|#[^\n]*)*"
        found = re.compile(space).match(self.text, self.at)
        self.at = found.end() if found else self.at

    def name(self) -> str:
        found = re.compile(r"[A-Za-z0-9_-]+").match(self.text, self.at)
        if not found:
            char = self.char("more")
            raise self.fail(
                f'unexpected {char!r}: a name, "text", [class], . or (group) is expected',
                self.at - 1,
            )
        self.at = found.end()
        return found[0]

    def atom(self, depth: int) -> Expression:
        if self.take("("):
            return self.group(depth)
        if self.take("["):
            return self.char_class(empty=True)
        if self.take("."):
            return Chars(others([]))
        if self.take('"'):
            items = []
            while not self.take('"'):
                char = self.char('the " that closes a text')
                items.append(Chars(self.escape() if char == "\\" else ((ord(char),) * 2,)))
            return Concat(tuple(items))
        begin = self.at
        if self.times() is not None:
            raise self.fail(f"{self.text[begin]} has nothing before it to repeat", begin)
        name = self.name()
        self.used.setdefault(name, begin)
        return Name(name)

    def times(self) -> tuple[int, int | None] | None:
        found = super().times()
        if found is None and self.here("{"):
            raise self.fail("{m}, {m,} or {m,n} with numbers is expected")
        return found

    def escape(self) -> Ranges:
        begin, char = self.at - 1, self.char("the character after a \\")
        if char in _HEX:
            return self.code(char)
        if char not in _CONTROLS and char not in '\\"[]-^':
            raise self.fail(
                f'unknown escape \\{char}; known: \\n \\t \\r \\\\ \\" \\[ \\] \\xHH \\uHHHH', begin
            )
        return ((_CONTROLS.get(char, ord(char)),) * 2,)


def parse_regex(text: str) -> Machine:
    """The machine of a regex, which the whole text must match. UsageError names a mistake."""
    parser = _RegexParser(text)
    root = parser.choice()
    if parser.at < len(text):
        raise parser.fail("this ) has no (")
    return Graph({"root": root}, "regex").machine("root")


def parse_grammar(text: str) -> Machine:
    """The machine of a grammar's rule `root`. UsageError names a mistake."""
    parser = _GrammarParser(text)
    parser.parse()
    graph = Graph(parser.rules, "grammar")
    if (cycle := graph.left_recursion()) is not None:
        raise parser.fail(
            f"{cycle[0]} begins with itself ({' → '.join(cycle)}): left recursion is unsupported, "
            "rewrite it, such as item (more item)*",
            parser.defined[cycle[0]],
        )
    if (endless := graph.endless()) is not None:
        raise parser.fail(
            f"no finite text matches {endless}: add an alternative that does not use it",
            parser.defined[endless],
        )
    return graph.machine("root")
