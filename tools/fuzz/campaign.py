"""Millions of damaged files for every loader, in pieces whose counts add up.

    python tools/fuzz/campaign.py --minutes 60 --counts build/campaign.json

Formats and damage are those of fuzz.py. Each format has a slice of the time in turn, in another
process that reads one file after the other, thousands a second where a loader is fast. Counted for
each format are inputs, those read and refused, and the failures: crashes, hangs (more than 10 s of
CPU time), tracebacks, errors that are not one line, and more memory than twice the file and 200 MB.
The file of counts is read at the beginning and written after each slice, so a campaign continues
where it ended; another seed, in another file, gives other inputs. Failing files are kept there.

gptc tries a tokenizer's definition in another process before it uses it (tokenizer/trial.py). That
takes 0.2 s, so here the same trial runs in the process that reads, which may end: such a definition
counts as refused.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, TypeAlias

import fuzz
import peaks
from gptc.errors import GptcError
from gptc.files.whole import write_file
from gptc.tokenizer import libraries, trial
from model_files import Target
from mutate import mutator

HANG_SECONDS = 10
SPARE_BYTES = 200 << 20
_WAIT = 600  # seconds that a file may take on a busy machine, the process running
_MOST_KEPT = 10  # failing files of a format and outcome
FRESH = 3  # exit code of a process that shall be followed by one with less memory

Case: TypeAlias = Callable[[int], bytes]

OUTCOMES = ("read", "refused", "crashes", "hangs", "tracebacks", "long errors", "memory")
FAILURES = OUTCOMES[2:]


class Shared:
    """Numbers that a process leaves behind when it is killed."""

    _FIELDS = ("case", "trial", "done", *OUTCOMES)

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, mmap.PAGESIZE)

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("<q", self._bytes, 8 * self._FIELDS.index(name))[0])

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("<q", self._bytes, 8 * self._FIELDS.index(name), value)


class Failures:
    """The files that failed, each with a text that says how."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self._folder = folder
        self._name = name

    def keep(self, outcome: str, case: int, content: bytes, how: str) -> None:
        print(f"{self._name}: {outcome}, case {case}: {how.strip().splitlines()[-1]:.200}")
        sys.stdout.flush()
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self._name}-{outcome}-".replace(" ", "-")
        if len(list(self._folder.glob(f"{stem}*"))) < 2 * _MOST_KEPT:
            (self._folder / f"{stem}{case}").write_bytes(content)
            (self._folder / f"{stem}{case}.txt").write_text(how, errors="replace")


