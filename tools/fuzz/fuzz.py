"""Feeds damaged files to every loader, which must read them or raise a GptcError.

    python tools/fuzz/fuzz.py --minutes 10                # all formats in turn
    python tools/fuzz/fuzz.py --formats gguf --cases 1000

A small valid file of each format is made, then damaged. The damage is a function of (seed, format,
case), so failures are reproducible: the error shows the command, and the file is kept. Failures are
other exceptions, more memory than twice the file's size plus 16 MB, and more than 5 CPU seconds.
For millions of cases there is campaign.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # files are read in forked processes

import adapter_files
import body_files
import chat_files
import data_files
import family_files
import model_files
import ngram_files
import packed_files
import peaks
import pickled_files
import row_files
import run_files
import tokenizer_files
from gptc.errors import GptcError
from model_files import Target
from mutate import mutator

with contextlib.suppress(ImportError):
    import torch  # noqa: F401  # takes seconds to import, which must not count for a file like its own

MAX_SECONDS = 5.0
SPARE_BYTES = 16 << 20


class Failed(Exception):
    """A loader crashed, or used too much time or memory."""


_PARTS = (
    model_files,
    tokenizer_files,
    data_files,
    chat_files,
    adapter_files,
    row_files,
    body_files,
    packed_files,
    pickled_files,
    run_files,
    ngram_files,
    family_files,
)


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each format, made in `folder`."""
    found = {}
    for part in _PARTS:
        below = folder / part.__name__
        below.mkdir()
        found |= part.targets(below)
    return found


def attempt(target: Target, content: bytes, traced: bool = True) -> str:
    """Reads a damaged file; returns "read" or "refused". Raises Failed with the reason.

    Traced, all memory counts. Else that which is resident does, in a third of the time.
    """
    target.file.write_bytes(content)
    traced = traced or not peaks.can_measure()
    before = 0
    if traced:
        tracemalloc.start()
    else:
        peaks.give_back()
        before = peaks.resident()
    begin_s = _cpu_s()
    try:
        target.read()
        outcome = "read"
    except GptcError as error:
        outcome = "refused"
        if "\n" in str(error) or not str(error):
            raise Failed(f"the error is not one line: {error}") from error
    except BaseException as error:
        raise Failed(traceback.format_exc()) from error
    finally:
        seconds = _cpu_s() - begin_s
        peak = tracemalloc.get_traced_memory()[1] if traced else peaks.peak() - before
        tracemalloc.stop()
    if seconds > MAX_SECONDS:
        raise Failed(f"took {seconds:.1f} s")
    if peak > 2 * len(content) + SPARE_BYTES:
        raise Failed(f"allocated {peak:,} bytes for a file of {len(content):,}")
    return outcome


def _cpu_s() -> float:
    """CPU seconds of this process and its children: others may use the machine."""
    return sum(os.times()[:4])


def fuzz(
    name: str, target: Target, cases: range, seed: int, until: float = 1e18, trace_every: int = 1
) -> Counter[str]:
    """Runs cases of a format, in order, until the time `until`; counts outcomes."""
    original = target.file.read_bytes()
    mutate = mutator(target.structure, original)
    counts: Counter[str] = Counter()
    try:
        for case in cases:
            content = mutate(Random(f"{seed} {name} {case}"))
            try:
                counts[attempt(target, content, case % trace_every == 0)] += 1
            except Failed as error:
                kept = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}-{case}"
                kept.write_bytes(content)
                again = f"--formats {name} --seed {seed} --first {case} --cases 1"
                raise Failed(
                    f"{error}\nagain: python tools/fuzz/fuzz.py {again}\nkept: {kept}"
                ) from None
            if time.monotonic() > until:
                break
    finally:
        target.file.write_bytes(original)
    return counts


def truncate(target: Target) -> Counter[str]:
    """Cuts a file at every byte."""
    original = target.file.read_bytes()
    try:
        return Counter(attempt(target, original[:n]) for n in range(len(original)))
    finally:
        target.file.write_bytes(original)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=0.5, help="total time, for all formats")
    parser.add_argument("--cases", type=int, default=10**9, help="largest number per format")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--formats", nargs="*")
    parser.add_argument("--truncate", action="store_true", help="cut files at every byte instead")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        found = targets(Path(folder))
        names = options.formats or list(found)
        cases = range(options.first, options.first + options.cases)
        for name in names:
            until = time.monotonic() + 60 * options.minutes / len(names)
            try:
                if options.truncate:
                    results[name] = dict(truncate(found[name]))
                    print(name, json.dumps(results[name]), flush=True)
                    continue
                results[name] = dict(fuzz(name, found[name], cases, options.seed, until))
            except Failed as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
            print(name, json.dumps(results[name]), flush=True)
    print("in all", sum(sum(counts.values()) for counts in results.values()), "cases, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
