"""Compares ranks of one thread with one process of as many threads, on the same steps.

    python tools/measure/ranks.py --turns 3 --under "chrt -f 20"

Both train GPT-2 (124M) in fp32 by gptc's training loop, in turn: `--batch-size` sequences of
`--seq-len` tokens a rank and step. The ranks talk over shared memory, by the MPI that mpirun
belongs to, or with `--starter torchrun` by sockets. A line has the seconds of the fastest step in
each turn, the last line medians, and the tokens a second of the ranks as a share of those of the
process. With real-time priority (chrt -f) a rank's thread that exchanges sums gets a higher one: it
would else wait for the one that computes, which it interrupts where priorities are usual.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from gptc.engine.world import join
from gptc.training.run import train

SKIPPED = 1  # steps before those that count: memory is touched for the first time
_MARK = "step ends: "


def be_a_rank(options: dict[str, Any], steps: int) -> None:
    """Trains; rank 0 prints when its steps have ended. No checkpoint is written."""
    ends: list[float] = []

    def note(step: int, model: object) -> None:
        ends.append(time.monotonic())
        if len(ends) == 1 and join().size > 1:
            let_others_interrupt()
        if len(ends) < steps:
            return
        if not join().rank:
            print(_MARK + json.dumps(ends), flush=True)
        join().gather(b"")  # no rank leaves before another has ended its step
        os._exit(0)

    train(options, on_step=note)


def let_others_interrupt() -> None:
    """Raises all threads of a real-time process but the one that computes."""
    if os.sched_getscheduler(0) != os.SCHED_FIFO:
        return
    higher = os.sched_param(os.sched_getparam(0).sched_priority + 1)
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != os.getpid():
            os.sched_setscheduler(int(task.name), os.SCHED_FIFO, higher)


def step_seconds(command: list[str], options: dict[str, Any], env: dict[str, str]) -> float:
    """The fastest of a run's steps: other programs only make them longer."""
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps({**options, "out": f"{folder}/run"})
        ran = subprocess.run([*command, given], env=env, capture_output=True, text=True)
    found = [line for line in ran.stdout.splitlines() if line.startswith(_MARK)]
    if not found:
        raise SystemExit(f"{shlex.join(command)}: {ran.stderr}")
    ends = json.loads(found[0][len(_MARK) :])
    return min(b - a for a, b in pairwise(ends[SKIPPED - 1 :]))


def several(starter: str, ranks: int, rank: list[str]) -> list[str]:
    """The command of a job; `rank` is that of each rank."""
    if starter == "mpirun":
        options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        return ["mpirun", *options, "-n", str(ranks), *rank]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one = "RANK=$r LOCAL_RANK=$r " + shlex.join(rank)
    script = f'r=0; while [ $r -lt {ranks} ]; do {one} "$@" & r=$((r + 1)); done; wait'
    job = [f"WORLD_SIZE={ranks}", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}"]
    return ["env", *job, "sh", "-c", script, "sh"]


def main() -> None:
    """Prints a table; exits with 1 where the ranks are slower than --least says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--starter", default="mpirun", choices=("mpirun", "torchrun"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a run, with the first")
    parser.add_argument("--pause", type=float, default=0, help="seconds between runs")
    parser.add_argument("--under", default="", help="a command before each run")
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a rank")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--least", type=float, default=0.95, help="share that is enough")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        be_a_rank(json.loads(asked.rank), asked.steps)
        return
    shared = {
        "data": "stories", "tokenizer": asked.tokenizer, "preset": asked.preset,
        "batch_size": asked.batch_size * asked.ranks, "grad_accum": 1, "seq_len": asked.seq_len,
        "steps": 1000, "eval_every": 1000, "save_every": 1000, "sample_every": 0,
        "device": "cpu", "dtype": "fp32",
    }  # fmt: skip
    rank = [sys.executable, str(Path(__file__).resolve()), "--steps", str(asked.steps), "--rank"]
    under, env = shlex.split(asked.under), dict(os.environ)
    found: dict[str, list[float]] = {"process": [], "ranks": []}
    n_tokens = asked.batch_size * asked.ranks * asked.seq_len
    print(f"{asked.ranks} ranks, {n_tokens} tokens a step: process s, ranks s, ranks / process")
    for turn in range(asked.turns):
        for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
            alone = name == "process"
            command = rank if alone else several(asked.starter, asked.ranks, rank)
            options = {**shared, "threads": asked.ranks if alone else 1}
            found[name].append(step_seconds([*under, *command], options, env))
            time.sleep(asked.pause)
        last = [found[name][-1] for name in found]
        print(f"  {last[0]:8.3f} {last[1]:8.3f} {last[0] / last[1]:8.1%}", flush=True)
    medians = [statistics.median(times) for times in found.values()]
    share = statistics.median(a / b for a, b in zip(*found.values(), strict=True))
    rates = ", ".join(f"{n_tokens / s:.0f}" for s in medians)
    print(f"  {medians[0]:8.3f} {medians[1]:8.3f} {share:8.1%}  (tokens/s: {rates})")
    sys.exit(share < asked.least)


if __name__ == "__main__":
    main()
