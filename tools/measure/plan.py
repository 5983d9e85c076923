"""The plan of a run against the run: memory and time of six configurations.

    python tools/measure/plan.py --out /tmp/plans

Each is a process of `gptc plan --json`, then one of `gptc train --json`. Writes a Markdown table.
The time is that of the whole process of `gptc train`, from its start to its end.
With --memory, runs are of four steps, and the table has the memory alone.
On a machine that does other work too, times differ by that work. With --cpu, the plan and the run
have one thread, and CPU seconds in place of the clock. With --pairs N, the parts of a
step as the plan times them and N steps as the run has them alternate in one process of one thread,
and the table has the medians of their CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from gptc.engine.optim import AdamW, Muon
from gptc.training.progress import SilentProgress
from gptc.training.resolve import new_options
from gptc.training.setup import set_up
from gptc.training.trainer import Trainer

CONFIGURATIONS = {
    "`tiny`, 800 steps": ["--steps", "800"],
    "`modern`, 400 steps": ["--preset", "modern", "--steps", "400"],
    "`byte`, 4 x 256": [
        *("--preset", "byte", "--seq-len", "256", "--batch-size", "4"),
        *("--steps", "4", "--eval-every", "4", "--eval-batches", "2"),
    ],
    "`gpt2`, 1 x 256 x 2": [
        *("--preset", "gpt2", "--seq-len", "256", "--batch-size", "1", "--grad-accum", "2"),
        *("--steps", "8", "--eval-every", "8", "--eval-batches", "4"),
    ],
    "`llama-15m`, recomputed": [
        *("--preset", "llama-15m", "--recompute", "block", "--seq-len", "256"),
        *("--tokens-per-step", "4096", "--steps", "6", "--eval-every", "3", "--eval-batches", "4"),
    ],
    "`tiny`, one minute": ["--minutes", "1"],
}


# gptc, by whose clock only the time counts that it has the CPU.
CPU_CLOCK = """
import time
time.perf_counter = time.process_time
from gptc.files import process
process.age_s = time.process_time
from gptc.cli import main
main()
"""


def gptc(*arguments: str, cpu: bool = False) -> dict[str, Any]:
    """The JSON of a command."""
    start = ["-c", CPU_CLOCK] if cpu else ["-m", "gptc"]
    command = [sys.executable, *start, *arguments, "--json"]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    return found


def children_s() -> float:
    """CPU seconds of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


SHORT = ["--steps", "4", "--eval-every", "2", "--eval-batches", "1", "--minutes", "60"]


def memory_row(name: str, arguments: list[str], out: Path) -> str:
    """The row of a configuration whose run has only a few steps, with the memory alone."""
    shutil.rmtree(out, ignore_errors=True)
    given = ["--data", "stories", *arguments, *SHORT, "--out", str(out)]
    planned = gptc("plan", *given)["planned_peak_bytes"]
    peak = gptc("train", *given)["peak_resident_bytes"]
    return f"| {name} | {planned / 1e6:.1f} | {peak / 1e6:.1f} | {peak / planned - 1:+.1%} |"


def row(name: str, arguments: list[str], out: Path, cpu: bool) -> str:
    """The table's row of a configuration."""
    shutil.rmtree(out, ignore_errors=True)
    given = ["--data", "stories", *arguments, "--out", str(out)]
    given += ["--threads", "1"] if cpu else []
    clock = children_s if cpu else time.perf_counter
    plan = gptc("plan", *given, cpu=cpu)
    begin = clock()
    run = gptc("train", *given, cpu=cpu)
    seconds, expected = clock() - begin, plan["seconds"]
    peak, planned = run["peak_resident_bytes"], plan["planned_peak_bytes"]
    return (
        f"| {name} | {plan['n_params']:,} | {plan['flops_per_token'] / 1e6:.1f} | "
        f"{planned / 1e6:.0f} | {peak / 1e6:.0f} | {peak / planned - 1:+.1%} | "
        f"{plan['steps']:,} | {run['step']:,} | {expected:.1f} | {seconds:.1f} | "
        f"{seconds / expected - 1:+.1%} |"
    )


def pairs_row(name: str, arguments: list[str], out: Path, n: int) -> str:
    """The row of a configuration whose plan and run are compared in CPU seconds, step by step."""
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    limits = {"--steps": "1000", "--minutes": None}
    given = {k: v for k, v in (given | limits).items() if v is not None} | {"--threads": "1"}
    values = {
        name[2:].replace("-", "_"): int(value) if value.isdigit() else value
        for name, value in given.items()
    }
    with closing(set_up(new_options({**values, "out": str(out)}), None, SilentProgress())) as setup:
        trainer, model, options = Trainer(setup, SilentProgress(), out), setup.model, setup.options
        adamw = AdamW(options.lr, options.beta1, options.beta2, options.eps, 0.0, options.grad_clip)
        muon = Muon(options.lr, options.momentum, 0.0, options.grad_clip)
        parts: list[list[float]] = [[], [], []]

        def one_pass() -> None:
            rows = setup.loader.next_rows()
            model.backward(rows.inputs, rows.targets, positions=rows.positions)

        calls: tuple[Callable[[], object], ...] = (
            one_pass,
            lambda: model.update(adamw, muon),
            lambda: trainer.step(lambda: None),
        )
        for i in range(n + 2):  # two to find memory and caches
            for call, found in zip(calls, parts, strict=True):
                begin = time.process_time()
                call()
                if i >= 2:
                    found.append(1e3 * (time.process_time() - begin))
    passed, updated, step = map(median, parts)
    planned = options.grad_accum * passed + updated
    return (
        f"| {name} | {passed:.1f} | {updated:.2f} | {planned:.1f} | {step:.1f} | "
        f"{step / planned - 1:+.1%} |"
    )


def main() -> None:
    """Prints the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, emptied")
    parser.add_argument("--only", help="one configuration by a part of its name")
    parser.add_argument("--memory", action="store_true", help="memory alone, of runs of 4 steps")
    parser.add_argument("--cpu", action="store_true", help="one thread, and its CPU seconds")
    parser.add_argument("--pairs", type=int, metavar="N", help="CPU seconds of N steps, in pairs")
    options = parser.parse_args()
    if options.pairs:
        print("| run | ms a pass | ms an update | ms planned a step | ms a step | off |")
        print("|" + " --- |" * 6)
        for i, (name, arguments) in enumerate(CONFIGURATIONS.items()):
            if options.only is None or options.only in name:
                print(
                    pairs_row(name, arguments, options.out / f"run-{i}", options.pairs), flush=True
                )
        return
    if options.memory:
        print("| run | MB planned | MB peak | off |\n| --- | --- | --- | --- |")
        for i, (name, arguments) in enumerate(CONFIGURATIONS.items()):
            if options.only is None or options.only in name:
                print(memory_row(name, arguments, options.out / f"run-{i}"), flush=True)
        return
    heads = "run, parameters, MFLOP per token, MB planned, MB peak, off, steps planned, steps"
    print(f"| {heads.replace(', ', ' | ')} | s planned | s | off |")
    print("|" + " --- |" * 11)
    for i, (name, arguments) in enumerate(CONFIGURATIONS.items()):
        if options.only is None or options.only in name:
            print(row(name, arguments, options.out / f"run-{i}", options.cpu), flush=True)


if __name__ == "__main__":
    main()
