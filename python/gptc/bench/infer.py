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
from typing import Any, Protocol

import numpy as np

from gptc.engine.config import GPTConfig
from gptc.engine.model import Model
from gptc.engine.session import Session
from gptc.errors import GptcError
from gptc.files.words import pip_install

BATCHES = (1, 16)
_ROWS = 96  # a turn has about so many tokens of each batch, and _LEAST steps of it at least
_LEAST = 6
_MOST = 24
_BEGIN = 64  # tokens that a sequence holds when its decoding is timed


class Contender(Protocol):
    """A program with the model loaded. Each method returns seconds."""

    name: str

    def decode(self, n_seq: int, steps: int) -> float:
        """A token more for each of n_seq sequences, `steps` times."""
        ...

    def prefill(self, n: int) -> float:
        """A prompt of n tokens, alone."""
        ...


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
        session = self._session(n_seq, _BEGIN)
        tokens, seqs = np.full(n_seq, 5, np.int32), np.arange(n_seq, dtype=np.int32)
        begin = time.perf_counter()
        for _ in range(steps):
            session.decode(tokens, seqs)
        return time.perf_counter() - begin

    def prefill(self, n: int) -> float:
        session = self._session(1, 0)
        tokens = np.arange(n) % self.model.config.vocab_size
        begin = time.perf_counter()
        session.decode(tokens)
        return time.perf_counter() - begin


class LlamaCpp:
    """llama.cpp, through llama-cpp-python, with our GGUF file of the model."""

    def __init__(self, file: Path, dtype: str, threads: int, n_ctx: int) -> None:
        from llama_cpp import Llama

        self.name = f"llama.cpp {dtype}"
        self._llama = Llama(
            str(file), n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def decode(self, n_seq: int, steps: int) -> float:
        """One sequence; its Python package has no way to more."""
        if n_seq > 1:
            return float("nan")
        self._llama.reset()
        self._llama.eval(list(range(_BEGIN)))
        begin = time.perf_counter()
        for _ in range(steps):
            self._llama.eval([5])
        return time.perf_counter() - begin

    def prefill(self, n: int) -> float:
        self._llama.reset()
        begin = time.perf_counter()
        self._llama.eval([i % 1000 for i in range(n)])
        return time.perf_counter() - begin


class Transformers:
    """GPT-2 or Llama of transformers, from our folder of the model."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.name = f"transformers {dtype}"
        self._torch = torch
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        loader: Any = AutoModelForCausalLM
        self._model = loader.from_pretrained(folder, dtype=kind).eval()

    def _run(self, tokens: Any, past: Any) -> Any:
        with self._torch.no_grad():
            return self._model(tokens, past_key_values=past, use_cache=True).past_key_values

    def decode(self, n_seq: int, steps: int) -> float:
        past = self._run(self._torch.arange(_BEGIN).repeat(n_seq, 1), None)
        token = self._torch.full((n_seq, 1), 5)
        begin = time.perf_counter()
        for _ in range(steps):
            past = self._run(token, past)
        return time.perf_counter() - begin

    def prefill(self, n: int) -> float:
        begin = time.perf_counter()
        self._run(self._torch.arange(n).remainder(1000)[None], None)
        return time.perf_counter() - begin


@dataclass(frozen=True)
class Row:
    """One contender: tokens a second, medians over turns; None where it has no such thing."""

    name: str
    decode: dict[int, float | None]  # by how many sequences go on at once
    prefill: float


def bench_infer(
    config: GPTConfig,
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
    """Times decoding, by so many sequences, and a prompt, of a random model in each dtype."""
    if n_prompt > config.block_size:
        n_prompt = config.block_size
        report(f"prompts of {n_prompt} tokens: the model's context has no room for more")
    with (
        tempfile.TemporaryDirectory(prefix="gptc-bench-") as folder,
        Model.create(config, device="cpu", training=False, max_batch=0, threads=threads) as weights,
    ):
        contenders: list[Contender] = [
            Ours(config, weights, d, threads, cache)
            for d in dtypes
            for cache in dict.fromkeys(("auto", kv_dtype))
        ]
        contenders += _rivals(against, weights, Path(folder), weights.threads)
        times: dict[str, list[list[float]]] = {c.name: [] for c in contenders}
        for turn in range(-1, turns):  # the first one is not counted
            for c in contenders:
                which = "warming up" if turn < 0 else f"turn {turn + 1} of {turns}:"
                report(f"{which} {c.name}")
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


def _steps(n_seq: int) -> int:
    return min(_MOST, max(_LEAST, _ROWS // n_seq))


def _rivals(
    names: Sequence[str], weights: Model, folder: Path, threads: int
) -> list[LlamaCpp | Transformers]:
    from gptc.checkpoint.find import open_checkpoint
    from gptc.checkpoint.writer import save
    from gptc.convert.export_model import export_model

    found: list[LlamaCpp | Transformers] = []
    if names:
        save(folder / "model", weights)
    for name in names:
        try:
            if name == "transformers":
                found += [Transformers(folder / "model", d, threads) for d in ("fp32", "bf16")]
                continue
            source = open_checkpoint(folder / "model")
            for dtype in ("fp32", "bf16", "q8_0"):
                file = folder / f"{dtype}.gguf"
                export_model(source, "gguf", file, dtype=dtype)
                found.append(LlamaCpp(file, dtype, threads, weights.config.block_size))
        except ImportError as error:
            packages = ["llama-cpp-python"] if name == "llama.cpp" else ["torch", "transformers"]
            raise GptcError(f"{name} is not installed; try: {pip_install(*packages)}") from error
    return found


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
