"""The tables of docs/reliability.md, and the files of results that they are made of.

    python tools/attack/results.py --run mutated strangers    # attacks that are tests, by name
    python tools/attack/results.py --campaign COUNTS          # adds what campaign.py counted
    python tools/attack/results.py --write                    # writes the tables
    python tools/attack/results.py --check                    # compares them only

An attack's own program records its result with --record; one that is a test is run by this one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "reliability.md"
COUNTS = Path(__file__).with_name("campaign.json")
_BEGIN, _END = "<!-- attacks: tools/attack/results.py -->\n", "<!-- attacks: end -->\n"
_BEGIN_FORMATS, _END_FORMATS = "<!-- formats -->\n", "<!-- formats: end -->\n"
_OUTCOMES = ("inputs", "read", "refused")


def read() -> dict[str, dict[str, str]]:
    """Attack, count, result and command by the attack's name."""
    found: dict[str, dict[str, str]] = json.loads(FILE.read_text())
    return found


def record(name: str, count: str, result: str) -> None:
    """Writes the result of an attack, whose description and command are in the file."""
    found = read()
    found[name] |= {"count": count, "result": result}
    FILE.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def table(found: dict[str, dict[str, str]]) -> str:
    """The rows in Markdown."""
    rows = ["| attack | count | result | command |", "| --- | --- | --- | --- |"]
    for row in found.values():
        rows.append("| {attack} | {count} | {result} | `{command}` |".format(**row))
    return "\n".join(rows) + "\n"


def formats(counts: dict[str, dict[str, int]]) -> str:
    """The counts of the campaign in Markdown, a row for each format."""
    rows = ["| format | inputs | read | refused | failures |", "| --- | --- | --- | --- | --- |"]
    for name, one in counts.items():
        numbers = [*(one[outcome] for outcome in _OUTCOMES), failures(one)]
        rows.append(f"| {name} | " + " | ".join(f"{n:,}" for n in numbers) + " |")
    return "\n".join(rows) + "\n"


def failures(counts: dict[str, int]) -> int:
    """Inputs that were neither read nor refused in one line."""
    return counts["inputs"] - counts["read"] - counts["refused"]


def page(text: str, found: dict[str, dict[str, str]], counts: dict[str, dict[str, int]]) -> str:
    """The page with the tables of these results."""
    text = _between(text, _BEGIN, _END, table(found))
    return _between(text, _BEGIN_FORMATS, _END_FORMATS, formats(counts))


def _between(text: str, begin: str, end: str, content: str) -> str:
    return text[: text.index(begin) + len(begin)] + content + text[text.index(end) :]


def record_campaign(path: Path) -> None:
    """Adds the counts of a campaign by format to those of other seeds, and records their sum.

    A longer campaign of the same seed takes the place of the shorter one. SystemExit for counts of
    several seeds, or a campaign that is shorter than the recorded one.
    """
    counts = json.loads(path.read_bytes())
    seeds = {one["seed"] for one in counts.values()}
    if len(seeds) != 1:
        sys.exit(f"{path} has counts of the seeds {sorted(seeds)}: record each seed by itself")
    kept = {
        name: {key: n for key, n in counts[name].items() if key not in ("next", "seed")}
        for name in sorted(counts)
    }
    by_seed = json.loads(COUNTS.read_text())
    seed = str(seeds.pop())
    for name, one in by_seed.get(seed, {}).items():
        if kept.get(name, {"inputs": 0})["inputs"] < one["inputs"]:
            sys.exit(f"{path} has fewer inputs of {name} than are recorded for seed {seed}")
    COUNTS.write_text(json.dumps(by_seed | {seed: kept}, indent=1) + "\n")
    sums = read_counts()
    n_inputs = sum(one["inputs"] for one in sums.values())
    n_failures = sum(map(failures, sums.values()))
    record("campaign", f"{n_inputs:,} inputs, {len(sums)} formats", f"{n_failures} failures")


def read_counts() -> dict[str, dict[str, int]]:
    """The counts of all campaigns by format."""
    by_seed: dict[str, dict[str, dict[str, int]]] = json.loads(COUNTS.read_text())
    sums: dict[str, dict[str, int]] = {}
    for counts in by_seed.values():
        for name, one in counts.items():
            there = sums.setdefault(name, dict.fromkeys(one, 0))
            for key, n in one.items():
                there[key] = there.get(key, 0) + n
    return dict(sorted(sums.items()))


def run_tests(name: str, command: str) -> None:
    """Runs an attack that is a test, and records how many cases failed."""
    settings, _, words = command.rpartition("pytest ")
    environment = dict(re.findall(r"(\w+)=(\S+)", settings))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *words.split()],
            cwd=ROOT, env=os.environ | environment, check=False,
        )  # fmt: skip
        suite: Any = ElementTree.parse(report).getroot().find("testsuite")
    n_failed = int(suite.get("failures")) + int(suite.get("errors"))
    result = read()[name]["result"]
    record(name, read()[name]["count"], re.sub(r"^\d+", str(n_failed), result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--campaign", type=Path, metavar="COUNTS")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for name in options.run:
        run_tests(name, read()[name]["command"])
    if options.campaign:
        record_campaign(options.campaign)
    there = PAGE.read_text()
    wanted = page(there, read(), read_counts())
    if options.write:
        PAGE.write_text(wanted)
    elif options.check and there != wanted:
        print(f"{PAGE} is not up to date: python tools/attack/results.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
