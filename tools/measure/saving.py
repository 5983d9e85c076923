"""The cost of checkpoints: runs of `tiny` with and without --save-every 100, in turn.

    python tools/measure/saving.py --out /tmp/saving --pairs 5

Prints the tokens per second of each pair and the median of their ratios. The CPU seconds of the
process hold on a machine that does other work too; the rates do not.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path


def run(out: Path, steps: int, save_every: int) -> tuple[float, float]:
    """Tokens per second of the steps with their saves, and CPU seconds of the process."""
    shutil.rmtree(out, ignore_errors=True)
    sizes = ["--steps", str(steps), "--eval-every", str(steps), "--save-every", str(save_every)]
    command = [sys.executable, "-m", "gptc", "train", "--data", "stories", *sizes, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(ran.stdout)
    # Without the last evaluation and checkpoint, which both runs have.
    elapsed_s = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["elapsed_s"]
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found["tokens"] / elapsed_s, cpu_s


def main() -> None:
    """Prints a line a pair, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, emptied")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    rates, times = [], []
    for _ in range(options.pairs):
        saving, saving_s = run(options.out, options.steps, 100)
        without, without_s = run(options.out, options.steps, options.steps)
        rates.append(saving / without)
        times.append(saving_s / without_s)
        print(
            f"{saving:,.0f} and {without:,.0f} tokens/s ({rates[-1] - 1:+.1%}), "
            f"{saving_s:.1f} and {without_s:.1f} CPU s ({times[-1] - 1:+.1%})",
            flush=True,
        )
    print(
        f"median: rate {statistics.median(rates) - 1:+.1%}, CPU {statistics.median(times) - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
