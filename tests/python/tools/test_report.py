"""docs/performance.md and the README's table match results.json."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tool_files import load_tool

ROOT = Path(__file__).resolve().parents[3]
report = load_tool("measure/report")


@pytest.fixture
def data() -> dict[str, Any]:
    return json.loads(report.RESULTS.read_text("utf-8"))


AGAIN = "write it again: python tools/measure/report.py --write"


def test_performance_md_is_what_the_results_say(data: dict[str, Any]) -> None:
    written = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert written == report.performance(data), AGAIN


def test_the_readmes_table_is_what_the_results_say(data: dict[str, Any]) -> None:
    written = (ROOT / "README.md").read_text("utf-8")
    assert written == report.with_table(written, report.readme_table(data)), AGAIN
    with pytest.raises(ValueError, match="lacks the markers"):
        report.with_table(written.replace(report.END, ""), "")


def test_the_results_are_sound(data: dict[str, Any]) -> None:
    assert report.problems(data) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"commit": "the last one"}, "the last one is not a commit"),
        ({"date": "yesterday"}, "yesterday is not a date"),
        ({"machine": "z80"}, "no machine is called z80"),
        ({"log": "2026-01-01-nothing"}, "docs/log/2026-01-01-nothing.md does not exist"),
        ({"speed": 3}, "has the unknown"),
        ({"target": "3 x"}, "must be given together"),
        ({"peers": [{"name": "a", "value": [1, 2]}]}, "the ratio to a must be given"),
        ({"peers": [{"name": "a", "value": 50, "ratio": 3}]}, "the ratio to a is 2.00, not 3"),
        ({"unit": "s", "peers": [{"name": "a", "value": 50, "ratio": 2}]}, "is 0.50, not 2"),
    ],
)
def test_an_unsound_result_is_named(
    data: dict[str, Any], change: dict[str, Any], problem: str
) -> None:
    result = copy.deepcopy(data["results"][0])
    for key in ("peers", "target", "met"):
        result.pop(key, None)
    result |= {"what": "it", "value": 100, "unit": "tokens/s"}
    assert report.problems({**data, "results": [result]}) == []
    found = report.problems({**data, "results": [result | change]})
    assert len(found) == 1
    assert re.match(f"it: .*{re.escape(problem)}", found[0])


def test_a_result_without_a_command_and_one_that_is_named_twice(data: dict[str, Any]) -> None:
    result = dict(data["results"][0])
    assert "named twice" in report.problems({**data, "results": [result, result]})[0]
    del result["command"]
    assert "lacks ['command']" in report.problems({**data, "results": [result]})[0]


def test_ratios() -> None:
    speed = {"what": "a", "value": 1500, "unit": "tokens/s"}
    speed["peers"] = [{"name": "b", "value": 1000}, {"name": "c", "value": 1200, "ratio": None}]
    assert report.cells(speed) == ["a", "1,500 tokens/s", "b: 1,000; c: 1,200", "1.5 x"]
    time = {"what": "a", "value": 2, "unit": "s", "peers": [{"name": "b", "value": 5}]}
    assert report.cells(time)[3] == "2.5 x"


def test_links_of_the_documents_lead_to_files() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
            if "://" not in link:
                assert (path.parent / link).exists(), f"{path.relative_to(ROOT)}: {link}"


def test_every_entry_of_the_log_is_listed() -> None:
    folder = ROOT / "docs" / "log"
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text("utf-8")))
    assert listed == {path.name for path in folder.glob("2*.md")}
