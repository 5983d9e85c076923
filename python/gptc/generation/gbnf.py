r"""Grammars in llama.cpp's GBNF, translated for llguidance.

    lark('root ::= "(" root | ")"')  # 'start: r0\nr0: /\x{28}/ r0 | /\x{29}/\n'

llguidance reads a variant of Lark: rules in lower case, and lexemes in upper case, each of which
is read as far as it matches. A rule that uses no recursive rule becomes a lexeme. llguidance's own
converter changes `.`, refuses `\u00e9` and names that differ by case, and names no position.
"""

from __future__ import annotations

import re
from collections import defaultdict

from gptc.errors import UsageError

# Of a lexeme: what the library does with it grows faster than its size.
_MOST_LEVELS = 50
_MOST_WORDS = 3000
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\#[^\n]*)|(?P<end>\n)|(?P<is>::=)|(?P<name>[A-Za-z0-9_-]+)
    |(?P<text>"(?:[^"\\]|\\.)*")|(?P<chars>\[\^?(?:[^]\\]|\\.)*\])|(?P<any>\.)
    |(?P<times>[*+?]|\{[ \t]*\d{1,9}[ \t]*(?:,[ \t]*\d{0,9}[ \t]*)?\})|(?P<sign>[|()])""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_ESCAPE = re.compile(r"\\(?:x(..)|u(....)|U(........)|(.))|(.)", re.DOTALL)
_CONTROLS = {"n": 0x0A, "t": 0x09, "r": 0x0D}
_MISSING = {
    '"': 'the " that closes a text is missing',
    "[": "the ] of a class is missing",
    "{": "{m}, {m,} or {m,n} with numbers of at most 9 digits is expected",
}


def lark(grammar: str) -> str:
    """The grammar for llguidance. UsageError names the line and column of a mistake."""
    return _Translation(grammar).result()


