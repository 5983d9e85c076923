"""Measures the time to load models, and the memory to import them.

    python tools/measure/loading.py gpt2/ gpt2_124M.bin gpt2.gguf

Prints for each model the seconds from opening it to a model that can decode (best of five, so that
the file is in the page cache), and the rise of anonymous memory while it is imported.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.import_model import import_model


def load_seconds(path: str) -> float:
    """Seconds to load a model, best of five."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        load_model(open_checkpoint(path), max_batch=0).close()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def anonymous_bytes() -> int:
    """This process's memory without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def import_bytes(path: str) -> int:
    """The highest rise of memory during an import, sampled every two milliseconds."""
    before, highest, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        import_model(path, Path(folder) / "model")
    done.set()
    watcher.join()
    return highest


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+")
    for path in parser.parse_args().paths:
        rise = import_bytes(path)
        print(
            f"{path}: {load_seconds(path):.2f} s; importing takes {rise / 1e6:.0f} MB", flush=True
        )


if __name__ == "__main__":
    main()
