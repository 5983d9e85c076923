"""Times every op inside training steps: its rate, and its share of the machine's peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gptc.bench.train import import_torch, random_batch
from gptc.engine import levels
from gptc.engine.config import GPTConfig
from gptc.engine.model import Model, OpTime, ProductTime
from gptc.engine.options import Options


def bench_ops(
    config: GPTConfig, options: Options, *, steps: int = 5, against_torch: bool = False
) -> dict[str, Any]:
    """Times every op of training steps as they run, with their rates and shares of the peaks.

    With `against_torch`, PyTorch multiplies matrices of the linear layers' shapes in the same dtype
    between the steps, without their biases and activations, which ours include.

    Returns plain data: what was run, the machine's `peak_flops` and `peak_bytes`, and `ops`, the
    costliest first; of each the time for one step, and `torch_ratio`, PyTorch's time over ours. On
    a GPU, `products` has each GEMM of its library: shape, epilogue, plan, time, and a `problem`.
    On a CPU with AMX, `levels` has the times of ops with AVX-512 and with AMX, which are measured
    first.
    """
    options = options.resolved()
    inputs, targets = random_batch(config, options)
    ops: dict[str, list[OpTime]] = {}
    gemms: dict[tuple[str, str, str], ProductTime] = {}
    theirs: dict[str, list[float]] = {}
    seconds = peak_flops = peak_bytes = 0.0
    with Model(config, options) as model:
        model.init(options.seed)
        products: dict[str, Callable[[], object]] = {}
        busy = [0.0] * model.threads
        if options.device == "cpu":
            levels.measure(lambda: model.train_step(inputs, targets, lr=1e-4))
        for turn in range(-2, steps):  # two to warm up
            begin = time.perf_counter()
            with model.profile() as profile:
                model.train_step(inputs, targets, lr=1e-4)
            step_s = time.perf_counter() - begin
            if turn < 0:
                continue
            if against_torch and not products:
                names = [op.name for op in profile.ops if op.name.startswith("linear_")]
                products = _torch_products(names, inputs.size, options, model.threads)
            seconds += step_s
            peak_flops = max(peak_flops, model.peak_flops())  # of a machine that others use too
            peak_bytes = max(peak_bytes, model.peak_bytes())
            busy = [a + b for a, b in zip(busy, profile.busy_s, strict=True)]
            for op in profile.ops:
                ops.setdefault(op.name, []).append(op)
            for gemm in profile.products:
                _add_product(gemms, gemm)
            for name, product in products.items():
                theirs.setdefault(name, []).append(_best_of_two(product))
        threads = model.threads
    rows = [
        _op_row(name, times, theirs.get(name), steps, seconds, peak_flops, peak_bytes)
        for name, times in ops.items()
    ]
    in_ops = sum(row["ms"] for row in rows) * steps / 1e3
    return {
        "config": config.to_dict(),
        "batch_size": inputs.shape[0],
        "seq_len": inputs.shape[1],
        "device": options.device,
        "dtype": options.dtype,
        "threads": threads,
        "steps": steps,
        "step_ms": seconds / steps * 1e3,
        "peak_flops": peak_flops,
        "peak_bytes": peak_bytes,
        "busy": [thread / in_ops for thread in busy],
        "ops": sorted(rows, key=lambda row: -row["ms"]),
        "products": sorted(
            (_product_row(gemm, steps, peak_flops) for gemm in gemms.values()),
            key=lambda row: -row["ms"],
        ),
        "levels": [
            one._asdict() | {"level": one.level}
            for one in (levels.times() if options.device == "cpu" else [])
        ],
    }


def _add_product(gemms: dict[tuple[str, str, str], ProductTime], gemm: ProductTime) -> None:
    """Sums a GEMM over the steps. Several of one shape may differ in how they are aligned."""
    key = (gemm.name, gemm.epilogue, gemm.plan)
    so_far = gemms.get(key)
    if so_far is None:
        gemms[key] = gemm
        return
    gemms[key] = replace(
        so_far,
        calls=so_far.calls + gemm.calls,
        seconds=so_far.seconds + gemm.seconds,
        flops=so_far.flops + gemm.flops,
        bytes=so_far.bytes + gemm.bytes,
    )


def _product_row(gemm: ProductTime, steps: int, peak_flops: float) -> dict[str, Any]:
    """A GEMM for one step. One that the library refused took no time."""
    flops_per_s = gemm.flops / gemm.seconds if gemm.seconds else 0.0
    return {
        "name": gemm.name,
        "epilogue": gemm.epilogue,
        "plan": gemm.plan,
        "problem": gemm.problem,
        "calls": gemm.calls / steps,
        "ms": gemm.seconds / steps * 1e3,
        "flops_per_s": flops_per_s,
        "bytes_per_s": gemm.bytes / gemm.seconds if gemm.seconds else 0.0,
        "of_peak_flops": flops_per_s / peak_flops,
    }


def _op_row(
    name: str,
    times: list[OpTime],
    theirs: list[float] | None,
    steps: int,
    step_s: float,
    peak_flops: float,
    peak_bytes: float,
) -> dict[str, Any]:
    """One op summed over the steps, with PyTorch's seconds for one call of it."""
    seconds = sum(op.seconds for op in times)
    flops_per_s = sum(op.flops for op in times) / seconds
    bytes_per_s = sum(op.bytes for op in times) / seconds
    ratio = None
    if theirs:
        pairs = zip(theirs, times, strict=True)
        ratio = statistics.median(torch_s * op.calls / op.seconds for torch_s, op in pairs)
    return {
        "name": name,
        "calls": sum(op.calls for op in times) / steps,
        "ms": seconds / steps * 1e3,
        "share": seconds / step_s,
        "flops_per_s": flops_per_s,
        "bytes_per_s": bytes_per_s,
        "of_peak_flops": flops_per_s / peak_flops,
        "of_peak_bytes": bytes_per_s / peak_bytes,
        "torch_ratio": ratio,
    }


