"""Jobs of three ranks, one of which is killed at random.

    python tools/attack/ranks.py --jobs 20

Each job has to end within the time that a lost rank may be silent, with its newest checkpoint
whole. Two ranks then continue the run to its end. Jobs take turns: with a whole optimizer state, a
sharded one, and DiLoCo.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptc.checkpoint.find import find_checkpoint, open_checkpoint
from gptc.checkpoint.names import list_checkpoints, step_of
from gptc.convert.verify import verify

TIMEOUT_S = 60  # of silence: a loaded machine may take seconds to write a checkpoint
STEPS, SAVE_EVERY = 120, 5
Job = subprocess.Popen[bytes]
_WAYS: dict[str, list[str]] = {
    "whole state": [],
    "--zero 1": ["--zero", "1"],
    "--sync-every 5": ["--sync-every", "5"],
}
_MPIRUN = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]
_GRACE_S = 30  # to end processes, on a machine that others use
_STALL_S = 300  # without a new checkpoint; no limit on a whole job, since machines differ


def main() -> None:
    """Runs the jobs and prints counts; exits with 1 for a failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=20, help="number of jobs")
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    losses: dict[str, list[float]] = {way: [] for way in _WAYS}
    slowest, n_saving = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for job in range(args.jobs):
            run = Path(folder) / f"run-{job}"
            way = list(_WAYS)[job % len(_WAYS)]
            seconds, saving = kill_one(run, folder, rng, _WAYS[way])
            slowest, n_saving = max(slowest, seconds), n_saving + saving
            losses[way].append(finish(run))
            shutil.rmtree(run)
            print(f"job {job}, {way}: ended after {seconds:.1f} s", file=sys.stderr, flush=True)
    print(
        f"{args.jobs} jobs, {n_saving} killed while a checkpoint was written: the slowest ended "
        f"after {slowest:.1f} s"
    )
    for way, found in losses.items():
        if found:
            print(f"  {way}: final losses {min(found):.4f} to {max(found):.4f}")


def kill_one(run: Path, folder: str, rng: random.Random, more: list[str]) -> tuple[float, bool]:
    """Kills a rank of three; seconds until all are gone, and if a checkpoint was written then."""
    options = {
        "data": text(folder), "tokenizer": "bytes", "preset": "tiny", "n-layer": 1, "n-embd": 32,
        "n-head": 2, "n-ff": 48, "seq-len": 32, "batch-size": 6, "steps": STEPS,
        "eval-every": SAVE_EVERY, "save-every": SAVE_EVERY,
        "eval-batches": 2, "threads": 1, "device": "cpu", "dtype": "fp32", "lr": 1e-3,
        "comm-timeout": TIMEOUT_S, "out": run,
    }  # fmt: skip
    command = [*_MPIRUN, "-n", "3", sys.executable, "-m", "gptc", "train"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += more
    complaints = Path(folder) / "stderr"
    with complaints.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, stdout=subprocess.DEVNULL)
    # At a random moment between two checkpoints, by the time that they take here.
    step = SAVE_EVERY * rng.randrange(1, STEPS // SAVE_EVERY // 2)
    wait_for_step(run, step, process, complaints)
    since = time.monotonic()
    wait_for_step(run, step + SAVE_EVERY, process, complaints)
    time.sleep(rng.random() * (time.monotonic() - since))
    victim = rng.choice(ranks_of(run))
    # Half of the kills wait for a checkpoint that is being written.
    waits = rng.random() < 0.5
    while waits and process.poll() is None and not list(run.glob(".*.tmp-*")):
        pass
    saving = bool(list(run.glob(".*.tmp-*")))
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    process.wait(timeout=TIMEOUT_S + _GRACE_S)
    while ranks_of(run):
        if time.monotonic() - began > TIMEOUT_S + _GRACE_S:
            raise SystemExit(f"{run}: ranks are left")
        time.sleep(0.02)
    verify(find_checkpoint(run))
    return time.monotonic() - began, saving


def wait_for_step(run: Path, step: int, process: Job, complaints: Path) -> None:
    """Until the run has a checkpoint of this step, or a later one."""
    newest, since = -1, time.monotonic()
    while newest < step:
        found = newest_step(run)
        if found > newest:
            newest, since = found, time.monotonic()
        if process.poll() is not None:
            raise SystemExit(
                f"{run}: the job ended by itself at step {newest} with {process.returncode}: "
                f"{complaints.read_text()}"
            )
        if time.monotonic() - since > _STALL_S:
            raise SystemExit(f"{run}: no step after {newest} for {_STALL_S} s{states(run)}")
        time.sleep(0.02)


def newest_step(run: Path) -> int:
    """That of the newest checkpoint; -1 if there is none."""
    return max((step_of(found) for found in list_checkpoints(run)), default=-1)


def states(run: Path) -> str:
    """What the processes of a run are doing, for a report."""
    lines = []
    for pid in ranks_of(run):
        for task in Path(f"/proc/{pid}/task").iterdir():
            state = (task / "stat").read_text().rpartition(")")[2].split()
            where = (task / "wchan").read_text()
            lines.append(f"\n  process {pid}, thread {task.name}: {state[0]}, in {where}")
    return "".join(lines)


def ranks_of(run: Path) -> list[int]:
    """The processes of a run's ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            if arguments[0] == sys.executable.encode() and str(run).encode() in arguments:
                found.append(int(entry.name))
    return found


def finish(run: Path) -> float:
    """Two ranks continue the run; the final validation loss."""
    step = open_checkpoint(run).trainer()["step"]
    command = [
        *_MPIRUN,
        "-n",
        "2",
        sys.executable,
        "-m",
        "gptc",
        "train",
        "--resume",
        str(run),
        "--json",
    ]
    printed, complaints = run.parent / "stdout", run.parent / "stderr"
    with printed.open("w") as out, complaints.open("w") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
    newest, since = step, time.monotonic()
    while process.poll() is None:
        if newest_step(run) > newest:
            newest, since = newest_step(run), time.monotonic()
        if time.monotonic() - since > _STALL_S:
            raise SystemExit(f"{run}: continued from {step}, stalled at {newest}{states(run)}")
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{run}: did not continue from step {step}: {complaints.read_text()}")
    summary = json.loads(printed.read_text())
    assert (summary["first_step"], summary["step"]) == (step, STEPS), summary
    return float(summary["val_loss"])


def text(folder: str) -> str:
    """A text that a small model can learn."""
    path, words = (
        Path(folder) / "fable.txt",
        ["the", "a", "king", "fox", "bear", "ran", "sat", "under", "tree", "and", "."],
    )
    if not path.exists():
        path.write_text(" ".join(random.Random(5).choices(words, k=9000)))
    return str(path)


if __name__ == "__main__":
    main()
