"""Threads that share models and sessions: each call must give what it gives alone.

    python tools/attack/threads.py --calls 10000

The calls are logits, losses, training steps (with a learning rate of 0, so that the next call finds
the same model), generated text, sessions, reads of parameters and saves, on models in every dtype.
At the end, models are closed while threads use them: a call succeeds, or raises a GptcError.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np

from gptc import GPTConfig, Model, generate
from gptc.errors import GptcError
from gptc.tokenizer.registry import make_tokenizer

THREADS = 8
T = 24
_TRAINED = ("fp32", "bf16")
_SAVES = 40  # one call in so many: it waits for the disk

Result = bytes


class Shared:
    """The models that all threads use, a session of each for each thread, and the calls."""

    def __init__(self, folder: Path) -> None:
        config = GPTConfig.preset(
            "tiny", vocab_size=256, block_size=2 * T, n_layer=2, n_head=4, n_kv_head=2, n_embd=32
        )
        self.folder = folder
        self.tokenizer = make_tokenizer("bytes")
        self.models: list[Model] = []
        for dtype in ("fp32", "bf16", "int8", "int4"):
            training = dtype in _TRAINED
            options = {"dtype": dtype, "device": "cpu", "threads": 2, "training": training}
            self.models.append(Model.create(config, max_batch=2, max_seq=T, seed=1, **options))
        self.sessions = [[m.session(2, T) for m in self.models] for _ in range(THREADS)]
        self.saves = count()

    def call(self, number: int, thread: int) -> Result:
        """The result of a call, which depends on its number alone."""
        rng = np.random.default_rng(number)
        tokens = rng.integers(0, 256, (2, T), dtype=np.int32)
        which = int(rng.integers(len(self.models)))
        model, session = self.models[which], self.sessions[thread][which]
        kinds: list[Callable[[], object]] = [
            lambda: model.logits(tokens).tobytes(),
            lambda: (model.loss(tokens, tokens), model.losses(tokens, tokens).tobytes()),
            lambda: self._step(model, tokens),
            lambda: self._decode(session, tokens[0]),
            lambda: generate(
                model, self.tokenizer, "ab", max_tokens=8, seed=number, temperature=1.0
            ),
            lambda: self._session(model, tokens[1]),
            lambda: model.get(
                "wte.weight" if model.dtype in _TRAINED else "norm_f.weight"
            ).tobytes(),
        ]
        if number % _SAVES == 0:
            return self._save(self.models[0])
        found = kinds[int(rng.integers(len(kinds)))]()
        return hashlib.sha256(repr(found).encode()).digest()

    def _step(self, model: Model, tokens: np.ndarray) -> object:
        if model.dtype not in _TRAINED:
            return model.loss(tokens, tokens)
        half = [tokens[:1], tokens[1:]]
        return model.train_step(half, half, lr=0.0, weight_decay=0.0)

    def _decode(self, session: object, tokens: np.ndarray) -> list[bytes]:
        session.rewind(0, 0)
        given = [session.decode(tokens[i : i + 5], 0).tobytes() for i in range(0, T, 5)]
        session.fork(0, 1, T // 2)
        return [*given, session.decode(tokens[:3], 1).tobytes()]

    def _session(self, model: Model, tokens: np.ndarray) -> bytes:
        return model.session(1, T).decode(tokens).tobytes()  # freed by garbage collection

    def _save(self, model: Model) -> Result:
        folder = self.folder / str(next(self.saves))
        model.save(folder, self.tokenizer)
        with Model.load(folder, dtype="fp32", threads=1) as again:
            values = again.get("wte.weight").tobytes()
        return hashlib.sha256((folder / "model.safetensors").read_bytes() + values).digest()


def in_threads(work: Callable[[int], None]) -> None:
    """Runs work(thread) in each thread, and raises what one of them raised."""
    raised: list[BaseException] = []

    def guarded(thread: int) -> None:
        try:
            work(thread)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def attack(n_calls: int, folder: Path) -> list[str]:
    """A line for each failure."""
    shared, failures = Shared(folder), []
    wanted = [shared.call(i, 0) for i in range(n_calls)]
    numbers = iter(range(n_calls))
    taking = threading.Lock()

    def work(thread: int) -> None:
        while True:
            with taking:
                number = next(numbers, None)
            if number is None:
                return
            if shared.call(number, thread) != wanted[number]:
                failures.append(f"call {number} differs in thread {thread}")

    in_threads(work)
    failures += closed_in_use(shared)
    return failures


def closed_in_use(shared: Shared) -> list[str]:
    """Closes the models one after the other while other threads call them."""
    tokens = np.zeros((1, T), np.int32)
    ends: Counter[str] = Counter()

    def work(thread: int) -> None:
        model, session = shared.models[thread % 4], shared.sessions[thread][thread % 4]
        if thread < 4:
            time.sleep(0.05)
            model.close()
            return
        try:
            while True:
                session.rewind(0, 0)
                session.decode(tokens[0], 0)
                model.logits(tokens)
        except GptcError as error:
            ends[str(error)] += 1

    in_threads(work)
    return [] if sum(ends.values()) == THREADS - 4 else [f"after close, threads end with {ends}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    n_calls = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as folder:
        failures = attack(n_calls, Path(folder))
    for line in failures[:10]:
        print(line, file=sys.stderr)
    print(f"{n_calls:,} calls by {THREADS} threads: {len(failures):,} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
