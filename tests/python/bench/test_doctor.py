"""`gptc doctor` describes the machine, and fails exactly if something does not work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.bench import doctor
from gptc.bench.doctor import Trace
from gptc.engine import library
from gptc.errors import GptcError
from gptc.files.words import pip_install

Gptc = Callable[..., Any]

NO_GPU = library.Gpu("no GPU on this machine", "", "", 0, "", "13.0", "", 0, 0)
A_GPU = library.Gpu(
    None, "Card 9", "9.0", 132, "13.0", "12.8", "12.8.1, lib/it", 150 << 30, 149 << 30
)


@pytest.fixture
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "gpu", lambda: NO_GPU)


def spoil(monkeypatch: pytest.MonkeyPatch, which: str, **changes: Any) -> None:
    """Makes the traces of a dtype differ from the expected ones."""
    honest = doctor._trace

    def trace(family: str, device: str, dtype: str) -> Trace:
        found = honest(family, device, dtype)
        if dtype != which:
            return found
        return found._replace(**{name: change(found) for name, change in changes.items()})

    monkeypatch.setattr(doctor, "_trace", trace)


def failed(report: dict[str, Any]) -> set[str]:
    return {check["name"] for check in report["checks"] if not check["ok"]}


def test_it_describes_the_machine_and_passes_where_all_is_well(gptc: Gptc) -> None:
    ran = gptc("doctor", "--json")
    report = json.loads(ran.out)
    assert (ran.code, failed(report), report["ok"]) == (0, set(), True)
    assert report["machine"]["memory_bytes"] > report["machine"]["available_bytes"] > 0
    assert report["library"]["cores"] == library.cpu_count()
    assert report["library"]["path"] == str(library.load().path)
    assert bool(report["gpu"]["problem"]) == (library.gpu().problem is not None)
    places = ["cpu fp32", "cpu bf16"]
    places += [] if library.gpu().problem else ["cuda fp32", "cuda bf16"]
    places += ["cpu int8", "cpu int4"]
    places += [] if library.gpu().problem else ["cuda int8", "cuda int4"]
    names = [check["name"] for check in report["checks"]]
    assert names == ["libgpt.so", *(f"{f}, {p}" for f in ("gpt2", "llama", "byte") for p in places)]
    assert all(check["detail"] for check in report["checks"])


def test_nothing_is_installed_by_a_name_that_is_another_projects() -> None:
    """gptc is not on PyPI: the package of that name there is a different one."""
    for folder, kind in (("python/gptc", "*.py"), ("docs", "*.md")):
        for file in (Path(__file__).parents[3] / folder).rglob(kind):
            assert not re.search(r"install \W*gptc\[", file.read_text()), file


@pytest.mark.usefixtures("_without_gpu")
def test_as_text(gptc: Gptc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", (("no-such-thing", "nothing"),))
    ran = gptc("doctor")
    assert ran.code == 0
    assert "  GPU           none: no GPU on this machine\n" in ran.out
    install = pip_install("no-such-thing")
    assert f"  no-such-thing not installed: {install} (for nothing)\n" in ran.out
    assert ran.out.count("\nPASS") == 13
    assert "FAIL" not in ran.out
    assert "all is well" in ran.out


@pytest.mark.usefixtures("_without_gpu")
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"gradient": lambda t: 1.5 * t.gradient}, "gradient off by 5.0e-01"),
        ({"gradient": lambda t: np.nan * t.gradient}, "gradient off by nan"),
        ({"loss": lambda t: 1.01 * t.loss}, "loss off by 1.0e-02"),
        ({"last_loss": lambda t: 0.9 * t.last_loss}, "loss after 10 steps off by 1.0e-01"),
    ],
)
def test_a_place_that_computes_something_else_fails(
    gptc: Gptc, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], word: str
) -> None:
    spoil(monkeypatch, "bf16", **changes)
    ran = gptc("doctor", "--json")
    report = json.loads(ran.out)
    assert (ran.code, report["ok"]) == (1, False)
    assert failed(report) == {f"{family}, cpu bf16" for family in doctor.SHAPES}
    assert all(word in check["detail"] for check in report["checks"] if not check["ok"])
    assert "3 of 13 checks failed" in doctor.table(report)


@pytest.mark.usefixtures("_without_gpu")
def test_quantized_weights_that_are_too_coarse_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "QUANTIZED_TOLERANCES", {"int4": 2e-3})
    report = doctor.examine()
    assert failed(report) == {f"{family}, cpu int4" for family in doctor.SHAPES}


@pytest.mark.usefixtures("_without_gpu")
def test_the_reference_itself_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "fp32", gradient=lambda t: 0.9 * t.gradient)
    names = failed(doctor.examine())
    assert {f"{family}, cpu fp32" for family in doctor.SHAPES} <= names


def test_a_gpu_is_described_and_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.gpu().problem is None:
        pytest.skip("this machine has a GPU")
    problem = library.gpu().problem
    monkeypatch.setattr(library, "gpu", lambda: A_GPU)
    report = doctor.examine()
    # Its report says that it works; the engine's check fails.
    on_gpu = [check for check in report["checks"] if "cuda" in check["name"]]
    assert len(on_gpu) == 12
    assert all(check["detail"] == problem and not check["ok"] for check in on_gpu)
    text = doctor.table(report)
    assert "Card 9, 161 GB, 160 GB free, compute capability 9.0, 132 multiprocessors\n" in text
    assert "  CUDA          12.8; the driver serves up to 13.0\n" in text


def test_a_gpu_that_only_lacks_a_library_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = A_GPU._replace(problem="libcublasLt.so.12 was not found", products="")
    monkeypatch.setattr(library, "gpu", lambda: gpu)
    report = doctor.examine()
    assert report["ok"]
    assert "cuBLASLt      not found\n                libcublasLt.so.12 was" in doctor.table(report)


def test_a_library_that_does_not_load_is_said_and_fails(
    gptc: Gptc, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise GptcError("libgpt.so does not load")

    monkeypatch.setattr(library, "load", broken)
    ran = gptc("doctor")
    assert ran.code == 1
    assert "FAIL  libgpt.so         libgpt.so does not load\n" in ran.out
    assert "  python " in ran.out


def test_tf32_is_judged_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Trace(5.0, np.ones(4, np.float32), 4.0)
    rounded = reference._replace(gradient=np.full(4, 1.001, np.float32))
    monkeypatch.setattr(
        doctor, "_trace", lambda family, device, dtype: rounded if device == "cuda" else reference
    )
    monkeypatch.delenv("GPTC_TF32", raising=False)
    with pytest.raises(GptcError, match="gradient off by 1"):
        doctor._compared("gpt2", "cuda", "fp32")
    monkeypatch.setenv("GPTC_TF32", "1")
    assert "gradient off by 1" in doctor._compared("gpt2", "cuda", "fp32")
