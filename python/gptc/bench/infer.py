"""How fast this machine decodes: one sequence, many, and prompts; against other programs.

Every contender holds the same random model, and they take turns, so that a machine that others use
too slows all of them alike.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptc.bench.rivals import BEGIN, Contender, rivals
from gptc.engine import levels
from gptc.engine.config import GPTConfig
from gptc.engine.model import Model
from gptc.engine.session import Session
from gptc.errors import GptcError

BATCHES = (1, 16)
_ROWS = 96  # a turn has about so many tokens of each batch, and _LEAST steps of it at least
_LEAST = 6
_MOST = 24


class Ours:
    """gptc, in one dtype."""

    def __init__(
        self, config: GPTConfig, weights: Model, dtype: str, threads: int, kv_dtype: str
    ) -> None:
        self.name = f"gptc {dtype}" + (", int8 cache" if kv_dtype == "int8" else "")
        self.model = Model.create(
            config, device="cpu", dtype=dtype, threads=threads, training=False, max_batch=0,
            kv_dtype=kv_dtype, init=False,
        )  # fmt: skip
        for name, _, _ in config.parameters():
            self.model.set(name, weights.get(name))
        self._sessions: dict[int, Session] = {}

    def _session(self, n_seq: int, begin: int) -> Session:
        if n_seq not in self._sessions:
            self._sessions[n_seq] = self.model.session(n_seq)
        session = self._sessions[n_seq]
        for seq in range(n_seq):
            session.rewind(seq, 0)
            if begin:
                session.decode(np.arange(begin) % self.model.config.vocab_size, seq)
        return session

    def decode(self, n_seq: int, steps: int) -> float:
        session = self._session(n_seq, BEGIN)
        tokens, seqs = np.full(n_seq, 5, np.int32), np.arange(n_seq, dtype=np.int32)
        begin = time.perf_counter()
        for _ in range(steps):
            session.decode(tokens, seqs)
        return time.perf_counter() - begin

    def measure_levels(self, batches: Sequence[int], n_prompt: int) -> None:
        """Times what is about to run on both levels of a CPU with AMX."""

        def run() -> None:
            for n_seq in batches:
                self.decode(n_seq, 1)
            self.prefill(n_prompt)

        levels.measure(run)

    def prefill(self, n: int) -> float:
        session = self._session(1, 0)
        tokens = np.arange(n) % self.model.config.vocab_size
        begin = time.perf_counter()
        session.decode(tokens)
        return time.perf_counter() - begin


@dataclass(frozen=True)
class Row:
    """One contender: tokens a second, medians over turns; None where it has no such thing."""

    name: str
    decode: dict[int, float | None]  # by how many sequences go on at once
    prefill: float


def bench_infer(
    model: GPTConfig | str,
    dtypes: Sequence[str] = ("fp32", "bf16", "int8", "int4"),
    *,
    against: Sequence[str] = (),
    threads: int = 0,
    kv_dtype: str = "auto",
    turns: int = 5,
    n_prompt: int = 512,
    batches: Sequence[int] = BATCHES,
    report: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Times decoding, by so many sequences, and a prompt, in each dtype.

    `model` is a path, or the config of a random model.
    """
    with (
        tempfile.TemporaryDirectory(prefix="gptc-bench-") as folder,
        _weights(model, threads) as weights,
    ):
        config = weights.config
        needed = BEGIN + max(map(_steps, batches))
        if config.block_size < needed:
            raise GptcError(
                f"the model's context is {config.block_size} tokens, and this takes {needed}"
            )
        if n_prompt > config.block_size:
            n_prompt = config.block_size
            report(f"prompts of {n_prompt} tokens: the model's context has no room for more")
        contenders: list[Contender] = [
            Ours(config, weights, d, threads, cache)
            for d in dtypes
            for cache in dict.fromkeys(("auto", kv_dtype))
        ]
        contenders += rivals(tuple(against), weights, Path(folder))
        times: dict[str, list[list[float]]] = {c.name: [] for c in contenders}
        for turn in range(-1, turns):  # the first one is not counted
            for c in contenders:
                which = "warming up" if turn < 0 else f"turn {turn + 1} of {turns}:"
                report(f"{which} {c.name}")
                if turn < 0 and isinstance(c, Ours):
                    c.measure_levels(batches, n_prompt)
                took = [c.decode(n, _steps(n)) / _steps(n) for n in batches]
                took.append(c.prefill(n_prompt))
                if turn >= 0:
                    times[c.name].append(took)
        return {
            "config": config.to_dict(),
            "threads": weights.threads,
            "turns": turns,
            "batches": list(batches),
            "n_prompt": n_prompt,
            "results": [
                asdict(_row(name, took, batches, n_prompt)) for name, took in times.items()
            ],
        }


def _weights(model: GPTConfig | str, threads: int) -> Model:
    """The model in fp32."""
    from gptc.checkpoint import facade

    options: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "threads": threads}
    if isinstance(model, str):
        return facade.Model.load(model, **options)
    return Model.create(model, **options, training=False, max_batch=0)


def _steps(n_seq: int) -> int:
    return min(_MOST, max(_LEAST, _ROWS // n_seq))


def _row(name: str, times: list[list[float]], batches: Sequence[int], n_prompt: int) -> Row:
    *steps, prompt = (statistics.median(column) for column in zip(*times, strict=True))
    decode = {n: n / took if took == took else None for n, took in zip(batches, steps, strict=True)}
    return Row(name, decode, n_prompt / prompt)


def table(bench: dict[str, Any]) -> str:
    """The result of `bench_infer` as lines to read."""
    heads = "".join(f"{f'batch {n}':>10}" for n in bench["batches"])
    prompt = f"prompt of {bench['n_prompt']}"
    lines = [
        f"tokens a second, {bench['threads']} threads, median of {bench['turns']} turns",
        f"{'':20}{heads}{prompt:>16}",
    ]
    for row in bench["results"]:
        speeds = "".join(f"{'' if x is None else f'{x:,.0f}':>10}" for x in row["decode"].values())
        lines.append(f"{row['name']:20}{speeds}{row['prefill']:16,.0f}")
    return "\n".join(lines)
