"""The options of a run by one number, its depth: see docs/training.md.

Layers of width 64 each: depth 6 is the shape of nanoGPT's characters, depth 12 that of GPT-2 124M.
For D tokens, the best batch grows about as D^0.4 (Bergsma et al. 2025, Power Lines), and D with the
cube of the depth, so the tokens of a step grow with the depth. Then Muon's products have the same
share of each step. tools/measure/depth.py has measured the learning rates, which fall as 1/depth;
its runs agree with the number of tokens, and do not settle it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptc.settings import spelled

PRESET = "modern"  # whose layers these are
WIDTH = 64  # of a layer, times the depth
HEAD = 64  # channels of a head
STEP_TOKENS = 1024  # times the depth
SHORTEST, LONGEST = 128, 1024  # tokens of a row, which are as many as channels within these
MICRO_BATCH = 8192  # tokens, at most
TOKENS = 20  # for each number of the layers' matrices (Hoffmann et al. 2022)
PASSES = 4.0  # over the data: more help less than new data (Muennighoff et al. 2023)
RATE = 1.8e-2  # Muon's learning rate, divided by the depth
ADAMW_RATE = 4.5e-3  # that of AdamW


def _heads(width: int) -> int:
    """Heads of about `HEAD` channels each, an even number of them; at least 2."""
    most = max(2, round(width / HEAD))
    return next((n for n in range(most, 0, -1) if width % n == 0 and width // n % 2 == 0), 1)


def by_depth(depth: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a depth, by those options that were given: others follow from them."""
    width = given.get("n_embd") or WIDTH * depth
    n_layer = given.get("n_layer") or depth
    seq_len = given.get("seq_len") or min(LONGEST, max(SHORTEST, WIDTH * depth))
    rows = max(1, round(STEP_TOKENS * depth / seq_len))
    n_ff = given.get("n_ff") or -(-8 * width // 3 // WIDTH) * WIDTH
    rate = ADAMW_RATE if given.get("optimizer") == "adamw" else RATE
    accum = given.get("grad_accum") or -(-rows * seq_len // MICRO_BATCH)
    return {
        "preset": PRESET,
        "n_layer": n_layer,
        "n_embd": width,
        "n_head": _heads(width),
        "n_ff": n_ff,
        "seq_len": seq_len,
        "batch_size": -(-rows // accum),
        "grad_accum": accum,
        "lr": float(f"{rate / depth:.3g}"),
        "min_lr": 0.0,
        "schedule": "linear",
        "warmup_share": 0.02,
        "tokens": TOKENS * n_layer * (4 * width**2 + 3 * width * n_ff),
        "epochs": PASSES,
    }


CHOSEN = tuple(by_depth(1, {}))
"""The options that a depth chooses."""


def chosen(options: Any) -> Iterator[str]:
    """The options of a run that its depth has chosen, or that were given in their place."""
    for name in CHOSEN:
        value = getattr(options, name)
        if name != "preset" and value is not None:
            shown = f"{value:.3g}" if isinstance(value, float) else value
            yield f"--{spelled(name)} {shown}"
