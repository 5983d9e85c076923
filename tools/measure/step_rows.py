"""CPU time of decoding steps by their number of rows, and the rate of the products in them.

    python tools/measure/step_rows.py MODEL --dtype bf16 --threads 1 --decoded 7 15 16 --prompt 0 32
    GPTC_LIBRARY=old/libgpt.so python tools/measure/step_rows.py ...        for another build

A step decodes so many texts of 100 tokens, whose logits are wanted, and reads so many tokens of a
prompt, as a server does. Of the turns the least CPU time counts, and the time of the least op of a
shape. A checksum of the logits tells whether two builds give the same bits.
"""

from __future__ import annotations

import argparse
import time
import zlib
from typing import Any

import numpy as np

from gptc import Model

PAST = 100


def measure(model: Any, session: Any, decoded: int, prompt: int, turns: int) -> str:
    """A line of the table."""
    tokens = np.random.default_rng([decoded, prompt]).integers(0, 1000, decoded + prompt)
    seqs = np.repeat(np.arange(decoded + 1), [1] * decoded + [prompt])
    want = [True] * decoded + [False] * prompt
    cpu_s: list[float] = []
    ops: dict[str, tuple[float, float]] = {}
    crc = 0
    for _ in range(turns):
        for seq in range(decoded + 1):
            session.rewind(seq, PAST)
        begin = time.process_time()
        with model.profile() as profile:
            logits = session.decode(tokens, seqs, want)
        cpu_s.append(time.process_time() - begin)
        crc = zlib.crc32(np.ascontiguousarray(logits).tobytes())
        for op in profile.ops:
            if op.name.startswith(("linear", "head")):
                least = ops.get(op.name, (op.seconds, op.flops))[0]
                ops[op.name] = (min(least, op.seconds), op.flops)
    seconds, flops = map(sum, zip(*ops.values(), strict=True))
    told = f"{1000 * min(cpu_s):.1f} | {flops / seconds / 1e9:.0f} | {crc:08x}"
    return f"| {decoded} | {prompt} | {told} |"


def main() -> None:
    """Reads the arguments and prints a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decoded", type=int, nargs="+", default=[1, 4, 7, 8, 11, 15, 16])
    parser.add_argument("--prompt", type=int, nargs="+", default=[0, 32])
    parser.add_argument("--turns", type=int, default=10)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    n_seq = max(given.decoded) + 1
    with (
        Model.load(given.model, dtype=given.dtype, threads=given.threads) as model,
        model.session(n_seq, PAST + max(1, *given.prompt)) as session,
    ):
        for seq in range(n_seq):
            session.decode(rng.integers(0, 1000, PAST), seq, [False] * PAST)
        peak = max(model.peak_flops() for _ in range(4))
        print(f"peak {peak / 1e9:.0f} GFLOPS\n")
        print("| decoded | of a prompt | CPU ms | GFLOPS of products | checksum |")
        print("| --- | --- | --- | --- | --- |")
        for prompt in given.prompt:
            for decoded in given.decoded:
                print(measure(model, session, decoded, prompt, given.turns), flush=True)


if __name__ == "__main__":
    main()
