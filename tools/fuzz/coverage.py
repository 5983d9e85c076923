"""Feeds every loader mutations of a small valid file, chosen by libFuzzer for code coverage.

    pip install atheris
    python tools/fuzz/coverage.py --minutes 10        # all formats in turn
    python tools/fuzz/coverage.py --formats gguf

Formats, valid files and failures are those of tools/fuzz/fuzz.py. Its damage is coarser; this
reaches deeper code. A failing file is kept, and named in the error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["gptc"]):
    import fuzz

KEPT = Path(tempfile.gettempdir())


def fuzz_one(name: str, target: fuzz.Target, seeds: Path, seconds: int) -> None:
    """Fuzzes a format from the files in the folder `seeds`, then ends the process."""
    shutil.copy(target.file, seeds)
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-timeout=60"]
    options.append(f"-artifact_prefix={KEPT}/fuzz-{name}-")
    atheris.Setup([sys.argv[0], str(seeds), *options], lambda data: fuzz.attempt(target, data))
    atheris.Fuzz()


def fuzz_apart(name: str, target: fuzz.Target, seconds: int) -> tuple[int, str]:
    """`fuzz_one` in a forked process, which saves the imports: exit code and output."""
    with tempfile.TemporaryDirectory() as seeds, tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            fuzz_one(name, target, Path(seeds), seconds)
            os._exit(2)  # not reached
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().decode(errors="replace")


def fuzz_all(targets: dict[str, fuzz.Target], minutes: float) -> int:
    """Fuzzes formats in turn, each its share of the time; the exit code."""
    n_all = 0
    for name, target in targets.items():
        seconds = max(1, round(60 * minutes / len(targets)))
        code, said = fuzz_apart(name, target, seconds)
        n = re.search(r"stat::number_of_executed_units: (\d+)", said)
        if code or not n:
            print(f"{name} failed:\n{said[-4000:]}", file=sys.stderr)
            return 1
        reached = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", said)[-1]
        print(f"{name}: {n[1]} cases, {reached[0]} edges, corpus of {reached[2]} files")
        n_all += int(n[1])
    print(f"in all {n_all} cases, no failure")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1, help="total time, for all formats")
    parser.add_argument("--formats", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = fuzz.targets(Path(folder))
        return fuzz_all(
            {name: targets[name] for name in options.formats or targets}, options.minutes
        )


if __name__ == "__main__":
    sys.exit(main())
