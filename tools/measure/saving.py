"""The cost of checkpoints in a run of `tiny`: its steps after a save, and the others.

    python tools/measure/saving.py --out /tmp/saving --steps 3000

The weights are copied between two steps and written while the next ones compute. So the cost of a
checkpoint is the time of the `AFTER` steps after it, minus that of as many later ones. Both are of
the same seconds, which two runs are not. Prints the median share of time over checkpoints, and its
quartiles.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

EVERY, AFTER = 100, 20


def run(out: Path, steps: int) -> list[float]:
    """The seconds of the run at the end of each step."""
    shutil.rmtree(out, ignore_errors=True)
    sizes = ["--steps", str(steps), "--eval-every", str(steps), "--save-every", str(EVERY)]
    command = [sys.executable, "-m", "gptc", "train", "--data", "stories", *sizes]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    found = {record["step"]: record["elapsed_s"] for record in records if "train_loss" in record}
    return [found[step] for step in range(1, steps + 1)]


def shares(ends: Sequence[float]) -> list[float]:
    """Of each checkpoint that steps follow: its seconds, as a share of those up to the next one."""
    found = []
    for first in range(EVERY - 1, len(ends) - EVERY, EVERY):
        after = ends[first + AFTER] - ends[first]
        rest = ends[first + EVERY] - ends[first + AFTER]
        found.append((after - rest * AFTER / (EVERY - AFTER)) / (after + rest))
    return found


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the run, emptied")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    if options.steps < 3 * EVERY:
        parser.error(f"--steps is {options.steps}; it must be at least {3 * EVERY}")
    found = shares(run(options.out, options.steps))
    low, middle, high = statistics.quantiles(found, n=4)
    print(
        f"{len(found)} checkpoints: {middle:.1%} of the time of {EVERY} steps, in the median "
        f"({low:.1%} to {high:.1%})"
    )


if __name__ == "__main__":
    main()
