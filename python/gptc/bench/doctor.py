"""What this machine has, and whether everything that should work on it does.

    report = examine()

The self-test trains a tiny model of each family wherever models can run. The CPU in fp32 is checked
by itself, its gradient against differences of its losses; every other place is checked against it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptc._version import __version__
from gptc.engine import levels, library
from gptc.engine.arrays import FloatArray, TokenArray
from gptc.engine.config import GPTConfig
from gptc.engine.model import Model
from gptc.engine.optim import AdamW
from gptc.errors import GptcError
from gptc.files.words import amount, pip_install, plural

# Optional distributions and their purpose. No extras: gptc on PyPI is another project.
PACKAGES = (
    ("nvidia-cublas", "--device cuda without a CUDA toolkit"),
    ("pyarrow", "data in .parquet"),
    ("zstandard", "data in .zst"),
    ("sentencepiece", "SentencePiece tokenizers"),
    ("torch", "gptc bench train --against torch"),
)

# The largest relative errors: of the loss, of the gradient (all of it, as a vector) and of the loss
# after STEPS updates. bf16 keeps 8 bits, so one rounding is up to 0.4 %.
TOLERANCES = {"fp32": (1e-5, 1e-4, 1e-4), "bf16": (1e-3, 2e-2, 2e-3)}
QUANTIZED_TOLERANCES = {"int8": 2e-2, "int4": 2e-1}  # of the logits, as a vector
DIFFERENCES_TOLERANCE = 2e-2  # of the derivative along the gradient, by float32 losses
STEPS, LEARNING_RATE = 10, 3e-3

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2"},
    "llama": {"preset": "llama-15m", "n_kv_head": 2, "n_ff": 40},
    "byte": {"preset": "byte"},
}
BATCH, LENGTH = 2, 24


@dataclass(frozen=True)
class Check:
    """One line of the self-test."""

    name: str
    ok: bool
    detail: str
    seconds: float


def examine() -> dict[str, Any]:
    """The machine, the optional packages and the self-test, as plain values; `ok` if all passed."""
    report: dict[str, Any] = {"gptc": __version__, "machine": _machine()}
    report["packages"] = [
        {"name": name, "version": _version(name), "purpose": purpose, "install": pip_install(name)}
        for name, purpose in PACKAGES
    ]
    checks = [_check("libgpt.so", _open_library)]
    if checks[0].ok:
        report["library"] = _library()
        report["gpu"] = library.gpu()._asdict()
        checks += self_test()
        report["levels"] = [one.level for one in levels.times()]
    report["checks"] = [asdict(check) for check in checks]
    report["ok"] = all(check.ok for check in checks)
    return report


# ---- what there is ----


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "memory_bytes": _meminfo("MemTotal"),
        "available_bytes": _meminfo("MemAvailable"),
    }


def _library() -> dict[str, Any]:
    lib = library.load()
    return {
        "path": str(lib.path),
        "version": library.version(),
        "abi": lib.lib.gpt_abi_version(),
        "openblas": _openblas(),
        "cores": library.cpu_count(),
        "cpu_level": library.cpu_level(),
        "notice": library.cpu_notice(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _openblas() -> dict[str, str] | None:
    """The version and file of the OpenBLAS in this process that is not NumPy's (64-bit) one."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[-1] for line in lines if "openblas" in line}
    for file in sorted(files):
        if "openblas64" not in Path(file).name:
            return {"version": _openblas_version(file), "path": file}
    return None


def _openblas_version(file: str) -> str:
    """Such as "0.3.30", from "OpenBLAS 0.3.30  DYNAMIC_ARCH ..."."""
    library = ctypes.CDLL(file)
    for prefix in ("scipy_", ""):
        try:
            describe = library[f"{prefix}openblas_get_config"]
        except AttributeError:
            continue
        describe.restype = ctypes.c_char_p
        return str(describe().decode().split()[1])
    return "?"


# ---- the self-test ----


class Trace(NamedTuple):
    """What a tiny model did: a first loss, its gradient as one vector, and the loss STEPS later."""

    loss: float
    gradient: FloatArray
    last_loss: float


