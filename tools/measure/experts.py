"""Decodes with a mixture of experts, and with a dense model of its active parameters, in turn.

python tools/measure/experts.py [--dtype bf16] [--pairs 10]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np

from gptc.engine.config import GPTConfig
from gptc.engine.model import Model

SHAPE = {"vocab_size": 4096, "block_size": 512, "n_layer": 8, "n_head": 12, "n_embd": 768}
WIDTH, EXPERTS, USED = 1024, 8, 2


def seconds_of(model: Model, tokens: int) -> tuple[float, float]:
    """Wall-clock and CPU time of so many steps of one token."""
    session = model.session(1, tokens)
    session.decode(np.array([1], np.int32))
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(1, tokens):
        session.decode(np.array([i % SHAPE["vocab_size"]], np.int32))
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=120)
    options = parser.parse_args()
    some = GPTConfig.preset("modern", **SHAPE, n_ff=WIDTH, n_expert=EXPERTS, n_expert_used=USED)
    dense = GPTConfig.preset("modern", **SHAPE, n_ff=WIDTH * USED)
    settings = {
        "device": "cpu",
        "training": False,
        "dtype": options.dtype,
        "threads": options.threads,
    }
    with Model.create(some, **settings) as mixture, Model.create(dense, **settings) as other:
        for model in (mixture, other):
            model.init(1)
            seconds_of(model, 20)
        pairs = []
        for i in range(options.pairs):
            order = (mixture, other) if i % 2 else (other, mixture)
            times = {id(model): seconds_of(model, options.tokens) for model in order}
            pairs.append((times[id(mixture)], times[id(other)]))
        print(
            f"{mixture.plan.n_params:,} parameters, of which a token reads "
            f"{mixture.plan.n_active_params:,}; dense: {other.plan.n_params:,}"
        )
    for k, kind in enumerate(("by the clock", "by CPU time")):
        ratios = [one[k] / two[k] for one, two in pairs]
        each = [statistics.median(pair[i][k] for pair in pairs) for i in (0, 1)]
        ms = [1000 * seconds / (options.tokens - 1) for seconds in each]
        print(
            f"{kind}: {ms[0]:.2f} ms a token with experts, {ms[1]:.2f} dense; median of the ratios "
            f"{statistics.median(ratios):.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
