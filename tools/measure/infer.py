"""Measures the first token, drafts and sampling, which `gptc bench infer` does not.

    python tools/measure/infer.py

The model is GPT-2 124M with random weights, saved and read back, so that it is in the page cache.
Measure the first token with an installed package: a source tree has no parsed gpt.h, and perhaps no
bytecode.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.engine.config import GPTConfig
from gptc.generation.decoder import generate
from gptc.generation.drafts import NgramDraft
from gptc.generation.options import Sampling
from gptc.generation.sampling import sample_token
from gptc.tokenizer.registry import make_tokenizer

TURNS = 7
PROMPT = "The quick brown fox jumps over the lazy dog and"  # 10 tokens
REPEATS = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n"
N_TOKENS = 300
DRAWS = 50
FILTERS = ({}, {"temperature": 0.0}, {"top_k": 40}, {"top_p": 0.95}, {"typical_p": 0.95})


def first_token(folder: Path) -> float:
    """Seconds from the command to the first character after the prompt."""
    command = [sys.executable, "-m", "gptc", "infer", "-m", str(folder), "-p", PROMPT]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout
        process.stdout.read(len(PROMPT))
        process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.kill()
    return seconds


def drafts(folder: Path) -> None:
    """Measures decoding of a repetitive text, with and without an n-gram draft."""
    source = open_checkpoint(str(folder))
    tokenizer = source.tokenizer()
    speeds: dict[bool, list[float]] = {False: [], True: []}
    texts = set()
    with load_model(source, dtype="auto", max_batch=0) as model:
        for _ in range(3):
            for guesses in (False, True):
                draft = NgramDraft() if guesses else None
                begin = time.perf_counter()
                texts |= set(
                    generate(model, tokenizer, REPEATS, max_tokens=N_TOKENS, temperature=0, stop=(),
                             draft=draft)
                )  # fmt: skip
                speeds[guesses].append(N_TOKENS / (time.perf_counter() - begin))
        same = "the same text" if len(texts) == 1 else "ANOTHER TEXT"
        print(f"{model.dtype}, alone      {statistics.median(speeds[False]):8.1f} tokens/s")
        print(f"{model.dtype}, from ngrams {statistics.median(speeds[True]):7.1f} tokens/s, {same}")


def drawing(vocab_size: int) -> None:
    """Measures microseconds per draw, from logits like a trained model's and from flat ones."""
    rng = np.random.default_rng(0)
    steep = -1.5 * np.log(np.arange(1, vocab_size + 1)) * rng.uniform(0.8, 1.2, vocab_size)
    for name, logits in (("steep", steep), ("flat", rng.normal(0, 1, vocab_size))):
        row = logits.astype(np.float32)
        for options in FILTERS:
            begin = time.perf_counter()
            for i in range(DRAWS):
                sample_token(row, Sampling(**options), i, vocab_size)
            took = (time.perf_counter() - begin) / DRAWS
            print(f"drawing, {name:5} {options!s:24} {took * 1e6:8.0f} us")


def main() -> None:
    config = GPTConfig.preset("gpt2")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "gpt2"
        with Model.create(config, training=False, max_batch=0, seed=1) as model:
            model.save(folder, make_tokenizer("gpt2"))
        times = [first_token(folder) for _ in range(TURNS)]
        print(f"first token      {statistics.median(times):8.2f} s, at best {min(times):.2f}")
        drafts(folder)
    drawing(config.vocab_size)


if __name__ == "__main__":
    main()