def self_test() -> Iterator[Check]:
    """Every family on every device in every dtype."""
    places = [("cpu", "bf16")]
    if library.gpu().problem is None:
        places += [("cuda", "fp32"), ("cuda", "bf16")]
    for family in SHAPES:
        yield _check(f"{family}, cpu fp32", partial(_by_itself, family))
        for device, dtype in places:
            yield _check(f"{family}, {device} {dtype}", partial(_compared, family, device, dtype))
        for device in dict.fromkeys(device for device, _ in places):
            for dtype in QUANTIZED_TOLERANCES:
                yield _check(
                    f"{family}, {device} {dtype}", partial(_quantized, family, device, dtype)
                )


def _check(name: str, run: Callable[[], str]) -> Check:
    """Runs a check, which returns what it found, or raises a GptcError that says what is wrong."""
    begin = time.perf_counter()
    try:
        ok, detail = True, run()
    except GptcError as error:
        ok, detail = False, str(error)
    return Check(name, ok, detail, round(time.perf_counter() - begin, 3))


def _open_library() -> str:
    return f"ABI {library.load().lib.gpt_abi_version()}, as gpt.h describes it"


def _by_itself(family: str) -> str:
    """The gradient against the differences of losses along it."""
    trace = _trace(family, "cpu", "fp32")
    norm = float(np.linalg.norm(trace.gradient))
    with _model(family, "cpu", "fp32") as model:
        start, step = model.parameters(), 1e-2 / norm
        ahead, behind = (
            _loss_at(model, start, sign * step * trace.gradient) for sign in (1.0, -1.0)
        )
    slope = (ahead - behind) / (2 * step * norm)
    return _judge(
        trace, {"slope along the gradient": (abs(slope / norm - 1), DIFFERENCES_TOLERANCE)}
    )


def _compared(family: str, device: str, dtype: str) -> str:
    """A place against the CPU in fp32."""
    trace, reference = _trace(family, device, dtype), _trace(family, "cpu", "fp32")
    difference = np.linalg.norm(trace.gradient - reference.gradient)
    errors = (
        abs(trace.loss / reference.loss - 1),
        float(difference / np.linalg.norm(reference.gradient)),
        abs(trace.last_loss / reference.last_loss - 1),
    )
    names = ("loss", "gradient", f"loss after {STEPS} steps")
    # TF32 rounds what is multiplied to 11 bits, on the GPU and where it is asked for.
    tf32 = device == "cuda" and os.environ.get("GPTC_TF32", "0") != "0"
    limits = TOLERANCES["bf16" if tf32 else dtype]
    return _judge(trace, dict(zip(names, zip(errors, limits, strict=True), strict=True)))


def _quantized(family: str, device: str, dtype: str) -> str:
    """Logits of rounded weights, which cannot be trained, against those of float32 ones."""
    x, _ = _batch()
    with _model(family, device, dtype) as model, _model(family, "cpu", "fp32") as reference:
        got, want = model.logits(x), reference.logits(x)
        with model.session() as session:  # a single row goes another way than many
            session.decode(x[0, :-1])
            last = session.decode(x[0, -1:])
    errors = [
        float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for a, b in ((got, want), (last, want[0, -1]))
    ]
    limit = QUANTIZED_TOLERANCES[dtype]
    words = f"logits off by {errors[0]:.1e}, decoded ones by {errors[1]:.1e}, of {limit:.0e}"
    if not max(errors) <= limit:
        raise GptcError(words)
    return words


def _judge(trace: Trace, errors: dict[str, tuple[float, float]]) -> str:
    """The errors in words, each with its limit; a GptcError where one is above it, or is NaN."""
    words = ", ".join(
        f"{name} off by {e:.1e} of {limit:.0e}" for name, (e, limit) in errors.items()
    )
    words += f"; {trace.loss:.3f} to {trace.last_loss:.3f} in {STEPS} steps"
    if not all(error <= limit for error, limit in errors.values()):
        raise GptcError(words)
    if not trace.last_loss < trace.loss:
        raise GptcError(f"{words}: nothing was learned")
    return words


