"""The built-in text is correct English, one plot a story, varied, and the same everywhere."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gptc.data import stories as module
from gptc.data.stories import SEPARATOR, corpus, stories

N_BYTES = 5_000_000
GRAMMAR = module._grammar()
MALE = {"he", "him", "his", "himself"}
FEMALE = {"she", "her", "hers", "herself"}


class Told(NamedTuple):
    plots: list[str]
    stories: list[str]


@pytest.fixture(scope="module")
def told() -> Told:
    """5 MB of stories from the wide world, and the plot of each."""
    plots: list[str] = []
    tell = module._Tale.tell

    def spy(tale: module._Tale) -> str:
        plots.append(tale.plot.name)
        return tell(tale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Tale, "tell", spy)
        text = b"".join(corpus(N_BYTES, wide=True)).decode("ascii")
    texts = text.split(SEPARATOR)[:-1]
    return Told(plots[: len(texts)], texts)


def words(text: str) -> list[str]:
    """Its words in lower case, without a possessive 's."""
    return re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower().replace("'s", ""))


def sentences(text: str) -> int:
    """How many sentences, where what is said within one belongs to it."""
    spoken = re.sub(r'"[^"]*([^"])"', r"\1", text)
    return len(re.findall(r"[.!?](?=\s[A-Z.!?,]|\s*$)", spoken))


@pytest.mark.parametrize(
    ("wide", "digest"),
    [
        (False, "e3c43c9efdb05186b1542c8e9e87cebf708b9157444dc67d17f545809868a60d"),
        (True, "da9da470ba0c3922776304a6fa1274ef7958134846143846a71e018f334d7356"),
    ],
)
def test_the_same_text_everywhere(wide: bool, digest: str) -> None:
    text = b"".join(corpus(100_000, wide=wide))[:100_000]
    assert hashlib.sha256(text).hexdigest() == digest


def test_a_small_world_has_the_same_people_in_every_telling() -> None:
    small = [plot for plot in GRAMMAR.plots if plot.theme in module.SMALL_WORLD]
    assert {plot.theme for plot in small} == set(module.SMALL_WORLD)
    assert 25 <= len(small) < len(GRAMMAR.plots)
    casts: dict[str, set[tuple[str, ...]]] = {}
    things: dict[str, set[tuple[str, ...]]] = {}
    init = module._Tale.__init__

    def spy(tale: module._Tale, *args: Any) -> None:
        init(tale, *args)
        people = [slot for slot, _ in tale.plot.binds if f"{slot}.he" in tale.bound]
        others = [slot for slot, _ in tale.plot.binds if slot not in people]
        casts.setdefault(tale.plot.name, set()).add(tuple(tale.bound[slot] for slot in people))
        things.setdefault(tale.plot.name, set()).add(tuple(tale.bound[slot] for slot in others))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Tale, "__init__", spy)
        told = list(islice(stories(4), 3_000))
    assert len(set(told)) == len(told)
    assert set(casts) == {plot.name for plot in small}
    assert all(len(cast) == 1 for cast in casts.values())
    assert max(len(thing) for thing in things.values()) > 3
    heroes = Counter(
        module._Tale(
            GRAMMAR, plot, random.random, random.Random(f"people of {plot.name}").random
        ).bound["he"]
        for plot in small
    )
    assert 0.4 <= heroes["she"] / heroes.total() <= 0.6


def test_a_seed_is_repeatable_and_seeds_differ() -> None:
    first, again, other = (list(islice(stories(seed), 200)) for seed in (7, 7, 8))
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize("n_bytes", [0, 1, 5_000])
def test_corpus_gives_whole_stories_and_stops(n_bytes: int) -> None:
    pieces = list(corpus(n_bytes, seed=3))
    told = islice(stories(3), len(pieces))
    assert pieces == [(story + SEPARATOR).encode("ascii") for story in told]
    assert sum(map(len, pieces[:-1])) < n_bytes or not pieces
    assert sum(map(len, pieces)) >= n_bytes


def test_needs_nothing_but_its_file_and_the_grammar() -> None:
    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("alone", sys.argv[1])
