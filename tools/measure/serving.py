"""The cost of a token: of `gptc serve`, of a batch in the same process, and of the session alone.

    python tools/measure/serving.py SmolLM2-135M-Instruct.gguf --dtype bf16 --clients 1 4 16

The three take turns and do the same work: so many prompts, read in blocks, and then a token for
each text and step. The CPU time of the server is that of its process; its clients are in this one,
and take time of the cores too. Of CPU time, and of tokens a second, the best of the turns counts.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from gptc.checkpoint.facade import load_model, on_newest
from gptc.generation.batch import Batch
from gptc.generation.options import Sampling
from gptc.generation.request import make_request

WORDS = ("the", "river", "stone", "a", "king", "walked", "over", "seven", "hills", "and", "saw")


def prompts(n: int, n_words: int, salt: int) -> list[str]:
    """Prompts that share no block with each other or with those of another salt."""
    rng = np.random.default_rng([salt, n])
    return [" ".join(rng.choice(WORDS, n_words)) for _ in range(n)]


class Served:
    """`gptc serve` in a process."""

    name = "serve"

    def __init__(self, arguments: list[str], ends: Collection[int]) -> None:
        self.bias = dict.fromkeys(map(str, ends), -100)  # so that all texts have the same length
        command = [sys.executable, "-m", "gptc", "serve", "--port", "0", *arguments]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.child.stderr
        for line in self.child.stderr:
            if "listening on" in line:
                self.netloc = urlsplit(line.split()[-1]).netloc
                break
        threading.Thread(target=self.child.stderr.read, daemon=True).start()

    def cpu_s(self) -> float:
        """CPU seconds of the process."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def run(self, texts: list[str], n_tokens: int) -> tuple[float, int]:
        """CPU seconds, and the tokens of all texts."""
        counts, before = [0] * len(texts), self.cpu_s()

        def client(i: int) -> None:
            body = {
                "prompt": texts[i], "max_tokens": n_tokens, "temperature": 0.8, "seed": i,
                "logit_bias": self.bias,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            connection = http.client.HTTPConnection(self.netloc)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            data = connection.getresponse().read().decode()
            last = json.loads(data.split("data: ")[-2])
            counts[i] = last["usage"]["completion_tokens"]

        threads = [threading.Thread(target=client, args=(i,)) for i in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.cpu_s() - before, sum(counts)


class InProcess:
    """The batch that the server uses, without a server."""

    name = "batch"

    def __init__(self, model: Any, tokenizer: Any, n_seq: int, n_ctx: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.session = model.session(n_seq, n_ctx)
        self.batch = Batch(self.session, tokenizer, keep=True, chunk=32)

    def run(self, texts: list[str], n_tokens: int) -> tuple[float, int]:
        """CPU seconds, and the tokens of all texts."""
        begin = time.process_time()
        samples = []
        for i, text in enumerate(texts):
            bias = tuple((token, -100.0) for token in sorted(self.tokenizer.ends))
            sampling = Sampling(temperature=0.8, seed=i, bias=bias)
            request = make_request(
                self.model, self.tokenizer, text, sampling=sampling, max_tokens=n_tokens
            )
            samples += list(request.samples(self.tokenizer))
        for sample in samples:
            list(self.batch.join(sample))
        while self.batch.active:
            list(self.batch.step())
        return time.process_time() - begin, sum(sample.n_tokens for sample in samples)


class Bare:
    """The engine's part of the same work: the same tokens through the session, and no draws."""

    name = "session"

    def __init__(self, model: Any, tokenizer: Any, n_seq: int, n_ctx: int) -> None:
        self.tokenizer = tokenizer
        self.session = model.session(n_seq, n_ctx)

    def run(self, texts: list[str], n_tokens: int) -> tuple[float, int]:
        """CPU seconds, and the tokens of all texts."""
        begin, n = time.process_time(), len(texts)
        for i, text in enumerate(texts):
            self.session.rewind(i, 0)
            self.session.decode(self.tokenizer.encode(text)[:-1], i)
        tokens, seqs = np.full(n, 5, np.int32), np.arange(n, dtype=np.int32)
        for _ in range(n_tokens):
            self.session.decode(tokens, seqs)
        return time.process_time() - begin, n * n_tokens


def shares(cost: dict[str, float]) -> str:
    """How near the server is to the others."""
    ratios = (f"{cost[name] / cost['serve']:.0%} of the {name}" for name in ("session", "batch"))
    return ", ".join(ratios)


def main() -> None:
    """Reads the arguments and prints a line for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    n_seq, n_ctx = max(given.clients), 1024

    def load(file: Any) -> Any:
        return file.tokenizer(), load_model(file, dtype=given.dtype, max_batch=0)

    tokenizer, model = on_newest(given.model, load)
    served = Served(
        ["-m", given.model, "--dtype", given.dtype, "--parallel", str(n_seq),
         "--context", str(n_ctx)],
        tokenizer.ends,
    )  # fmt: skip
    contenders = [served, *(kind(model, tokenizer, n_seq, n_ctx) for kind in (InProcess, Bare))]
    try:
        for n in given.clients:
            cost: dict[str, list[float]] = {}
            speed: dict[str, float] = {}
            for turn in range(given.turns):
                texts = prompts(n, given.words, turn)
                for contender in contenders:
                    begin = time.perf_counter()
                    seconds, n_tokens = contender.run(texts, given.tokens)
                    rate = n_tokens / (time.perf_counter() - begin)
                    speed[contender.name] = max(rate, speed.get(contender.name, 0.0))
                    cost.setdefault(contender.name, []).append(1000 * seconds / n_tokens)
            best = {name: min(values) for name, values in cost.items()}
            told = ", ".join(f"{name} {ms:.2f}" for name, ms in best.items())
            print(f"{n} clients: CPU ms a token {told}; {shares(best)}")
            times = {name: 1 / rate for name, rate in speed.items()}
            told = ", ".join(f"{name} {rate:.0f}" for name, rate in speed.items())
            print(f"{n} clients: tokens/s {told}; {shares(times)}", flush=True)
    finally:
        served.child.terminate()
        served.child.wait()
        model.close()


if __name__ == "__main__":
    main()
