"""Compares gptc plan's steps of several ranks with measured ones, over a link of a known rate.

    sudo env PATH="$PATH" python tools/measure/slow_link.py --link 100M --ranks 4 --latency 20ms

Each rank of one thread is in a network namespace, with a virtual card whose rate `tc tbf` limits.
Two of them are joined directly; more, or with a latency, by relay.py. mpirun of Open MPI starts
them. Needs root, `ip` and `tc`. Where ranks outnumber cores, as many processes make the plan on a
core as there are ranks on one. Exits with 1 if a step differs from the plan by more than --within.

`--real-time` is for a machine that others use: ranks and plans come before other processes, and the
threads of ranks that exchange numbers before those that compute, so that one runs when it wakes. It
repeats the comparison with --turns, and shows medians.

With `--apart 50` it compares DiLoCo's steps over the link with those over shared memory instead,
and exits with 1 if they have less than 85 % of the speed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import relay

RATES = {"100M": "100mbit", "1G": "1gbit"}
OWN_LATENCY_S = 1e-4  # of two TCP sockets of this machine
CARD = "card"
WAYS: dict[str, list[str]] = {
    "data parallel": [],
    "ZeRO-1": ["--zero", "1"],
    "DiLoCo": ["--sync-every", "10"],
}
SKIPPED, STEPS = 5, 25  # steps before those that count, and those
LEAST_SPEED = 0.85  # of DiLoCo over a slow link
COMPUTES, EXCHANGES = 20, 25  # priorities of threads with --real-time
LIFT_S = 0.5  # after which new threads have theirs


def space(rank: int | str) -> str:
    """The name of a namespace, and of the host in it; those of other processes have others."""
    return f"gptc-{os.getpid()}-{rank}"


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def missing() -> str | None:
    """What this machine lacks; None if nothing."""
    for program in ("ip", "tc", "unshare", "taskset", "prterun"):
        if not shutil.which(program):
            return program
    trial = space("trial")
    if subprocess.run(["ip", "netns", "add", trial], capture_output=True).returncode:
        return "the right to make network namespaces (root)"
    run("ip", "netns", "del", trial)
    return None


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextmanager
def network(rate: str, ranks: int = 2, latency_s: float = 0.0) -> Iterator[None]:
    """A namespace for each rank, with links of this rate (tc's notation) between them."""
    switch = None
    hub, ports = space("hub"), [f"port{rank}" for rank in range(ranks)]
    has_hub = ranks > 2 or latency_s > 0
    spaces = [space(rank) for rank in range(ranks)]
    try:
        for name in [*spaces, hub]:
            run("ip", "netns", "add", name)
        if not has_hub:
            _join(spaces[0], CARD, spaces[1], CARD)
        for name, port in zip(spaces, ports if has_hub else (), strict=False):
            _join(name, CARD, hub, port)
            run("ip", "-n", hub, "link", "set", port, "up", "mtu", str(relay.MTU))
        for rank, name in enumerate(spaces):
            run("ip", "-n", name, "addr", "add", f"{address(rank)}/24", "dev", CARD)
            for device in ("lo", CARD):
                run("ip", "-n", name, "link", "set", device, "up")
            if has_hub:
                run("ip", "-n", name, "link", "set", CARD, "mtu", str(relay.MTU))
                code = f"import relay; relay.disable_offloading({CARD!r})"
                run("ip", "netns", "exec", name, *_python("-c", code))
            limit = ["rate", rate, "burst", "64kb", "latency", "100ms"]
            run("tc", "-n", name, "qdisc", "add", "dev", CARD, "root", "tbf", *limit)
        if has_hub:
            command = _python(relay.__file__, str(latency_s), *ports)
            switch = subprocess.Popen(
                ["ip", "netns", "exec", hub, *command], stdout=subprocess.PIPE, text=True
            )
            assert switch.stdout is not None
            if switch.stdout.readline() != "ready\n":
                raise SystemExit("relay.py does not start")
        yield
    finally:
        if switch is not None:
            switch.kill()
            switch.communicate()
        for name in [*spaces, hub]:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _join(first: str, card: str, second: str, other: str) -> None:
    """A pair of virtual cards in two namespaces."""
    pair = ["ip", "link", "add", card, "netns", first, "type", "veth"]
    run(*pair, "peer", "name", other, "netns", second)


def _python(*arguments: str) -> list[str]:
    here = Path(__file__).resolve().parent
    return ["env", f"PYTHONPATH={here}", sys.executable, *arguments]


def mpirun(folder: Path, ranks: int = 2) -> list[str]:
    """The start of a command of ranks, one in each namespace; `folder` is for a script."""
    agent = folder / "agent"
    cases = "".join(f"  {address(r)}) name={space(r)} ;;\n" for r in range(ranks))
    agent.write_text(
        f"""#!/bin/sh
# In place of ssh: host, then a command.
case "$1" in
{cases}esac
shift
exec ip netns exec $name unshare --uts sh -c "hostname $name; $*"
"""
    )
    agent.chmod(0o755)
    own = f'hostname {space(0)}; exec "$@"'
    return [
        *["ip", "netns", "exec", space(0), "unshare", "--uts", "sh", "-c", own, "sh"],
        *["mpirun", "--allow-run-as-root", "--bind-to", "none", "-n", str(ranks)],
        *["--host", ",".join(f"{address(rank)}:1" for rank in range(ranks))],
        *["--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", str(agent)],
        *["--prtemca", "prte_if_include", "10.77.0.0/24"],
        *["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"],
        *["--mca", "btl_tcp_if_include", "10.77.0.0/24"],
        *[part for name in ("PATH", "PYTHONPATH", "GPTC_LIBRARY") for part in ("-x", name)],
    ]


def under(real_time: bool) -> list[str]:
    return ["chrt", "-r", str(COMPUTES)] if real_time else []


def lift(out: Path) -> None:
    """Lets the threads of this run's ranks that do not compute come before those that do."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            arguments = entry.name.isdigit() and (entry / "cmdline").read_bytes().split(b"\0")
            if not arguments or arguments[:3] != [sys.executable.encode(), b"-m", b"gptc"]:
                continue
            if str(out).encode() in arguments:
                for thread in {int(task.name) for task in (entry / "task").iterdir()}:
                    if thread != int(entry.name):
                        os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(EXCHANGES))


def measured(start: list[str], options: list[str], out: Path, real_time: bool = False) -> float:
    """Seconds of a step: the median, or the mean of steps that differ (DiLoCo)."""
    command = [*start, *under(real_time), sys.executable, "-m", "gptc", "train", *options]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    complaints = None
    while complaints is None:
        with suppress(subprocess.TimeoutExpired):
            complaints = process.communicate(timeout=LIFT_S if real_time else None)[1]
        if real_time:
            lift(out)
    if process.returncode:
        raise SystemExit(complaints)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    at = [float(line["elapsed_s"]) for line in lines if "train_loss" in line][SKIPPED - 1 :]
    if "--sync-every" in options:
        n = (len(at) - 1) // 10 * 10
        return (at[n] - at[0]) / n
    return statistics.median(b - a for a, b in pairwise(at))


def planned(
    options: list[str], link: str, ranks: int, latency_s: float, real_time: bool = False
) -> dict[str, float]:
    """Seconds of a step in each way, by gptc plan: the mean of processes that share a core."""
    command = [*under(real_time), sys.executable, "-m", "gptc", "plan", *options, "--json"]
    command += ["--ranks", str(ranks)]
    command += ["--link", link, "--latency", str(1e6 * (latency_s + OWN_LATENCY_S))]
    cores = sorted(os.sched_getaffinity(0))
    n = math.ceil(ranks / len(cores))
    with tempfile.TemporaryDirectory() as folder:
        ran = [
            subprocess.Popen(
                ["taskset", "-c", str(cores[0]), *command, "--out", f"{folder}/{i}"],
                stdout=subprocess.PIPE, text=True,
            )
            for i in range(n)
        ]  # fmt: skip
        answers = [process.communicate()[0] for process in ran]
    if any(process.returncode for process in ran):
        raise SystemExit("gptc plan failed")
    found = [json.loads(answer)["cluster"]["methods"] for answer in answers]
    return {
        m["name"]: statistics.mean(f[i]["step_s"] for f in found) for i, m in enumerate(found[0])
    }


def apart(options: list[str], every: int, link: str, ranks: int, latency_s: float) -> bool:
    """Whether DiLoCo is fast enough over the link; prints both speeds."""
    steps = SKIPPED + 2 * every  # two outer steps count
    options = [*options, "--steps", str(steps), "--sync-every", str(every)]
    options[options.index("--eval-every") + 1] = str(20 * every)
    near = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    with tempfile.TemporaryDirectory() as folder:
        near_s = measured([*near, "-n", str(ranks)], options, Path(folder) / "near")
        with network(RATES[link], ranks, latency_s):
            far_s = measured(mpirun(Path(folder), ranks), options, Path(folder) / "far")
    print(f"{ranks} ranks, --sync-every {every}: {near_s:.3f} s a step over shared memory")
    print(f"{far_s:.3f} s over {link}, {1e3 * latency_s:g} ms: {near_s / far_s:.0%} of the speed")
    return near_s / far_s >= LEAST_SPEED


def seconds(text: str) -> float:
    """20ms, 50us or 1s."""
    for unit, size in {"ms": 1e-3, "us": 1e-6, "s": 1.0}.items():
        if text.endswith(unit):
            return float(text[: -len(unit)]) * size
    raise argparse.ArgumentTypeError(f"{text} has no unit: write 20ms")


def main() -> None:
    """Prints a table; exits with 1 for a difference."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--link", default="100M", choices=RATES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--latency", type=seconds, default=0.0, help="one way, as 20ms")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of all ranks")
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--within", type=float, default=0.15, help="allowed relative difference")
    parser.add_argument("--apart", type=int, help="steps between the outer steps of DiLoCo")
    parser.add_argument("--real-time", action="store_true", help="before other processes")
    parser.add_argument("--turns", type=int, default=1, help="comparisons, whose medians are shown")
    asked = parser.parse_args()
    if lacks := missing():
        raise SystemExit(f"this needs {lacks}")
    options = [
        *["--data", "stories", "--tokenizer", "bytes", "--preset", "tiny", "--seq-len", "128"],
        *["--n-layer", str(asked.n_layer), "--n-embd", str(asked.n_embd), "--n-head", "4"],
        *["--batch-size", str(asked.batch_size), "--steps", str(SKIPPED + STEPS)],
        *["--eval-every", "1000", "--threads", "1", "--device", "cpu", "--dtype", "fp32"],
    ]
    if asked.apart:
        sys.exit(not apart(options, asked.apart, asked.link, asked.ranks, asked.latency))
    wrong, how = False, (asked.ranks, asked.latency)
    with tempfile.TemporaryDirectory() as folder:
        how_named = f"{asked.ranks} ranks over {asked.link}, {1e3 * asked.latency:g} ms"
        print(f"{how_named:<36}  planned  measured")
        for name, more in WAYS.items():
            every = [*options, *more]
            plans, found = [], []
            for turn in range(asked.turns):
                plans.append(planned(every, asked.link, *how, asked.real_time)[name])
                out = Path(folder) / f"run-{turn}"
                with network(RATES[asked.link], *how):
                    start = mpirun(Path(folder), asked.ranks)
                    found.append(measured(start, every, out, asked.real_time))
                shutil.rmtree(out)
            plan_s, found_s = statistics.median(plans), statistics.median(found)
            off = plan_s / found_s - 1
            wrong |= abs(off) > asked.within
            print(f"{name:<36} {plan_s:>8.3f} {found_s:>8.3f} s  {off:+.0%}", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
