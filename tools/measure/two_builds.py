"""Compares the speed of two installed builds of gptc, step by step in turn.

    python tools/measure/two_builds.py OLD/bin/python NEW/bin/python --preset tiny --dtype bf16
    python tools/measure/two_builds.py OLD/bin/python NEW/bin/python --decode 150

Both models stay loaded; one is stopped (SIGSTOP) while the other works. So each pair of times is
seconds apart, and the median of their ratios is steadier than a shared machine. The last loss or
token of both is compared too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def work(options: argparse.Namespace) -> None:
    """Runs in each build: after each line on standard input, one measurement on standard output."""
    from gptc import GPTConfig, Model

    config = GPTConfig.preset(options.preset, vocab_size=options.vocab_size)
    T = min(max(options.seq_len, options.prompt), config.block_size)
    if options.prompt > T:
        sys.exit(f"two_builds: --prompt {options.prompt} is more than the {T} tokens of a context")
    training = not (options.decode or options.prompt)
    model = Model.create(
        config, dtype=options.dtype, training=training, max_batch=options.batch_size, max_seq=T,
        threads=options.threads,
    )  # fmt: skip
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (options.batch_size, T + 1)).astype(np.int32)
    inputs, targets = (np.ascontiguousarray(x) for x in (tokens[:, :-1], tokens[:, 1:]))
    step: Callable[[], Any] = lambda: model.train_step(inputs, targets, lr=1e-4).loss  # noqa: E731
    if not training:
        session = model.session(1)

        def step() -> int:
            session.rewind(0, 0)
            logits = session.decode(inputs[0, : max(1, options.prompt)])
            for _ in range(options.decode):
                logits = session.decode(np.array([np.argmax(logits)], np.int32))
            return int(np.argmax(logits))

    step(), step()
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(options.steps):
            last = step()
        times = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps([*times, last]), flush=True)


class Build:
    """One build's process, stopped except while it is measured."""

    def __init__(self, python: str, arguments: list[str]) -> None:
        hidden = ("PYTHONPATH", "GPTC_LIBRARY")
        self.process = subprocess.Popen(
            [python, __file__, "--work", *arguments], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={k: v for k, v in os.environ.items() if k not in hidden},
        )  # fmt: skip
        assert self.process.stdout
        assert self.process.stdin
        self.input, self.output = self.process.stdin, self.process.stdout
        if self.output.readline() != "ready\n":
            sys.exit(f"{python} did not start")
        self.process.send_signal(signal.SIGSTOP)

    def measure(self) -> list[float]:
        """Wall and CPU seconds of some steps, and the last step's result."""
        self.process.send_signal(signal.SIGCONT)
        self.input.write("\n")
        self.input.flush()
        result: list[float] = json.loads(self.output.readline())
        self.process.send_signal(signal.SIGSTOP)
        return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", nargs="?", help="Python with the old build installed")
    parser.add_argument("new", nargs="?", help="Python with the new one")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=0, help="compute a prompt; no training")
    parser.add_argument("--decode", type=int, default=0, help="decode tokens; no training")
    parser.add_argument("--steps", type=int, default=1, help="steps in each measurement")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options)
    if not options.new:
        parser.error("name two Python programs")
    arguments = [x for x in sys.argv[1:] if x not in (options.old, options.new)]
    builds = [Build(python, arguments) for python in (options.old, options.new)]
    pairs = []
    for i in range(options.pairs):
        order = builds if i % 2 == 0 else builds[::-1]
        found = {build: build.measure() for build in order}
        pairs.append([found[build] for build in builds])
    for build in builds:
        build.process.kill()
    wall, cpu = ([old[k] / new[k] for old, new in pairs] for k in (0, 1))
    seconds = [statistics.median(pair[k][0] for pair in pairs) for k in (0, 1)]
    same = "the same" if all(old[2] == new[2] for old, new in pairs) else "DIFFERENT"
    print(
        f"old {seconds[0]:.3f} s, new {seconds[1]:.3f} s, medians of {len(pairs)}; results {same}"
    )
    print(f"new is {statistics.median(wall):.3f} x as fast by the clock", end="")
    print(f", {statistics.median(cpu):.3f} x by CPU time")


if __name__ == "__main__":
    main()