def read_cases(
    target: Target, mutate: Case, cases: range, until: float, at: Shared, failures: Failures
) -> None:
    """Reads cases until the time `until`; counts each as soon as it ends."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.sync = os.fsync = lambda *_: None  # the files are in memory, and others use the disk
    _try_here(at)
    file = os.open(target.file, os.O_WRONLY)
    n_bytes = os.fstat(file).st_size
    base = peaks.resident()
    gc.freeze()  # what is there stays, and no collection looks at it
    for case in cases:
        if time.monotonic() > until:
            return
        at["case"] = case
        content = mutate(case)
        os.pwrite(file, content, 0)
        if len(content) < n_bytes:
            os.ftruncate(file, len(content))
        n_bytes = len(content)
        peaks.forget_peak()  # of the damage, and of the case before it
        signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
        try:
            target.read()
            outcome = "read"
        except GptcError as error:
            outcome, said = "refused", str(error)
            if not said or "\n" in said or "\r" in said:
                outcome = "long errors"
                failures.keep(outcome, case, content, repr(said))
        except BaseException:
            outcome = "tracebacks"
            failures.keep(outcome, case, content, traceback.format_exc())
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = peaks.peak() - base
        if peak > 2 * len(content) + SPARE_BYTES:
            at["memory"] += 1
            at["done"] = case + 1
            failures.keep("memory", case, content, f"{peak:,} bytes")
            os._exit(FRESH)
        at[outcome] += 1
        at["done"] = case + 1


def _try_here(at: Shared) -> None:
    """Replaces the processes in which definitions are tried and templates rendered."""

    def tried(library: str, definition: bytes) -> str | None:
        at["trial"] = 1
        try:
            encode: Callable[[str], Any] = trial._ENCODERS[library](definition)
            for text in trial._texts():
                if len(encode(text)) > trial._MOST_IDS * (len(text.encode()) + 1):
                    return "too many tokens"
        except BaseException as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        finally:
            at["trial"] = 0
            peaks.forget_peak()  # the other process has its own
        return None

    def record(library: str, definition: bytes) -> Any:
        digest = sha256(library.encode() + definition).digest()
        return SimpleNamespace(is_file=lambda: digest in known)

    def remember(library: str, definition: bytes) -> None:
        known.add(sha256(library.encode() + definition).digest())

    known: set[bytes] = set()
    libraries._tried = tried
    libraries._record = record
    libraries.remember = remember


def slice_of(
    name: str, target: Target, cases: range, seed: int, seconds: float, kept: Path | None
) -> tuple[int, dict[str, int]]:
    """Runs cases, in order, for some time: the next case, and the counts."""
    original, at, failures = target.file.read_bytes(), Shared(), Failures(kept, name)
    structured = mutator(target.structure, original)
    at["done"] = cases.start
    until = time.monotonic() + seconds

    def mutate(case: int) -> bytes:
        return structured(Random(f"{seed} {name} {case}"))

    while time.monotonic() < until and at["done"] < cases.stop:
        at["trial"] = 0
        child = os.fork()
        if not child:
            try:
                _silence()
                rest = range(at["done"], cases.stop)
                read_cases(target, mutate, rest, until, at, failures)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = _end_of(child, at)
        target.file.write_bytes(original)
        if code in (0, FRESH):
            continue
        case = at["case"]
        if at["trial"]:  # which is in another process, when gptc reads
            outcome = "refused"
        else:
            outcome = "hangs" if code in (-signal.SIGPROF, -signal.SIGKILL) else "crashes"
            failures.keep(outcome, case, mutate(case), f"exit code {code}")
        at[outcome] += 1
        at["done"] = case + 1
    return at["done"], {outcome: at[outcome] for outcome in OUTCOMES}


def _silence() -> None:
    """Sends what libraries print to nowhere, and keeps standard output for failures."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def _end_of(child: int, at: Shared) -> int:
    """The exit code of a process, which is killed when a case takes far too long."""
    case, waited = at["case"], 0.0
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
        waited = waited + 0.05 if at["case"] == case else 0.0
        case = at["case"]
        if waited > _WAIT:
            os.kill(child, signal.SIGKILL)


# ---- counts ----


def added(old: dict[str, int], new: dict[str, int]) -> dict[str, int]:
    """The sums of two formats' counts, with the number of inputs."""
    sums = {outcome: old.get(outcome, 0) + new.get(outcome, 0) for outcome in OUTCOMES}
    return {"inputs": sum(sums.values()), **sums}


def in_all(counts: dict[str, dict[str, int]]) -> dict[str, int]:
    """The sums of all formats."""
    sums: dict[str, int] = {}
    for one in counts.values():
        sums = added(sums, one)
    return sums


def _children_s() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1, help="total time, for all formats")
    parser.add_argument("--slice", type=float, default=5, help="seconds of a format at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--formats", nargs="*")
    parser.add_argument("--cases", type=int, default=10**12, help="largest number per format")
    parser.add_argument("--counts", type=Path, help="JSON file of counts, to be continued")
    options = parser.parse_args()
    path: Path | None = options.counts
    known = json.loads(path.read_bytes()) if path and path.exists() else {}
    if other := {one["seed"] for one in known.values()} - {options.seed}:
        parser.error(f"{path} has counts of the seed {other.pop()}: give it, or another file")
    end, shared = time.monotonic() + 60 * options.minutes, Path("/dev/shm")
    kept = path.with_suffix(".failures") if path else None
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        found = fuzz.targets(Path(folder))
        names = options.formats or list(found)
        n_read, began_s = 0, _children_s()
        while time.monotonic() < end and any(
            known.get(name, {}).get("next", 0) < options.cases for name in names
        ):
            for name in names:
                seconds = min(options.slice, end - time.monotonic())
                if seconds <= 0:
                    break
                before = known.get(name, {})
                cases = range(before.get("next", 0), options.cases)
                n_read -= before.get("inputs", 0)
                then, counts = slice_of(name, found[name], cases, options.seed, seconds, kept)
                known[name] = {"seed": options.seed, "next": then, **added(before, counts)}
                n_read += known[name]["inputs"]
                if path:
                    write_file(path, (json.dumps(known, indent=1) + "\n").encode())
    for name in names:
        print(name, json.dumps(known.get(name, {})))
    rate = n_read / max(_children_s() - began_s, 1e-3)
    print(f"{rate:,.0f} inputs for each CPU second")
    print("in all", json.dumps(in_all(known)))
    return 1 if any(in_all(known)[outcome] for outcome in FAILURES) else 0


if __name__ == "__main__":
    sys.exit(main())
