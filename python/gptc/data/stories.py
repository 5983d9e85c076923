"""The built-in text `stories`: short children's stories told from the grammar in data/stories.

data/stories/README.md describes the grammar. The only source of chance is `random.Random.random`:
its numbers for a seed are the same on every Python version, those of `choice` need not be.

The stories come from a small world: some of the themes, and the same people whenever a plot is told
again. That is what a tiny model learns to tell within a minute. The wide world has every theme, and
people drawn anew for each story.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SEPARATOR = "\n<|endoftext|>\n"
SMALL_WORLD = ("lost", "mend", "surprise", "weather")  # its themes

_BARE_ARTICLE = re.compile(r"\b([Aa])(?= (?!uni|use|once|one\b)(?:[aeiou]|hour))")

_Fill = Callable[["_Tale"], str]


class _Row(NamedTuple):
    source: str  # its text and its fields as written
    fill: _Fill
    fields: tuple[tuple[str, _Fill], ...]
    alias: str  # the section that a row such as "{girl}" stands for, else ""


_Sections = dict[str, list[_Row]]


class _Plot(NamedTuple):
    theme: str
    name: str
    binds: list[tuple[str, str]]  # a slot, and the section that it is drawn from
    orders: list[list[str]]  # "beat?" is told half of the time, "/" starts a new paragraph
    sections: _Sections  # the plot's own, which hide shared ones of the same name


class _Grammar(NamedTuple):
    sections: _Sections
    plots: list[_Plot]


class _Tale:
    """One story while it is told: what its slots hold and which rows it has used."""

    def __init__(
        self,
        grammar: _Grammar,
        plot: _Plot,
        rng: Callable[[], float],
        casting: Callable[[], float] | None = None,
    ) -> None:
        """`casting` draws the people, where that is not left to `rng` too."""
        self.shared, self.plot = grammar.sections, plot
        self.used: set[int] = set()
        self.bound: dict[str, str] = {}
        for slot, section in plot.binds:
            self.rng = casting if casting and self.has_people(section) else rng
            row = self.pick(section)
            while row.alias and row.alias not in self.bound:
                row = self.pick(row.alias)
            self.bound[slot] = row.fill(self)
            for field, fill in row.fields:
                self.bound[f"{slot}.{field}"] = value = fill(self)
                if slot == "hero":
                    self.bound[field] = value
        self.rng = rng

    def rows(self, section: str) -> list[_Row]:
        rows = self.plot.sections.get(section) or self.shared.get(section)
        if not rows:
            raise KeyError(f"plot {self.plot.name!r} has no section or slot {section!r}")
        return rows

    def has_people(self, section: str) -> bool:
        """Whether a row of the section, or of one that a row stands for, is a he or a she."""
        return any(
            any(field == "he" for field, _ in row.fields)
            or (row.alias != "" and row.alias not in self.bound and self.has_people(row.alias))
            for row in self.rows(section)
        )

    def pick(self, section: str) -> _Row:
        """A row that this story has not used yet, or any row once all are used."""
        rows = self.rows(section)
        at = int(self.rng() * len(rows))
        row = next((row for row in rows[at:] + rows[:at] if id(row) not in self.used), rows[at])
        self.used.add(id(row))
        return row

    def slot(self, name: str) -> str:
        return self.bound.get(name) or self.pick(name).fill(self)

    def tell(self) -> str:
        text = gap = ""
        for beat in self.plot.orders[int(self.rng() * len(self.plot.orders))]:
            if beat == "/":
                gap = "\n"
            elif not beat.endswith("?") or self.rng() < 0.5:
                text += gap + self.slot(beat.rstrip("?"))
                gap = " "
        return _BARE_ARTICLE.sub(r"\1n", text)


def _pieces(text: str, mark: str) -> list[str]:
    """`text` cut at every `mark` that stands outside braces."""
    pieces = []
    depth = start = 0
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0 and i >= start and text.startswith(mark, i):
            pieces.append(text[start:i])
            start = i + len(mark)
    return [*pieces, text[start:]]


def _brace(body: str) -> _Fill:
    """What fills `{body}`: one of several texts, or a slot (`{Slot}` with a capital)."""
    choices = _pieces(body, "|")
    if len(choices) > 1:
        fills = [_compile(choice) for choice in choices]
        return lambda tale: fills[int(tale.rng() * len(fills))](tale)
    name = body[:1].lower() + body[1:]
    if name == body:
        return lambda tale: tale.slot(name)

    def capital(tale: _Tale) -> str:
        text = tale.slot(name)
        return text[:1].upper() + text[1:]

    return capital


def _compile(text: str) -> _Fill:
    """What writes `text` with its braces filled."""
    parts: list[str | _Fill] = []
    depth = start = 0
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if char == "{" and depth == 1:
            parts.append(text[start:i])
            start = i + 1
        elif char == "}" and depth == 0:
            parts.append(_brace(text[start:i]))
            start = i + 1
    if not parts:
        return lambda tale: text
    parts.append(text[start:])
    return lambda tale: "".join([part if isinstance(part, str) else part(tale) for part in parts])


def _parse(files: Iterable[tuple[str, str]]) -> _Grammar:
    """The grammar in files, each a name and its text; the name of `plots-THEME.txt` counts."""
    grammar = _Grammar({}, [])
    plot = _Plot("", "", [], [], {})
    rows: list[_Row] | None = None  # the open section; a plot's head has none
    fixed: list[tuple[str, str]] = []
    columns: list[str] = []
    lines = ((name, line.strip()) for name, text in files for line in text.splitlines())
    for name, line in lines:
        if not line or line.startswith("#"):
            continue
        if line.startswith("[plot "):
            theme = name.removeprefix("plots-").removesuffix(".txt")
            plot = _Plot(theme, line[6:-1], [], [], {})
            grammar.plots.append(plot)
            rows = None
        elif line.startswith("["):
            section, _, heading = line[1:-1].partition(":")
            sections = plot.sections if section.startswith(".") else grammar.sections
            rows = sections[section.removeprefix(".")] = []
            words = [word.partition("=") for word in heading.split()]
            fixed = [(field, value) for field, equals, value in words if equals]
            columns = [field for field, equals, _ in words if not equals]
        elif rows is not None:
            first, *values = _pieces(line, " | ") if columns else [line]
            fields = [*fixed, *zip(columns, values, strict=True)]
            alias = re.fullmatch(r"\{([a-z-]+)\}", first)
            compiled = tuple((field, _compile(value)) for field, value in fields)
            texts = " | ".join([first, *(value for _, value in fields)])
            rows.append(_Row(texts, _compile(first), compiled, alias[1] if alias else ""))
        elif line.startswith(">"):
            plot.orders.append(line[1:].split())
        else:
            slot, _, section = line.partition(" = ")
            plot.binds.append((slot, section))
    return grammar


def grammar_files() -> list[Path]:
    """The files that the stories are drawn from, by name."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "share" / "stories", package.parents[1] / "data" / "stories"):
        if files := sorted(folder.glob("*.txt")):
            return files
    raise FileNotFoundError(errno.ENOENT, "the grammar of the stories is missing", str(package))


@lru_cache
def _grammar() -> _Grammar:
    return _parse((file.name, file.read_text("ascii")) for file in grammar_files())


def stories(seed: int = 0, *, wide: bool = False) -> Iterator[str]:
    """Stories of the small world, or of the wide one: without end, the same for the same seed."""
    grammar = _grammar()
    plots = [plot for plot in grammar.plots if wide or plot.theme in SMALL_WORLD]
    rng = random.Random(seed).random
    while True:
        plot = plots[int(rng() * len(plots))]
        casting = None if wide else random.Random(f"people of {plot.name}").random
        yield _Tale(grammar, plot, rng, casting).tell()


def corpus(n_bytes: int, seed: int = 0, *, wide: bool = False) -> Iterator[bytes]:
    """Whole stories, each followed by SEPARATOR, until at least `n_bytes` have been given."""
    given = 0
    for story in stories(seed, wide=wide):
        if given >= n_bytes:
            return
        piece = (story + SEPARATOR).encode("ascii")
        given += len(piece)
        yield piece
