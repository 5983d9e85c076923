"""Measures `gptc prepare` on a text: throughput, its share of tiktoken's, and peak memory.

    python tools/measure/prepare.py text.txt [jobs [tokenizer ...]]

Runs alternate, and the best of each counts. The disk's write speed is printed too, since the bytes
tokenizer writes two bytes for each that it reads: "cached" through the page cache, "write" with
pages dropped as the file grows, as for shards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLE_BYTES = 64 << 20
ROUNDS = 3

CHILD = """
import json, sys, time
from pathlib import Path
from gptc.data import prepare
begin = time.perf_counter()
prepare([sys.argv[1]], Path(sys.argv[2]), tokenizer=sys.argv[3], jobs=int(sys.argv[4]))
seconds = time.perf_counter() - begin
peak = next(s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
print(json.dumps({"seconds": seconds, "peak_mb": int(peak.split()[1]) / 1000}))
"""


def prepared(source: Path, tokenizer: str, jobs: int) -> tuple[float, float]:
    """MB/s and the peak memory in MB of one preparation in a separate process."""
    with tempfile.TemporaryDirectory(dir=source.parent) as work:
        command = [sys.executable, "-c", CHILD, str(source), f"{work}/out", tokenizer, str(jobs)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return source.stat().st_size / told["seconds"] / 1e6, told["peak_mb"]


def written(source: Path, leaves: bool) -> float:
    """MB/s at which a new file is written to disk; if it `leaves`, its cached pages are dropped."""
    with tempfile.TemporaryDirectory(dir=source.parent) as work, Path(work, "f").open("wb") as file:
        block = bytes(1 << 20)
        begin = time.perf_counter()
        for i in range(1000):
            file.write(block)
            if leaves and i % 16 == 15:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.fsync(file.fileno())
        return 1000 * len(block) / (time.perf_counter() - begin) / 1e6


def main() -> None:
    import tiktoken

    source = Path(sys.argv[1])
    n_jobs = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    tokenizers = sys.argv[3:] or ["bytes", "gpt2"]
    with source.open("rb") as file:
        text = file.read(SAMPLE_BYTES).decode(errors="ignore")
    encoding = tiktoken.get_encoding("gpt2")
    best: dict[str, float] = {}
    peaks: dict[str, float] = {}

    def note(name: str, rate: float, peak: float = 0.0) -> None:
        best[name], peaks[name] = max(best.get(name, 0), rate), max(peaks.get(name, 0), peak)

    for _ in range(ROUNDS):
        begin = time.perf_counter()
        encoding.encode_ordinary(text)
        note("tiktoken", len(text.encode()) / (time.perf_counter() - begin) / 1e6)
        note("cached", written(source, leaves=False))
        note("write", written(source, leaves=True))
        for tokenizer in tokenizers:
            if tokenizer != "gpt2":
                note(tokenizer, *prepared(source, tokenizer, n_jobs))
                continue
            for jobs in (1, n_jobs):
                note(f"gpt2, {jobs} job{'s' * (jobs > 1)}", *prepared(source, "gpt2", jobs))
    for name, rate in best.items():
        share = ""
        if name.startswith("gpt2"):
            ideal = best["tiktoken"] * int(name.split()[1])
            share = f"{rate / ideal:6.0%} of tiktoken alone x jobs"
        print(f"{name:<14}{rate:8.1f} MB/s  peak {peaks[name]:5.0f} MB  {share}")


if __name__ == "__main__":
    main()