module = sys.modules["alone"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(next(module.stories(5)))
assert not any(name.split(".")[0] in ("gptc", "numpy") for name in sys.modules)
"""
    path = Path(module.__file__)
    if not (path.parents[3] / "data" / "stories").is_dir():
        pytest.skip("installed without the source tree")
    command = [sys.executable, "-I", "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == next(stories(5)) + "\n"


def test_no_story_twice(told: Told) -> None:
    assert len(set(told.stories)) == len(told.stories)


def test_every_plot_is_told(told: Told) -> None:
    assert len(GRAMMAR.plots) >= 40
    assert set(told.plots) == {plot.name for plot in GRAMMAR.plots}


def test_a_story_is_short_and_in_one_or_two_paragraphs(told: Told) -> None:
    lengths = [len(story) for story in told.stories]
    counts = [sentences(story) for story in told.stories]
    assert min(lengths) >= 200
    assert max(lengths) <= 1_000
    assert sum(300 <= n <= 800 for n in lengths) >= 0.98 * len(lengths)
    assert min(counts) >= 5
    assert max(counts) <= 20
    assert sum(n <= 14 for n in counts) >= 0.9 * len(counts)
    assert {story.count("\n") for story in told.stories} <= {0, 1}


@pytest.mark.parametrize(
    "wrong",
    [
        r"[^\x20-\x7e\n]",  # plain ASCII
        r"[{}|\[\]<>#_*]",  # what the grammar is written with
        r"  |^ | $| \n|\n ",
        r" [.,!?]|[.,!?]{2}|[.,!?][A-Za-z]",
        r"\b[Aa] (?:[aeio]|u(?!ni|se)|hour)|\b[Aa]n (?![aeiou]|hour)",
        r"\b(?!that|had|very|so|no|and|one)([a-z]+) \1\b(?! and)",
        r"(?:^|\n)[^A-Z\"]|(?:^|\n)\"[^A-Z]",  # a paragraph starts with a capital,
        r"[.!?] [^A-Z\"]|[.]\" [^A-Z\"]",  # and so does a sentence
        r"(?<![,a-z]) \"[a-z]",  # and what is said, unless it continues
        r"\"(?:Are|Can|Is|May|Shall|Where|Who|Why|Will) [^\"?!]*[.,]\"",  # a question asks
        r"[^.!?\"]$|[^.!?]\"$|[^.!?\"]\n|[^.!?]\"\n",  # and it ends like one
    ],
)
def test_nothing_is_badly_written(told: Told, wrong: str) -> None:
    found = Counter(
        match[0] and story[max(0, match.start() - 30) : match.end() + 20]
        for story in told.stories
        for match in re.finditer(wrong, story)
    )
    assert not found, found.most_common(5)


def test_quotes_are_closed_in_their_paragraph(told: Told) -> None:
    for story in told.stories:
        for paragraph in story.split("\n"):
            said = re.findall(r'(?:^|[ ])"[^" ](?:[^"]*[^" ])?"(?=[ .,!?]|$)', paragraph)
            assert paragraph.count('"') == 2 * len(said), paragraph


def test_pronouns_agree_with_the_characters() -> None:
    rng = random.Random(1).random
    for plot in GRAMMAR.plots:
        for _ in range(100):
            tale = module._Tale(GRAMMAR, plot, rng)
            story = tale.tell()
            used = set(words(story))
            known = {text for slot, text in tale.bound.items() if slot.split(".")[-1] == "he"}
            assert "he" in known or not used & MALE, story
            assert "she" in known or not used & FEMALE, story
            people = [tale.bound[slot] for slot, _ in plot.binds if f"{slot}.he" in tale.bound]
            assert len(set(people)) == len(people), people
            hero = tale.bound["hero"]
            pronouns = [tale.bound[field] for field in ("he", "him", "his", "himself")]
            assert pronouns in (["he", "him", "his", "himself"], ["she", "her", "her", "herself"])
            assert hero in story, story


def test_a_name_is_always_she_or_always_he() -> None:
    genders: dict[str, set[str]] = {}
    for sections in [GRAMMAR.sections, *(plot.sections for plot in GRAMMAR.plots)]:
        for rows in sections.values():
            for row in rows:
                name, *fields = row.source.split(" | ")
                if {"he", "she"} & set(fields):
                    genders.setdefault(name, set()).update({"he", "she"} & set(fields))
    assert len(genders) >= 80
    assert [name for name, both in genders.items() if len(both) > 1] == []
    girls, boys = GRAMMAR.sections["girl"], GRAMMAR.sections["boy"]
    assert len(girls) == len(boys)


def test_girls_and_boys_are_heroes_equally_often() -> None:
    rng = random.Random(2).random
    heroes = Counter(
        module._Tale(GRAMMAR, plot, rng).bound["he"] for plot in GRAMMAR.plots for _ in range(50)
    )
    assert 0.45 <= heroes["she"] / heroes.total() <= 0.55


def _slots(text: str) -> set[str]:
    """The slots in a row, in lower case; a choice inside braces is none."""
    found: set[str] = set()
    while "{" in text:
        inner = re.search(r"\{([^{}]*)\}", text)
        assert inner, f"unbalanced braces: {text}"
        if "|" not in inner[1]:
            assert re.fullmatch(r"[A-Z]?[a-z-]*(\.[a-z]+)?", inner[1]), f"not a slot: {text}"
            found.add(inner[1][0].lower() + inner[1][1:])
        text = text[: inner.start()] + text[inner.end() :]
    assert "}" not in text, f"unbalanced braces: {text}"
    return found


def test_every_slot_is_defined_and_every_section_reached() -> None:
    reached: set[int] = set()
    for plot in GRAMMAR.plots:
        sections = {**GRAMMAR.sections, **plot.sections}
        tale = module._Tale(GRAMMAR, plot, random.Random(0).random)
        beats = [beat.rstrip("?") for order in plot.orders for beat in order if beat != "/"]
        todo = {section for _, section in plot.binds} | set(beats) - set(tale.bound)
        seen: set[str] = set()
        while todo:
            name = todo.pop()
            assert name in sections, f"{plot.name}: no section or slot {name}"
            seen.add(name)
            reached.add(id(sections[name]))
            used = set().union(*(_slots(row.source) for row in sections[name]))
            todo |= {slot for slot in used if slot not in tale.bound} - seen
        assert set(plot.sections) <= seen, plot.name
    assert [name for name, rows in GRAMMAR.sections.items() if id(rows) not in reached] == []


def test_every_beat_has_variants() -> None:
    for plot in GRAMMAR.plots:
        assert len({tuple(order) for order in plot.orders}) >= 2, plot.name
        for name in {beat.rstrip("?") for order in plot.orders for beat in order} - {"/"}:
            rows = plot.sections.get(name) or GRAMMAR.sections[name]
            assert len({row.source for row in rows}) >= 2, (plot.name, name)


def test_the_words_are_few_and_used_often(told: Told) -> None:
    counts = Counter(word for story in told.stories for word in words(story))
    total = counts.total()
    assert 1_000 <= len(counts) <= 1_800
    assert sum(n for _, n in counts.most_common(300)) >= 0.7 * total
    assert sum(n for _, n in counts.most_common(1_000)) >= 0.93 * total


def test_little_is_repeated(told: Told) -> None:
    texts = [story.replace("\n", " ") for story in told.stories]
    said = [part for story in texts for part in re.findall(r'[^.!?]+[.!?]+"?', story)]
    assert len(set(said)) >= 0.35 * len(said)
    for length, limit in ((8, 0.01), (12, 0.0075)):
        runs: Counter[tuple[str, ...]] = Counter()
        for story in texts:
            tokens = words(story)
            runs.update(set(zip(*(tokens[i:] for i in range(length)), strict=False)))
        run, count = runs.most_common(1)[0]
        assert count <= limit * len(texts), run


def test_stories_open_and_end_in_many_ways(told: Told) -> None:
    openings = Counter(tuple(words(story)[:3]) for story in told.stories)
    endings = Counter(tuple(words(story)[-5:]) for story in told.stories)
    assert max(openings.values()) <= 0.08 * len(told.stories)
    assert max(endings.values()) <= 0.03 * len(told.stories)


def test_most_stories_have_speech(told: Told) -> None:
    assert sum('"' in story for story in told.stories) >= 0.9 * len(told.stories)
