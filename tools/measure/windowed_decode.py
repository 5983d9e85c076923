"""Decodes a long text with a model whose layers have windows, and prints the memory on the way.

    python tools/measure/windowed_decode.py --tokens 20000 --window 512

The model is a random Llama of 6 layers. With --window 0 its layers see the whole text.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.engine.session import session_bytes
from gptc.files.memory import resident_bytes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--kv-dtype", default="auto")
    options = parser.parse_args()
    n = options.tokens
    config = GPTConfig.preset("llama-15m", block_size=n, window=options.window)
    settings = {"dtype": options.dtype, "kv_dtype": options.kv_dtype}
    with Model.create(config, training=False, max_batch=0, **settings) as model:
        print(f"session of {n:,} tokens: {session_bytes(model, 1, n) / 1e6:.1f} MB", flush=True)
        session, token, begin = model.session(1, n), 1, time.process_time()
        for i in range(1, n + 1):
            token = int(np.argmax(session.decode([token])))
            if i in (1, 1000, n // 2, n):
                memory, seconds = resident_bytes() / 1e6, time.process_time() - begin
                print(f"{i:6,} tokens: {memory:.1f} MB resident, {seconds:.1f} CPU s", flush=True)


if __name__ == "__main__":
    main()
