"""Measures training speed, alone or against PyTorch in the same run, turn by turn.

The machine's speed drifts, so absolute figures do too: what counts is the ratio of turns that
follow each other. Each turn is a few steps; a figure is the median over the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gptc.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.model import Model, Options
from gptc.train import matrix_peak

# PyTorch's ways to run the same step, as the best of which we are compared.
TORCH_VARIANTS = ("torch fp32", "torch bf16", "torch fp32 compiled", "torch bf16 compiled")

Step = Callable[[], float]
"""One training step; returns its loss."""


@dataclass(frozen=True)
class Result:
    """One contender. Steps are in milliseconds, rates in tokens a second; spread is max / min."""

    name: str
    step_ms: float
    tokens_per_s: float
    spread: float
    loss: float  # of its last step
    ratio: float | None = None  # our rate over its rate, the median of neighbouring turns


def bench_train(
    config: GPTConfig,
    options: Options,
    *,
    turns: int = 5,
    steps: int = 3,
    against: Sequence[str] = (),
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times training steps of (max_batch, max_seq) tokens: ours, and each variant in `against`.

    Returns plain data: what was run, `results` (ours first) and, on the CPU, `peak_flops`, the
    machine's fp32 matrix rate as NumPy reaches it.
    """
    unknown = set(against) - set(TORCH_VARIANTS)
    if unknown:
        raise UsageError(f"unknown contender {unknown.pop()!r}; known: {', '.join(TORCH_VARIANTS)}")
    options = options.resolved()
    B, T = options.max_batch, options.max_seq or config.block_size
    random = np.random.default_rng(options.seed)
    tokens = random.integers(0, config.vocab_size, (B, T + 1)).astype(np.int32)
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    peak = matrix_peak() if options.device == "cpu" else None
    with Model.create(config, **asdict(options)) as model:
        contenders: dict[str, Step] = {
            "gptc": lambda: model.train_step(inputs, targets, lr=1e-4).loss
        }
        threads = model.threads
        for name in against:
            contenders[name] = _torch_step(config, name, threads, inputs, targets)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        losses: dict[str, float] = {}
        for name, step in contenders.items():
            report(f"warming up {name}")
            for _ in range(2):
                step()
        for turn in range(turns):
            for name, step in contenders.items():
                report(f"turn {turn + 1} of {turns}: {name}")
                begin = time.perf_counter()
                for _ in range(steps):
                    losses[name] = step()
                times[name].append((time.perf_counter() - begin) / steps)
        plan = model.plan
    results = [_result(name, times, B * T, losses[name]) for name in contenders]
    return {
        "config": config.to_dict(),
        "batch_size": B,
        "seq_len": T,
        "device": options.device,
        "dtype": options.dtype,
        "threads": threads,
        "turns": turns,
        "steps": steps,
        "n_params": plan.n_params,
        "train_flops_per_token": plan.train_flops_per_token,
        "peak_flops": peak,
        "results": [asdict(result) for result in results],
    }


def table(bench: dict[str, Any]) -> str:
    """The result of `bench_train` as lines to read."""
    lines = [
        f"{bench['n_params']:,} parameters, B {bench['batch_size']}, T {bench['seq_len']}, "
        f"{bench['device']} {bench['dtype']}, {bench['threads']} threads; median of "
        f"{bench['turns']} turns of {bench['steps']} steps",
        f"{'':22}{'ms/step':>10}{'tokens/s':>11}{'GFLOP/s':>10}{'spread':>8}{'gptc is':>10}",
    ]
    for row in bench["results"]:
        flops = row["tokens_per_s"] * bench["train_flops_per_token"]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x"
        lines.append(
            f"{row['name']:22}{row['step_ms']:10.1f}{row['tokens_per_s']:11,.0f}"
            f"{flops / 1e9:10.0f}{row['spread']:8.2f}{ratio:>10}"
        )
    if bench["peak_flops"]:
        lines.append(f"matrix peak (NumPy fp32): {bench['peak_flops'] / 1e9:.0f} GFLOP/s")
    return "\n".join(lines)


def _result(name: str, times: dict[str, list[float]], n_tokens: int, loss: float) -> Result:
    own, ours = times[name], times["gptc"]
    step_s = statistics.median(own)
    ratio = None
    if name != "gptc":
        ratio = statistics.median(theirs / our for theirs, our in zip(own, ours, strict=True))
    return Result(name, step_s * 1e3, n_tokens / step_s, max(own) / min(own), loss, ratio)


def _torch_step(config: GPTConfig, name: str, threads: int, inputs: Any, targets: Any) -> Step:
    """The same step in PyTorch, written as nanoGPT writes it."""
    try:
        import torch
    except ImportError:
        raise GptcError("comparing with PyTorch needs it: pip install 'gptc[parity]'") from None
    from gptc.bench_torch import make_step

    torch.set_num_threads(threads)
    step: Step = make_step(
        config, inputs, targets, bf16="bf16" in name, compiled="compiled" in name
    )
    return step
