"""The table of docs/reliability.md, and the file of results that it is made of.

    python tools/attack/results.py --run mutated strangers    # attacks that are tests, by name
    python tools/attack/results.py --write                    # writes the table
    python tools/attack/results.py --check                    # compares it only

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
_BEGIN, _END = "<!-- attacks: tools/attack/results.py -->\n", "<!-- end -->\n"


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


def page(text: str, found: dict[str, dict[str, str]]) -> str:
    """The page with the table of these results."""
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    return text[:begin] + table(found) + text[end:]


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
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for name in options.run:
        run_tests(name, read()[name]["command"])
    there = PAGE.read_text()
    wanted = page(there, read())
    if options.write:
        PAGE.write_text(wanted)
    elif options.check and there != wanted:
        print(f"{PAGE} is not up to date: python tools/attack/results.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
