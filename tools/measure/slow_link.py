"""Compares gptc plan's steps of two ranks with measured ones, over a link of a known rate.

    sudo env PATH="$PATH" python tools/measure/slow_link.py --link 100M

Two network namespaces are joined by a pair of virtual cards, whose rate `tc tbf` limits. mpirun of
Open MPI starts a rank of one thread in each. Needs root, `ip`, `tc`, and a core for each rank.
Exits with 1 if a step differs from the plan by more than --within.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

RATES = {"100M": "100mbit", "1G": "1gbit"}
LATENCY_US = 100  # of two TCP sockets of this machine
SPACES, ADDRESSES = ("gptc-a", "gptc-b"), ("10.77.0.1", "10.77.0.2")
WAYS: dict[str, list[str]] = {
    "data parallel": [],
    "ZeRO-1": ["--zero", "1"],
    "DiLoCo": ["--sync-every", "10"],
}
SKIPPED, STEPS = 5, 25  # steps before those that count, and those

_AGENT = f"""#!/bin/sh
# In place of ssh: host, then a command.
shift
exec ip netns exec {SPACES[1]} unshare --uts sh -c "hostname {SPACES[1]}; $*"
"""


def missing() -> str | None:
    """What this machine lacks; None if nothing."""
    for program in ("ip", "tc", "unshare", "prterun"):
        if not shutil.which(program):
            return program
    trial = "gptc-trial"
    if subprocess.run(["ip", "netns", "add", trial], capture_output=True).returncode:
        return "the right to make network namespaces (root)"
    run("ip", "netns", "del", trial)
    return None


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextmanager
def network(rate: str) -> Iterator[None]:
    """Two namespaces with a link of this rate (tc's notation) between them."""
    cards = [f"{name}-0" for name in SPACES]
    try:
        for name in SPACES:
            run("ip", "netns", "add", name)
        first = ["ip", "link", "add", cards[0], "netns", SPACES[0]]
        run(*first, "type", "veth", "peer", "name", cards[1], "netns", SPACES[1])
        for name, card, address in zip(SPACES, cards, ADDRESSES, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", card)
            for device in ("lo", card):
                run("ip", "-n", name, "link", "set", device, "up")
            limit = ["rate", rate, "burst", "64kb", "latency", "100ms"]
            run("tc", "-n", name, "qdisc", "add", "dev", card, "root", "tbf", *limit)
        yield
    finally:
        for name in SPACES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def mpirun(folder: Path) -> list[str]:
    """The start of a command of two ranks, one in each namespace; `folder` is for a script."""
    agent = folder / "agent"
    agent.write_text(_AGENT)
    agent.chmod(0o755)
    own = f'hostname {SPACES[0]}; exec "$@"'
    return [
        *["ip", "netns", "exec", SPACES[0], "unshare", "--uts", "sh", "-c", own, "sh"],
        *["mpirun", "--allow-run-as-root", "--bind-to", "none", "-n", "2"],
        *["--host", ",".join(f"{address}:1" for address in ADDRESSES)],
        *["--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", str(agent)],
        *["--prtemca", "prte_if_include", "10.77.0.0/24"],
        *["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"],
        *["--mca", "btl_tcp_if_include", "10.77.0.0/24"],
        *[part for name in ("PATH", "PYTHONPATH", "GPTC_LIBRARY") for part in ("-x", name)],
    ]


def measured(start: list[str], options: list[str], out: Path) -> float:
    """Seconds of a step: the median, or the mean of steps that differ (DiLoCo)."""
    command = [*start, sys.executable, "-m", "gptc", "train", *options, "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    at = [float(line["elapsed_s"]) for line in lines if "train_loss" in line][SKIPPED - 1 :]
    if "--sync-every" in options:
        return (at[20] - at[0]) / 20
    return statistics.median(b - a for a, b in pairwise(at))


def planned(options: list[str], link: str) -> dict[str, float]:
    """Seconds of a step in each way, by gptc plan."""
    command = [sys.executable, "-m", "gptc", "plan", *options, "--json", "--ranks", "2"]
    command += ["--link", link, "--latency", str(LATENCY_US)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return {m["name"]: m["step_s"] for m in json.loads(ran.stdout)["cluster"]["methods"]}


def main() -> None:
    """Prints a table; exits with 1 for a difference."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--link", default="100M", choices=RATES)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of both ranks")
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--within", type=float, default=0.15, help="allowed relative difference")
    asked = parser.parse_args()
    if lacks := missing():
        raise SystemExit(f"this needs {lacks}")
    options = [
        *["--data", "stories", "--tokenizer", "bytes", "--preset", "tiny", "--seq-len", "128"],
        *["--n-layer", str(asked.n_layer), "--n-embd", str(asked.n_embd), "--n-head", "4"],
        *["--batch-size", str(asked.batch_size), "--steps", str(SKIPPED + STEPS)],
        *["--eval-every", "1000", "--threads", "1", "--device", "cpu", "--dtype", "fp32"],
    ]
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        print(f"a step of two ranks over {asked.link}, {LATENCY_US} us:  planned  measured")
        for name, more in WAYS.items():
            plan_s = planned([*options, *more], asked.link)[name]
            with network(RATES[asked.link]):
                start = mpirun(Path(folder))
                found_s = measured(start, [*options, *more], Path(folder) / "run")
            shutil.rmtree(Path(folder) / "run")
            off = plan_s / found_s - 1
            wrong |= abs(off) > asked.within
            print(f"{name:<36} {plan_s:>8.3f} {found_s:>8.3f} s  {off:+.0%}", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
