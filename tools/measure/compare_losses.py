"""Compares the losses of gptc and llama.cpp with exact ones, token by token, on a quantized GGUF.

    pip install llama-cpp-python                        # compiles for some minutes
    python tools/measure/compare_losses.py model.gguf book.txt

Exact losses are those of float32 products of the file's numbers. Each program's losses minus these
are rounding, whose mean has a standard error. A line has all tokens so far: the last one counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from compare_quantized import WINDOW, Ours, Theirs

from gptc.engine.arrays import FloatArray, TokenArray
from gptc.formats.registry import open_model


def losses(logits: FloatArray, tokens: TokenArray) -> FloatArray:
    """Nats (T - 1,) of each token but the first, by logits (T, V)."""
    some = logits[:-1].astype(np.float64)
    top = some.max(axis=1)
    sums = np.log(np.exp(some - top[:, None]).sum(axis=1)) + top
    return sums - some[np.arange(len(some)), tokens[1:]]


def main() -> None:
    """Prints, after each window, perplexities and how much more than the exact ones they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bytes", type=int, default=50_000, help="of the text")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    file = open_model(options.model)
    exact = Ours(file, options.threads, "fp32")
    theirs = Theirs(options.model, options.threads)
    programs = {
        "gptc packed": Ours(file, options.threads),
        "gptc bf16": Ours(file, options.threads, "bf16"),
        "llama.cpp": theirs,
    }
    text = theirs.tokens(options.text.read_bytes()[: options.bytes])
    found: dict[str, list[FloatArray]] = {name: [] for name in ("exact", *programs)}
    for begin in range(0, len(text) - 1, WINDOW):
        window = text[begin : begin + WINDOW]
        found["exact"].append(losses(exact.logits(window), window))
        for name, program in programs.items():
            found[name].append(losses(program.logits(window), window))
        report(found)


def report(found: dict[str, list[FloatArray]]) -> None:
    """One line: a percentage is of perplexity, after +- its standard error."""
    sums = {name: np.concatenate(some) for name, some in found.items()}
    base = sums.pop("exact")
    parts = [f"{len(base)} tokens, exact {np.exp(base.mean()):.3f}"]
    pairs = [(name, some, base) for name, some in sums.items()]
    pairs.append(("packed minus llama.cpp", sums["gptc packed"], sums["llama.cpp"]))
    for name, some, other in pairs:
        off = some - other
        error = off.std() / len(off) ** 0.5
        parts.append(f"{name} {off.mean():+.3%} +- {error:.3%} (deviation {off.std():.4f})")
    print("; ".join(parts), flush=True)


if __name__ == "__main__":
    main()