def _best_of_two(call: Callable[[], object]) -> float:
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def table(bench: dict[str, Any]) -> str:
    """The result of `bench_ops` as lines to read."""
    with_torch = any(op["torch_ratio"] for op in bench["ops"])
    lines = [
        f"B {bench['batch_size']}, T {bench['seq_len']}, {bench['device']} {bench['dtype']}, "
        f"{bench['threads']} threads; mean of {bench['steps']} steps of {bench['step_ms']:.1f} ms",
        f"{'':34}{'calls':>6}{'ms/step':>10}{'share':>7}{'GFLOP/s':>10}{'of peak':>9}"
        f"{'GB/s':>8}{'of peak':>9}{'torch/gptc' if with_torch else '':>12}",
    ]
    for op in bench["ops"]:
        products = f"{op['flops_per_s'] / 1e9:10.0f}{op['of_peak_flops']:9.0%}"
        lines.append(
            f"{op['name']:34}{op['calls']:6.0f}{op['ms']:10.3f}{op['share']:7.1%}"
            f"{products if op['flops_per_s'] else '':19}"
            f"{op['bytes_per_s'] / 1e9:8.1f}{op['of_peak_bytes']:9.0%}"
            + (f"{op['torch_ratio']:10.2f} x" if op["torch_ratio"] else "")
        )
    lines += _product_lines(bench["products"])
    lines += _level_lines(bench["levels"])
    rest = bench["step_ms"] - sum(op["ms"] for op in bench["ops"])
    lines.append(f"{'outside ops':40}{rest:10.3f}{rest / bench['step_ms']:7.1%}")
    busy = ", ".join(f"{share:.0%}" for share in bench["busy"])
    lines.append(f"of the time in ops, each thread was at work for: {busy}")
    lines.append(
        f"peaks, measured: {bench['peak_flops'] / 1e9:,.0f} GFLOP/s in {bench['dtype']}; "
        f"{bench['peak_bytes'] / 1e9:.1f} GB/s copying memory (data in cache can be faster)"
    )
    return "\n".join(lines)


def _product_lines(products: list[dict[str, Any]]) -> list[str]:
    """GEMMs of the device's library. A line that ends with ! has a problem."""
    if not products:
        return []
    head = "GEMMs of the library"
    lines = [f"{head:40}{'calls':>6}{'ms/step':>10}{'TFLOP/s':>9}{'of peak':>9}{'GB/s':>8}  plan"]
    for row in products:
        name = f"{row['name']} {row['epilogue']}".rstrip()
        rates = (
            f"{row['flops_per_s'] / 1e12:9.1f}{row['of_peak_flops']:9.0%}"
            f"{row['bytes_per_s'] / 1e9:8.0f}"
        )
        problem = f"! {row['problem']}" if row["problem"] else ""
        lines.append(
            f"{name:40}{row['calls']:6.0f}{row['ms']:10.3f}{rates if row['ms'] else '':26}  "
            + "; ".join(filter(None, [row["plan"], problem]))
        )
    return lines


def _level_lines(measured: list[dict[str, Any]]) -> list[str]:
    """All ops of this CPU that were timed with AVX-512 and with AMX."""
    if not measured:
        return []
    lines = [f"{'the fastest call, kept in the cache':40}{'AVX-512 ms':>13}{'AMX ms':>10}  taken"]
    for one in measured:
        name = f"{one['op']} {one['a']} x {one['b']}, {one['rows']} rows"
        lower, upper = (1e3 * s for s in one["seconds"])
        lines.append(f"{name:40}{lower:13.3f}{upper:10.3f}  {one['level']}")
    return lines


def _torch_products(
    names: list[str], rows: int, options: Options, threads: int
) -> dict[str, Callable[[], object]]:
    """PyTorch's products of these ops, once warm."""
    torch = import_torch(options.device, threads)
    from gptc.bench.torch import make_product

    with torch.no_grad():
        products = {
            name: make_product(name, rows, options.device, bf16=options.dtype == "bf16")
            for name in names
        }
        for product in products.values():
            product()
    return products
