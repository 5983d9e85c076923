"""Times the drawing of tokens in steps of a batch, next to all ops of the step.

    python tools/measure/draws.py MODEL [--rows 16] [--turns 4]

Prints milliseconds a step, the best of the turns, without a filter and with several. GPTC_LIBRARY
names another build.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from gptc.checkpoint.facade import load_model, on_newest
from gptc.generation.options import Sampling
from gptc.generation.sampling import Draw, draw_tokens

STEPS = 6
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.95}, {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
)  # fmt: skip


def measured(
    model: Any, vocab_size: int, rows: int, settings: dict[str, Any]
) -> tuple[float, float]:
    """Milliseconds a step: of draws, and of all ops."""
    tokens, seqs = np.full(rows, 50, np.int32), np.arange(rows, dtype=np.int32)
    draw = Draw(Sampling(**settings), 5, vocab_size, [], None)
    with model.session(rows, 64) as session, model.profile() as profile:
        for _ in range(STEPS):
            draw_tokens(session, tokens, seqs, [True] * rows, [draw] * rows)
    seconds = {op.name: op.seconds for op in profile.ops}
    return 1e3 * seconds["sample"] / STEPS, 1e3 * sum(seconds.values()) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    given = parser.parse_args()

    def load(file: Any) -> Any:
        return load_model(file, dtype="bf16", threads=1, max_batch=0), file.tokenizer()

    model, tokenizer = on_newest(given.model, load)
    for settings in SETTINGS:
        turns = [
            measured(model, tokenizer.vocab_size, given.rows, settings) for _ in range(given.turns)
        ]
        draws, every = (min(column) for column in zip(*turns, strict=True))
        told = ", ".join(f"{name} {value}" for name, value in settings.items())
        print(f"{told}: draws {draws:.2f} ms, all ops {every:.2f} ms a step")


if __name__ == "__main__":
    main()
