"""Compares gptc and llama.cpp on one quantized GGUF file: greedy text, logits, perplexity, speed.

    pip install llama-cpp-python                        # compiles for some minutes
    python tools/measure/compare_quantized.py model.gguf --text book.txt --threads 1

Products round activations to 8 bits in llama.cpp and to 15 in gptc; both programs round other
numbers to 16 bits. So both are compared with gptc's fp32 products of the file's numbers, which
round neither.
Speeds are tokens per second of CPU time, so that other programs disturb less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptc.checkpoint.facade import load_model
from gptc.engine.arrays import FloatArray, TokenArray
from gptc.engine.model import Model
from gptc.formats.model_file import ModelFile
from gptc.formats.registry import open_model

WINDOW = 512
BATCHES = (1, 16)


def tokens_per_second(n_tokens: int, run: Callable[[], object], repeats: int) -> float:
    """The best of several runs, by CPU time."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return n_tokens / min(times)


class Ours:
    """gptc on a file."""

    def __init__(self, file: ModelFile, threads: int, dtype: str = "auto") -> None:
        options = {"device": "cpu", "dtype": dtype, "threads": threads, "max_seq": WINDOW}
        self.model: Model = load_model(file, **options)

    def logits(self, tokens: TokenArray) -> FloatArray:
        """Logits (T, V)."""
        return self.model.logits(tokens[None])[0]

    def greedy(self, prompt: TokenArray, n: int) -> tuple[list[int], list[float]]:
        """The n likeliest tokens in turn, and how far the second is behind each."""
        found, gaps = [], []
        with self.model.session(1, len(prompt) + n) as session:
            logits = session.decode(prompt)
            for _ in range(n):
                second, best = np.sort(logits)[-2:]
                found.append(int(np.argmax(logits)))
                gaps.append(float(best - second))
                logits = session.decode(np.array(found[-1:], np.int32))
        return found, gaps

    def speeds(self, prompt: TokenArray, steps: int, repeats: int) -> dict[str, float]:
        """Tokens per second: of a prompt, and of so many sequences after 64 tokens of each."""
        speeds = {}
        with self.model.session(max(BATCHES), WINDOW) as session:

            def read() -> None:
                session.rewind(0, 0)
                session.decode(prompt)

            def decode(n: int) -> None:
                for i in range(n):
                    session.rewind(i, 64)
                for _ in range(steps):
                    session.decode(prompt[:n], np.arange(n, dtype=np.int32))

            speeds["prompt"] = tokens_per_second(len(prompt), read, repeats)
            for i in range(1, max(BATCHES)):
                session.fork(0, i, 64)
            for n in BATCHES:
                run = lambda n=n: decode(n)  # noqa: E731
                speeds[f"decode {n}"] = tokens_per_second(n * steps, run, repeats)
        return speeds


