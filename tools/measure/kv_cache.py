"""Compares decoding with a KV cache in int8 with that in the dtype of activations, token by token.

    python tools/measure/kv_cache.py --preset gpt2 --dtype bf16

The model has random weights and few layers, so that much of the time is attention. Times are CPU
seconds of one thread; both caches take turns.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from gptc import GPTConfig, Model
from gptc.engine.session import session_bytes

CACHES = ("auto", "int8")
STEPS = 4  # tokens in a turn


def main() -> None:
    """Prints milliseconds a token, the ratio of pairs, and the bytes of a session."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--keys", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=20)
    o = parser.parse_args()
    config = GPTConfig.preset(o.preset, block_size=o.keys + 96, n_layer=o.layers)
    with Model.create(
        config, device="cpu", dtype=o.dtype, threads=1, training=False, max_batch=0
    ) as model:
        sessions = {kind: model.session(1, kv_dtype=kind) for kind in CACHES}
        for session in sessions.values():
            session.decode(np.arange(o.keys) % config.vocab_size)
        times: dict[str, list[float]] = {kind: [] for kind in CACHES}
        for i in range(o.pairs):
            for kind in CACHES if i % 2 else CACHES[::-1]:
                begin = time.process_time()
                for _ in range(STEPS):
                    sessions[kind].decode([5])
                times[kind].append((time.process_time() - begin) / STEPS * 1e3)
                sessions[kind].rewind(0, o.keys)
        ratios = np.array(times["auto"]) / np.array(times["int8"])
        for kind in CACHES:
            size = session_bytes(model, 8, kv_dtype=kind)
            print(f"{kind}: {np.median(times[kind]):.2f} ms a token; 8 sequences: {size:,} bytes")
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(f"int8 is {middle:.2f} x as fast ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
