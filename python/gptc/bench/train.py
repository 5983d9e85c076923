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

from gptc.engine.arrays import TokenArray
from gptc.engine.config import GPTConfig
from gptc.engine.model import Model
from gptc.engine.options import Options
from gptc.errors import GptcError, UsageError
from gptc.files.words import pip_install

# PyTorch's ways to run the same step. gptc is compared with the best of them.
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

    Returns plain data: the settings, `results` (ours first) and `peak_flops`, the machine's peak
    of multiply-adds in that dtype.
    """
    unknown = set(against) - set(TORCH_VARIANTS)
    if unknown:
        raise UsageError(f"unknown contender {unknown.pop()!r}; known: {', '.join(TORCH_VARIANTS)}")
    options = options.resolved()
    inputs, targets = random_batch(config, options)
    B, T = inputs.shape
    with Model(config, options) as model:
        model.init(options.seed)
        contenders: dict[str, Step] = {
            "gptc": lambda: model.train_step(inputs, targets, lr=1e-4).loss
        }
        threads, peak = model.threads, model.peak_flops()
        for name in against:
            contenders[name] = _torch_step(config, name, options.device, threads, inputs, targets)
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
            peak = max(peak, model.peak_flops())  # of a machine that others use too
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
    rivals = bench["results"][1:]
    if len(rivals) > 1:
        best = min(rivals, key=lambda row: row["ratio"])
        lines.append(f"against the best of PyTorch, {best['name']}: {best['ratio']:.2f} x")
    lines.append(f"{bench['dtype']} peak: {bench['peak_flops'] / 1e9:,.0f} GFLOP/s, measured")
    return "\n".join(lines)


def random_batch(config: GPTConfig, options: Options) -> tuple[TokenArray, TokenArray]:
    """Random inputs and targets, (B, T) each."""
    B, T = options.max_batch, options.max_seq or config.block_size
    random = np.random.default_rng(options.seed)
    tokens = random.integers(0, config.vocab_size, (B, T + 1)).astype(np.int32)
    return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


def _result(name: str, times: dict[str, list[float]], n_tokens: int, loss: float) -> Result:
    own, ours = times[name], times["gptc"]
    step_s = statistics.median(own)
    ratio = None
    if name != "gptc":
        ratio = statistics.median(theirs / our for theirs, our in zip(own, ours, strict=True))
    return Result(name, step_s * 1e3, n_tokens / step_s, max(own) / min(own), loss, ratio)


def import_torch(device: str, threads: int) -> Any:
    """PyTorch with this number of threads. GptcError where it is missing or has no GPU."""
    try:
        import torch
    except ImportError:
        raise GptcError(f"comparing with PyTorch needs it: {pip_install('torch')}") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise GptcError("this PyTorch uses no GPU; compare with it on --device cpu")
    if device == "cpu":
        torch.set_num_threads(threads)
    return torch


def _torch_step(
    config: GPTConfig, name: str, device: str, threads: int, inputs: Any, targets: Any
) -> Step:
    """The same step in PyTorch, written as nanoGPT writes it."""
    import_torch(device, threads)
    from gptc.bench.torch import make_step

    step: Step = make_step(
        config, inputs, targets, device, bf16="bf16" in name, compiled="compiled" in name
    )
    return step