class Theirs:
    """llama.cpp on the same file, through llama-cpp-python."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.c: Any = llama_cpp
        self.llama = llama_cpp.Llama(
            str(path),
            n_ctx=WINDOW,
            n_batch=WINDOW,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            verbose=False,
        )

    def tokens(self, text: bytes) -> TokenArray:
        found = self.llama.tokenize(text, add_bos=False, special=False)
        return np.array(found, np.int32)

    def logits(self, tokens: TokenArray) -> FloatArray:
        self.llama.reset()
        self.llama.eval(tokens.tolist())
        return np.array(self.llama.scores[: len(tokens)])

    def greedy(self, prompt: TokenArray, n: int) -> list[int]:
        found: list[int] = []
        self.llama.reset()
        self.llama.eval(prompt.tolist())
        for _ in range(n):
            found.append(int(np.argmax(self.llama.scores[self.llama.n_tokens - 1])))
            self.llama.eval(found[-1:])
        return found

    def speeds(self, prompt: TokenArray, steps: int, repeats: int) -> dict[str, float]:
        """The same by llama_decode alone, logits of the last tokens wanted."""
        c, settings = self.c, self.llama.context_params
        settings.n_seq_max, settings.n_ctx = max(BATCHES), WINDOW * max(BATCHES)
        settings.kv_unified = True
        ctx = c.llama_init_from_model(self.llama.model, settings)
        memory = c.llama_get_memory(ctx)
        batch = c.llama_batch_init(WINDOW, 0, max(BATCHES))

        def decode(tokens: list[int], positions: list[int], seqs: list[int], last: int) -> None:
            batch.n_tokens = len(tokens)
            for i, (token, position, seq) in enumerate(zip(tokens, positions, seqs, strict=True)):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
                batch.logits[i] = i >= last
            if c.llama_decode(ctx, batch):
                raise RuntimeError("llama_decode failed")
            c.llama_synchronize(ctx)

        def read(n: int) -> None:
            c.llama_memory_clear(memory, True)
            decode(prompt[:n].tolist(), list(range(n)), [0] * n, n - 1)

        def step(n: int) -> None:
            for i in range(n):
                c.llama_memory_seq_rm(memory, i, 64, -1)
            for k in range(steps):
                decode(prompt[:n].tolist(), [64 + k] * n, list(range(n)), 0)

        speeds = {"prompt": tokens_per_second(len(prompt), lambda: read(len(prompt)), repeats)}
        read(64)
        for i in range(1, max(BATCHES)):
            c.llama_memory_seq_cp(memory, 0, i, -1, -1)
        for n in BATCHES:
            run = lambda n=n: step(n)  # noqa: E731
            speeds[f"decode {n}"] = tokens_per_second(n * steps, run, repeats)
        c.llama_batch_free(batch)
        c.llama_free(ctx)
        return speeds


def nats(logits: FloatArray, tokens: TokenArray) -> FloatArray:
    """The cross-entropy of each token but the first."""
    rows = logits[: len(tokens) - 1].astype(np.float64)
    top = rows.max(axis=1)
    sums = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    return np.asarray(sums - rows[np.arange(len(rows)), tokens[1:]])


def compare_greedy(ours: Ours, theirs: Theirs, wide: Ours, prompt: TokenArray, n: int) -> None:
    """Prints how long greedy texts are the same."""
    exact, gaps = wide.greedy(prompt, n)
    found = {"gptc": ours.greedy(prompt, n)[0], "llama.cpp": theirs.greedy(prompt, n)}
    for name, tokens in found.items():
        pairs = zip(tokens, exact, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), n)
        gap = "" if same == n else f", where fp32's two best logits are {gaps[same]:.2g} apart"
        print(f"greedy, {name} and fp32: the same {same} of {n} tokens{gap}")
    pairs = zip(*found.values(), strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), n)
    print(f"greedy, gptc and llama.cpp: the same {same} of {n} tokens", flush=True)


def compare_text(ours: Ours, theirs: Theirs, wide: Ours, text: TokenArray) -> None:
    """Prints the perplexity of both and of fp32 products, and how far they are from these."""
    programs: dict[str, Any] = {"fp32 products": wide, "gptc": ours, "llama.cpp": theirs}
    losses: dict[str, list[FloatArray]] = {name: [] for name in programs}
    errors, size = dict.fromkeys(programs, 0.0), 0.0
    for i in range(0, len(text) - 1, WINDOW):
        window = text[i : i + WINDOW]
        found = {name: program.logits(window) for name, program in programs.items()}
        exact = found["fp32 products"]
        size += float(np.square(exact, dtype=np.float64).sum())
        for name, logits in found.items():
            losses[name].append(nats(logits, window))
            errors[name] += float(np.square(logits - exact, dtype=np.float64).sum())
    exact = np.concatenate(losses["fp32 products"])
    print(f"{len(exact):,} tokens in windows of {WINDOW}; errors are from fp32 products")
    for name, of_windows in losses.items():
        apart = np.concatenate(of_windows) - exact
        perplexity, error = np.exp((exact + apart).mean()), apart.std() / len(apart) ** 0.5
        print(
            f"{name}: perplexity {perplexity:.4f} ({np.expm1(apart.mean()):+.3%} +- {error:.3%}); "
            f"a token's loss off by {np.sqrt((apart**2).mean()):.4f} nats (root mean square), "
            f"logits by {(errors[name] / size) ** 0.5:.4f} of their norm",
            flush=True,
        )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--text", type=Path, help="text for perplexity; only speeds without it")
    parser.add_argument("--bytes", type=int, default=50_000, help="of the text")
    parser.add_argument("--prompt", default="The history of the sea begins")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    file = open_model(options.file)
    ours, theirs = Ours(file, options.threads), Theirs(options.file, options.threads)
    if options.text:
        text = theirs.tokens(options.text.read_bytes()[: options.bytes])
        wide = Ours(file, options.threads, "fp32")
        prompt = theirs.tokens(options.prompt.encode())
        compare_greedy(ours, theirs, wide, prompt, options.tokens)
        compare_text(ours, theirs, wide, text)
    prompt = np.arange(WINDOW - 64, dtype=np.int32) * 7919 % file.config.vocab_size
    own, their = (x.speeds(prompt.astype(np.int32), 16, options.repeats) for x in (ours, theirs))
    for name, speed in own.items():
        ratio = speed / their[name]
        print(f"{name}: {speed:.1f} tokens/s, llama.cpp's {their[name]:.1f}: {ratio:.2f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