class _Translation:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.rules: dict[str, list[str]] = {}  # the words of each rule; a name as "\0name"
        self.defined: dict[str, int] = {}  # position of each definition
        self.uses: defaultdict[str, dict[str, int]] = defaultdict(dict)  # by rule: position of each
        self.open: list[int] = []  # positions of open parentheses
        self.last = ""  # the kind of the last token
        self.read()

    def fail(self, message: str, at: int | None = None) -> UsageError:
        """The error at a position, by default the current one."""
        at = self.at if at is None else at
        line = self.text.count("\n", 0, at) + 1
        column = at - self.text.rfind("\n", 0, at)
        return UsageError(f"{line}:{column} of the grammar: {message}")

    def read(self) -> None:
        """Reads all rules."""
        rule, line_ended = "", False
        while self.at < len(self.text):
            found = _TOKEN.match(self.text, self.at)
            if not found:
                raise self.fail(self.unexpected())
            kind, word = str(found.lastgroup), found[0]
            if line_ended and kind not in ("space", "end"):
                rule, line_ended = rule if word == "|" else "", False
            if kind == "name" and (not rule or self.ends_here(found.end())):
                rule = self.define(word, found.end())
                continue
            if not rule and kind not in ("space", "end"):
                raise self.fail(f"unexpected {word[:20]!r}: a name and ::= are expected")
            self.take(rule, kind, word)
            self.at = found.end()
            line_ended |= kind == "end" and not self.open and self.last not in ("|", "is")
        if self.open:
            raise self.fail("this ( has no )", self.open[-1])
        self.check_names()

    def unexpected(self) -> str:
        char = self.text[self.at]
        if char == "\\" or char not in _MISSING:
            return f'unexpected {char!r}: a name, "text", [class], . or (group) is expected'
        return _MISSING[char]

    def ends_here(self, end: int) -> bool:
        """Whether a name that ends there is defined, which ends the rule before."""
        return bool(re.compile(r"[ \t]*::=").match(self.text, end))

    def define(self, name: str, end: int) -> str:
        """Begins the rule of that name."""
        if self.open:
            raise self.fail("this ( has no )", self.open[-1])
        found = re.compile(r"[ \t]*(?:#[^\n]*)?::=").match(self.text, end)
        if not found:
            self.at = end + len(self.text[end:]) - len(self.text[end:].lstrip(" \t"))
            raise self.fail(f"after the name {name}, ::= is expected")
        if name in self.rules:
            raise self.fail(f"{name} is already defined: join the two with |")
        self.rules[name], self.defined[name] = [], self.at
        self.at, self.last = found.end(), "is"
        return name

    def take(self, rule: str, kind: str, word: str) -> None:
        """Adds a token to a rule."""
        if kind in ("space", "end"):
            return
        words = self.rules[rule]
        first = self.last in ("is", "|", "(")
        if kind == "times":
            self.check_times(word, first)
        elif word == "(":
            self.open.append(self.at)
        elif word == ")":
            if not self.open:
                raise self.fail("this ) has no (")
            self.open.pop()
        if word in ("|", ")") and kind == "sign" and first:
            words.append('""')
        if kind == "name":
            self.uses[rule].setdefault(word, self.at)
        words.append(self.translated(kind, word))
        self.last = word if kind == "sign" else kind

    def check_times(self, word: str, first: bool) -> None:
        if first:
            raise self.fail(f"{word[0]} has nothing before it to repeat")
        if self.last == "times":
            raise self.fail("a second repetition sign: put the first into a group")
        least, _, most = word.strip("{}").partition(",")
        if most.strip() and int(most) < int(least):
            raise self.fail(f"{word} has its minimum above its maximum: swap them")

    def translated(self, kind: str, word: str) -> str:
        """A token for llguidance."""
        if kind == "name":
            return f"\0{word}"
        if kind == "any" or word == "[^]":
            return "/(?s:.)/"
        if kind == "times":
            return re.sub(r"\s", "", word)
        if kind == "text":
            codes = [code for code, _ in self.codes(word[1:-1], self.at + 1)]
            return f"/{''.join(map(_character, codes))}/" if codes else '""'
        return self.char_class(word) if kind == "chars" else word

    def char_class(self, word: str) -> str:
        negated = word.startswith("[^")
        codes = self.codes(word[1 + negated : -1], self.at + 1 + negated)
        if not codes:
            raise self.fail("this class is empty: add a character")
        out = "[^" if negated else "["
        for i, (code, plain) in enumerate(codes):
            if plain and code == ord("-") and 0 < i < len(codes) - 1:
                if codes[i - 1][0] > codes[i + 1][0]:
                    raise self.fail("this range is reversed: swap its ends")
                out += "-"
            else:
                out += _character(code)
        return f"/{out}]/"

    def codes(self, body: str, begin: int) -> list[tuple[int, bool]]:
        """The characters of a text or class, and whether each is written without a backslash."""
        found = []
        for match in _ESCAPE.finditer(body):
            *digits, letter, plain = match.groups()
            number = next(filter(None, digits), None)
            code = ord(plain or "\0")
            if number is not None or (letter and letter in "xuU"):
                if number is None or not re.fullmatch("[0-9A-Fa-f]+", number):
                    kind = match[0][1]
                    n = {"x": 2, "u": 4, "U": 8}[kind]
                    raise self.fail(f"\\{kind} needs {n} hexadecimal digits", begin + match.start())
                code = int(number, 16)
            elif letter:
                if letter not in _CONTROLS and letter not in '\\"[]-^':
                    raise self.fail(
                        f"unknown escape \\{letter}; known: "
                        r"\n \t \r \\ \" \[ \] \xHH \uHHHH",
                        begin + match.start(),
                    )
                code = _CONTROLS.get(letter, ord(letter))
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                raise self.fail(f"U+{code:04X} is not a character", begin + match.start())
            found.append((code, plain is not None))
        return found

    def check_names(self) -> None:
        if "root" not in self.rules:
            raise self.fail("no rule is called root: define the rule that the text must match", 0)
        for used in self.uses.values():
            for name, at in used.items():
                if name not in self.rules:
                    raise self.fail(f"no rule is called {name}", at)

    def lexemes(self) -> set[str]:
        """The rules that use no recursive rule (Kahn 1962), unless large with all their parts."""
        users = defaultdict(list)
        for rule, used in self.uses.items():
            for name in used:
                users[name].append(rule)
        n_left = {name: len(self.uses[name]) for name in self.rules}
        sizes: dict[str, tuple[int, int]] = {}  # of each lexeme: levels and words
        todo = [name for name, n in n_left.items() if n == 0]
        for name in todo:
            depth = 1 + max((sizes[used][0] for used in self.uses[name]), default=0)
            parts = (sizes[word[1:]][1] if word[0] == "\0" else 1 for word in self.rules[name])
            size = depth, sum(parts)
            if size[0] > _MOST_LEVELS or size[1] > _MOST_WORDS:
                continue
            sizes[name] = size
            for user in users[name]:
                n_left[user] -= 1
                todo += [user] if n_left[user] == 0 else []
        return set(sizes)

    def result(self) -> str:
        """All rules, each in a line."""
        lexemes = self.lexemes()
        names = {name: f"{'R' if name in lexemes else 'r'}{i}" for i, name in enumerate(self.rules)}
        lines = [f"start: {names['root']}"]
        for name, words in self.rules.items():
            row = [names[word[1:]] if word.startswith("\0") else word for word in words]
            row += [] if row and row[-1] != "|" else ['""']
            lines.append(f"{names[name]}: {' '.join(row)}")
        return "\n".join(lines) + "\n"


def _character(code: int) -> str:
    """A character in a regex of llguidance."""
    return f"\\x{{{code:X}}}"