@lru_cache(maxsize=2 * len(SHAPES))
def _trace(family: str, device: str, dtype: str) -> Trace:
    x, y = _batch()
    with _model(family, device, dtype) as model:
        loss = model.backward(x, y)
        gradient = np.concatenate([g.ravel() for g in model.gradients().values()])
        model.update(AdamW(lr=LEARNING_RATE))
        for _ in range(STEPS - 1):
            model.train_step(x, y, lr=LEARNING_RATE)
        return Trace(loss, gradient, model.loss(x, y))


def _model(family: str, device: str, dtype: str) -> Model:
    small = {"vocab_size": 256, "block_size": LENGTH, "n_layer": 2, "n_head": 4, "n_embd": 32}
    shape = {**small, **SHAPES[family]}
    config = GPTConfig.preset(shape.pop("preset"), **shape)
    return Model.create(
        config,
        device=device,
        dtype=dtype,
        training=dtype in TOLERANCES,
        max_batch=BATCH,
        max_seq=LENGTH,
        seed=1,
    )


def _batch() -> tuple[TokenArray, TokenArray]:
    tokens = np.random.default_rng(1).integers(0, 256, (BATCH, LENGTH + 1)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def _loss_at(model: Model, start: dict[str, FloatArray], offset: FloatArray) -> float:
    """The loss where the parameters are `start` plus `offset`, one vector for all of them."""
    at = 0
    for name, values in start.items():
        part = offset[at : at + values.size].reshape(values.shape)
        model.set(name, (values + part).astype(np.float32))
        at += values.size
    return model.loss(*_batch())


# ---- as text ----


def _faster(found: list[str]) -> str:
    """Of the levels that measured ops take, how many are AMX."""
    return f"faster in {found.count('amx')} of {len(found)} measured ops; the others use AVX-512"


def table(report: dict[str, Any]) -> str:
    """The report of `examine` as lines to read."""
    machine, library, gpu = report["machine"], report.get("library"), report.get("gpu")
    rows = [
        ("system", machine["system"]),
        ("python", f"{machine['python']}, numpy {machine['numpy']}"),
        (
            "memory",
            f"{_amount(machine['memory_bytes'])}, {_amount(machine['available_bytes'])} free",
        ),
    ]
    if library:
        blas = library["openblas"]
        rows += [
            ("cpu", f"{plural(library['cores'], 'core')}, level {library['cpu_level']}"),
            *([("", library["notice"])] if library["notice"] else []),
            *([("AMX", _faster(report["levels"]))] if report.get("levels") else []),
            ("library", f"{library['path']}, {library['version']}, ABI {library['abi']}"),
            ("OpenBLAS", f"{blas['version']}, {blas['path']}" if blas else "not used"),
        ]
    if gpu:
        rows += _gpu_rows(gpu)
    for package in report["packages"]:
        found = package["version"] or f"not installed: {package['install']}"
        rows.append((package["name"], f"{found} (for {package['purpose']})"))
    lines = [f"gptc {report['gptc']}", *(f"  {name:14}{value}" for name, value in rows), ""]
    for check in report["checks"]:
        lines.append(f"{'PASS' if check['ok'] else 'FAIL'}  {check['name']:18}{check['detail']}")
    n_failed = sum(not check["ok"] for check in report["checks"])
    seconds = sum(check["seconds"] for check in report["checks"])
    result = f"{n_failed} of {len(report['checks'])} checks failed" if n_failed else "all is well"
    return "\n".join([*lines, "", f"{result} ({seconds:.1f} s)"])


def _gpu_rows(gpu: dict[str, Any]) -> list[tuple[str, str]]:
    if not gpu["name"]:
        return [("GPU", f"none: {gpu['problem']}")]
    rows = [
        (
            "GPU",
            f"{gpu['name']}, {amount(gpu['memory_bytes'])}, {amount(gpu['free_bytes'])} free, "
            f"compute capability {gpu['capability']}, "
            f"{plural(gpu['multiprocessors'], 'multiprocessor')}",
        ),
        ("CUDA", f"{gpu['runtime']}; the driver serves up to {gpu['driver']}"),
        ("cuBLASLt", gpu["products"] or "not found"),
    ]
    return [*rows, ("", gpu["problem"])] if gpu["problem"] else rows


def _amount(n_bytes: int | None) -> str:
    return "?" if n_bytes is None else amount(n_bytes)
