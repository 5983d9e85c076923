"""Damaged files that the C library reads or computes with, for one that is built with sanitizers.

    cmake --preset asan && cmake --build --preset asan --target gpt
    python tools/attack/sanitized.py build/asan/libgpt.so --seconds 25

The files are those of tools/fuzz/campaign.py, and another seed gives others. With a library it
starts itself again with that one and AddressSanitizer; a report ends the process that reads, which
counts as a crash. Other processes, such as those that try tokenizers, would not start within their
limits of memory: a tokenizer is believed here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

import adapter_files
import campaign
import model_files
import packed_files
import run_files
from gptc.tokenizer import libraries

FORMATS = (
    "c-config", "c-weights", "packed-q4_0", "packed-q4_0-model.gguf", "packed-q4_k-model.gguf",
    "adapter-llama-adapter_model.safetensors", "gguf-lora-llama", "optimizer.safetensors",
)  # fmt: skip


def read_all(folder: Path, seed: int, seconds: float) -> dict[str, dict[str, int]]:
    """The counts of each format, each read for some seconds."""
    libraries._tried = lambda library, definition: None
    campaign._try_here = lambda at: None
    found = {}
    for part in (model_files, packed_files, adapter_files):
        below = folder / part.__name__
        below.mkdir()
        found |= part.targets(below)
    run_files.optimizer_target(folder, found)
    counts = {}
    for name in FORMATS:
        cases, kept = range(10**9), Path(tempfile.gettempdir()) / "sanitized.failures"
        _, counts[name] = campaign.slice_of(name, found[name], cases, seed, seconds, kept)
        print(name, counts[name], flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=25, help="of each format")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.library:
        runtime = subprocess.run(
            ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        )
        settings = {
            "GPTC_LIBRARY": str(options.library.resolve()),
            "LD_PRELOAD": runtime.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=8",
            "UBSAN_OPTIONS": "halt_on_error=1",
        }
        rest = [argument for argument in sys.argv[1:] if argument != str(options.library)]
        command = [sys.executable, __file__, *rest]
        return subprocess.run(command, env=os.environ | settings, check=False).returncode
    with tempfile.TemporaryDirectory() as folder:
        counts = read_all(Path(folder), options.seed, options.seconds)
    n_inputs = sum(sum(one.values()) for one in counts.values())
    n_failures = sum(one[outcome] for one in counts.values() for outcome in campaign.FAILURES)
    print(f"{n_inputs:,} inputs, {len(counts)} formats: {n_failures} failures or reports")
    return 1 if n_failures else 0


if __name__ == "__main__":
    sys.exit(main())
