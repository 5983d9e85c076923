"""The tables of docs/reliability.md, and the files of results that they are made of.

    python tools/attack/results.py --run mutated kills        # attacks by name, or all
    python tools/attack/results.py --run all --small          # each with few cases; records nothing
    python tools/attack/results.py --campaign COUNTS          # adds what campaign.py counted
    python tools/attack/results.py --write                    # writes the tables
    python tools/attack/results.py --check                    # compares them only

--run records the count and result of a program, or how many tests failed. `clients` needs a server.
Each row has the day on which it was recorded, and the commit if it is known.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "reliability.md"
COUNTS = Path(__file__).with_name("campaign.json")
_BEGIN, _END = "<!-- attacks: tools/attack/results.py -->\n", "<!-- attacks: end -->\n"
_BEGIN_FORMATS, _END_FORMATS = "<!-- formats -->\n", "<!-- formats: end -->\n"
_OUTCOMES = ("inputs", "read", "refused")
# What --small changes in commands.
_FEW = {
    r"--kills \d+": "--kills 12",
    r"--minutes \d+": "--minutes 0.5 --slice 0.1",
    r"--calls \d+": "--calls 200",
    r"test_concurrent \d+": "test_concurrent 200",
    r"--seconds \d+": "--seconds 0.5",
    r"MUTATIONS=\d+": "MUTATIONS=3",
    r"--cases \d+": "--cases 60",
    r"cases/hostile$": "cases/hostile --files 3",
}


def read() -> dict[str, dict[str, str]]:
    """Attack, count, result and command by the attack's name."""
    found: dict[str, dict[str, str]] = json.loads(FILE.read_text())
    return found


def record(name: str, count: str, result: str) -> None:
    """Writes the result of an attack, whose description and command are in the file."""
    found = read()
    found[name] |= {"count": count, "result": result, "at": f"{date.today()}, {_commit()}"}
    FILE.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(f"{name}: {count}: {result}", flush=True)


def _commit() -> str:
    """The commit that is checked out; + after it if files are changed."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout.strip() or "unknown"


def table(found: dict[str, dict[str, str]]) -> str:
    """The rows in Markdown."""
    rows = ["| attack | count | result | command | recorded |", "| --- | --- | --- | --- | --- |"]
    for row in found.values():
        rows.append("| {attack} | {count} | {result} | `{command}` | {at} |".format(**row))
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
    by_seed.pop(seed, None)  # its inputs may have failed since the others were recorded
    COUNTS.write_text(json.dumps(by_seed | {seed: kept}, indent=1) + "\n")
    sums = read_counts()
    n_inputs = sum(one["inputs"] for one in sums.values())
    record("campaign", f"{n_inputs:,} inputs, {len(sums)} formats", campaign_result())


def campaign_result() -> str:
    """The failures of all campaigns, and those after the last one that failed in these formats.

    Campaigns are in the order in which they were recorded.
    """
    campaigns = list(json.loads(COUNTS.read_text()).values())
    last = {name: i for i, one in enumerate(campaigns) for name in one if failures(one[name])}
    n_failures = sum(failures(one) for counts in campaigns for one in counts.values())
    if not n_failures:
        return "0 failures"
    later = [counts[name]["inputs"] for name, at in last.items() for counts in campaigns[at + 1 :]
             if name in counts]  # fmt: skip
    found = (
        f"{n_failures} failure{'s' * (n_failures > 1)} in {len(last)} format{'s' * (len(last) > 1)}"
    )
    return f"{found}; since then {sum(later):,} inputs of these without one"


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


def run_program(name: str, command: str) -> None:
    """Runs an attack that is a program; what it prints last has the count and the result."""
    ran = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = ran.stdout.strip().splitlines() or ["nothing"]
    last = re.sub(r"^test_\w+: (\d+ checks), ", r"\1: ", lines[-1])  # of a C test
    found = re.fullmatch(r"([\d,]+ [^:(]*?)(?: \((.*)\))?: (.*)", last)
    if found is None:
        sys.exit(f"{name} ends with code {ran.returncode} and prints {lines[-1]!r}")
    count = f"{found[1]}: {found[2]}" if found[2] else found[1]
    record(name, count, found[3] if not ran.returncode else f"failed: {found[3]}")


def run_campaign(command: str) -> None:
    """Runs a campaign of another seed, and adds its counts."""
    seed = 1 + max(map(int, json.loads(COUNTS.read_text())), default=0)
    path = f"build/campaign-{seed}.json"
    command = f"{command.partition(' --counts ')[0]} --counts {path} --seed {seed}"
    subprocess.run(command, shell=True, cwd=ROOT, check=False)  # its failures are in the counts
    record_campaign(ROOT / path)


def run(name: str, small: bool = False) -> None:
    """Runs one attack as its command says, with few cases if `small`, and records its result."""
    command = read()[name]["command"]
    for pattern, few in _FEW.items() if small else ():
        command = re.sub(pattern, few, command)
    if small:
        print(f"{name}: {command}", flush=True)
    if "pytest " in command:
        run_tests(name, command)
    elif name == "campaign":
        run_campaign(command)
    else:
        run_program(name, command)


def run_each(names: Sequence[str], small: bool = False) -> int:
    """Runs attacks, and returns how many gave no result."""
    n_failed = 0
    for name in names:
        try:
            run(name, small)
        except SystemExit as error:  # the others are still run
            print(error, file=sys.stderr, flush=True)
            n_failed += 1
    return n_failed


def main() -> int:
    global FILE, COUNTS
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--small", action="store_true", help="few cases, and nothing is recorded")
    parser.add_argument("--campaign", type=Path, metavar="COUNTS")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    names = list(options.run)
    if names == ["all"]:
        names = [name for name in read() if name != "clients"]
    if options.small:
        with tempfile.TemporaryDirectory() as folder:
            FILE, COUNTS = (Path(shutil.copy(path, folder)) for path in (FILE, COUNTS))
            return run_each(names, small=True)
    if run_each(names):
        return 1
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
