"""Prints docs/performance.md, or the README's table, from tools/measure/results.json.

    python tools/measure/report.py             # docs/performance.md
    python tools/measure/report.py --readme    # the table between README.md's two markers
    python tools/measure/report.py --write     # writes both files

A result has the quantity measured, its value or range, the command, date, machine and commit, the
peers that it is compared with, and its target. A ratio says how many times better gptc is; it is
computed from single numbers, and must be given for ranges.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
BEGIN = "<!-- tools/measure/report.py --readme: begin -->"
END = "<!-- tools/measure/report.py --readme: end -->"
LESS_IS_BETTER = {"s", "ms", "MB", "GB"}
# A ratio is the median over turns, not the ratio of two medians: they may differ by this much.
RATIO_TOLERANCE = 0.05

HEAD = """\
# Performance

The latest figure of each measurement. [The log](log/README.md) has all of them, dated, with what
helped and what did not. `tools/measure/report.py` writes this file from
`tools/measure/results.json`: add a result there, never here.

Machines are shared and their speed drifts, so ratios count more than absolute figures. A ratio says
how many times better gptc is, from neighbouring turns: it may differ from the ratio of the two
figures. A range spans several runs. The commit is the one that the log names, or else the one that
added the log entry.
"""

MISSING = """
## Not measured yet

| target | needs | command |
| --- | --- | --- |
"""


def words(value: object) -> str:
    """A number, or a range given as two numbers."""
    if isinstance(value, list):
        return f"{words(value[0])} to {words(value[1])}"
    return f"{value:,}"


def problems(data: dict[str, Any]) -> list[str]:
    """The problems of the results, a sentence each."""
    found = []
    for result in data["results"]:
        what = result.get("what", "a result without a name")
        wanted = {"group", "what", "value", "unit", "command", "date", "machine", "commit", "log"}
        missing = sorted(wanted - result.keys())
        unknown = sorted(result.keys() - wanted - {"peers", "target", "met", "readme"})
        if missing or unknown:
            found.append(f"{what}: lacks {missing}, has the unknown {unknown}")
            continue
        if result["machine"] not in data["machines"]:
            found.append(f"{what}: no machine is called {result['machine']}")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"]):
            found.append(f"{what}: {result['date']} is not a date")
        if not re.fullmatch(r"[0-9a-f]{7,40}", result["commit"]):
            found.append(f"{what}: {result['commit']} is not a commit")
        if not (ROOT / "docs" / "log" / f"{result['log']}.md").is_file():
            found.append(f"{what}: docs/log/{result['log']}.md does not exist")
        if ("target" in result) != ("met" in result):
            found.append(f"{what}: `target` and `met` must be given together")
        for peer in result.get("peers", []):
            found += [f"{what}: {problem}" for problem in peer_problems(result, peer)]
    names = [result.get("what") for result in data["results"]]
    found += sorted(f"{name}: named twice" for name in set(names) if names.count(name) > 1)
    return found


def peer_problems(result: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    """The problems of one comparison."""
    computed, given = computed_ratio(result, peer), peer.get("ratio")
    if computed is None and "ratio" not in peer:
        return [f"the ratio to {peer['name']} must be given"]
    if isinstance(given, int | float) and computed and abs(given / computed - 1) > RATIO_TOLERANCE:
        return [f"the ratio to {peer['name']} is {computed:.2f}, not {given}"]
    return []


def computed_ratio(result: dict[str, Any], peer: dict[str, Any]) -> float | None:
    """How many times better gptc is; None unless both values are single numbers."""
    ours, theirs = result["value"], peer.get("value")
    if isinstance(ours, list) or isinstance(theirs, list) or not theirs:
        return None
    ratio = theirs / ours if result["unit"] in LESS_IS_BETTER else ours / theirs
    return float(ratio)


def ratio_words(result: dict[str, Any], peer: dict[str, Any]) -> str:
    """The ratio as text, such as "1.37 x"; empty if it is null."""
    ratio = peer.get("ratio")
    if "ratio" not in peer and (computed := computed_ratio(result, peer)):
        ratio = round(computed, 2)
    return f"{words(ratio)} x" if ratio else ""


def cells(result: dict[str, Any]) -> list[str]:
    """The cells of a result: quantity, gptc, peers, ratios."""
    peers = result.get("peers", [])
    named = [f"{p['name']}: {words(p['value'])}" if "value" in p else p["name"] for p in peers]
    ratios = [ratio_words(result, peer) for peer in peers]
    return [
        result["what"],
        f"{words(result['value'])} {result['unit']}".strip(),
        "; ".join(named),
        "; ".join(filter(None, ratios)),
    ]


def row(parts: list[str]) -> str:
    """A line of a table; a bar inside a part would end its cell."""
    assert not any("|" in part for part in parts), parts
    return f"| {' | '.join(parts)} |".replace("|  |", "| |").replace("|  |", "| |")


def performance(data: dict[str, Any]) -> str:
    """All of docs/performance.md."""
    lines = [HEAD]
    titles = ["what", "gptc", "compared with", "ratio", "target", "command", "measured"]
    lines += [row(titles), row(["---"] * len(titles))]
    for group in dict.fromkeys(result["group"] for result in data["results"]):
        lines.append(row([f"**{group}**", *[""] * (len(titles) - 1)]))
        for result in (each for each in data["results"] if each["group"] == group):
            target = ""
            if "target" in result:
                target = f"{result['target']}: {'met' if result['met'] else '**missed**'}"
            log = f"[{result['date']}](log/{result['log']}.md)"
            measured = f"{log}, {result['machine']}, {result['commit']}"
            lines.append(row([*cells(result), target, result["command"], measured]))
    lines.append("\nMachines:\n")
    lines += [f"- **{name}**: {features}." for name, features in data["machines"].items()]
    rows = [row([each[key] for key in ("target", "needs", "command")]) for each in data["missing"]]
    return "\n".join(lines) + "\n" + MISSING + "\n".join(rows) + "\n"


def readme_table(data: dict[str, Any]) -> str:
    """The table of README.md."""
    titles = ["what", "gptc", "compared with", "ratio"]
    shown = [cells(result) for result in data["results"] if result.get("readme")]
    return "\n".join([row(titles), row(["---"] * len(titles)), *map(row, shown)]) + "\n"


def with_table(text: str, table: str) -> str:
    """README.md with this table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}")
    return f"{before}{begin}\n\n{table}\n{end}{after}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--readme", action="store_true", help="the README's table")
    parser.add_argument("--write", action="store_true", help="write both files")
    options = parser.parse_args()
    data = json.loads(RESULTS.read_text("utf-8"))
    if found := problems(data):
        print("\n".join(found), file=sys.stderr)
        return 1
    if options.write:
        readme = ROOT / "README.md"
        readme.write_text(with_table(readme.read_text("utf-8"), readme_table(data)), "utf-8")
        (ROOT / "docs" / "performance.md").write_text(performance(data), "utf-8")
        return 0
    print(readme_table(data) if options.readme else performance(data), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
