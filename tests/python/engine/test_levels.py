"""Times of ops with AVX-512 and with AMX, kept for one CPU and one version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptc.bench.ops import bench_ops, table
from gptc.engine import levels, library
from gptc.engine.config import GPTConfig
from gptc.engine.levels import LevelTimes
from gptc.engine.options import Options

_FAST = LevelTimes("linear_forward", 1, 768, 2304, 1024, (2.0, 0.5))
_SLOW = LevelTimes("attention_decode", 3, 12, 64, 16, (0.25, 0.75))
_HAS_AMX = library.cpu_level() == "amx"


class _Library:
    """What `levels` calls of a library with AMX: it holds these times."""

    def __init__(self, held: list[LevelTimes], version: str = "1.2") -> None:
        self.held, self.version, self.measuring = list(held), version, 0

    def gpt_version(self) -> Any:
        self._text = library.load().ffi.new("char[]", self.version.encode())
        return self._text

    def gpt_cpu_set_times(self, t: Any) -> int:
        name = library.load().ffi.string(t.op).decode()
        self.held.append(LevelTimes(name, t.dtype, t.a, t.b, t.rows, (*t.seconds,)))
        return 0

    def gpt_cpu_times(self, i: int, out: Any) -> int:
        if i >= len(self.held):
            return library.GPT_ERR_ARGUMENT
        one = self.held[i]
        out.op, out.dtype, out.a, out.b, out.rows = one.op.encode(), *one[1:-1]
        out.seconds = list(one.seconds)
        return 0

    def gpt_cpu_measure(self, on: int) -> int:
        self.measuring = on
        return 0


def _use(monkeypatch: pytest.MonkeyPatch, lib: _Library, cpu: str = "a CPU") -> None:
    whole = library.load()
    monkeypatch.setattr(library, "load", lambda: library.Library(whole.ffi, lib, whole.path))
    monkeypatch.setattr(library, "cpu_name", lambda: cpu)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path))
    return tmp_path / "plans" / "cpu.json"


def _kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes _FAST and _SLOW to the cache, as measured by version 1.2 on "a CPU"."""
    lib = _Library([_FAST, _SLOW])
    _use(monkeypatch, lib)
    monkeypatch.setattr(levels, "has_choice", lambda: True)
    runs = []
    levels.measure(lambda: runs.append(lib.measuring))
    assert runs == [1] * 8
    assert lib.measuring == 0


def _restored(version: str = "1.2") -> list[LevelTimes]:
    lib = _Library([], version)
    whole = library.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load", lambda: library.Library(whole.ffi, lib, whole.path))
        patch.setattr(levels, "_is_restored", False)
        levels.restore(lambda: None)
    return lib.held


def test_times_come_back(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _kept(monkeypatch)
    assert _restored() == [_FAST, _SLOW]
    assert [one.level for one in _restored()] == ["amx", "avx512bf16"]


def test_the_first_model_measures(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, _Library([]))
    monkeypatch.setattr(levels, "has_choice", lambda: True)
    monkeypatch.setattr(levels, "_is_restored", False)
    runs = []
    for _ in range(2):
        levels.restore(lambda: runs.append(1))
    assert runs == [1]
    _kept(monkeypatch)
    monkeypatch.setattr(levels, "_is_restored", False)
    levels.restore(lambda: runs.append(1))
    assert runs == [1]


def test_times_are_of_one_cpu_and_one_version(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _kept(monkeypatch)
    assert _restored("1.3") == []
    monkeypatch.setattr(library, "cpu_name", lambda: "another CPU")
    assert _restored() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "times": 3}),
        lambda text: text.replace('"rows"', '"lines"', 1),
        lambda text: text.replace("2.0", "-2.0", 1),
        lambda text: text.replace("2.0", "NaN", 1),
        lambda text: text.replace("2304", "2304000000000000", 1),
        lambda text: text.replace("linear_forward", "linear_forward" * 9, 1),
        lambda text: text.replace("2304", '"wide"', 1),
    ],
)
def test_a_damaged_file_is_as_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    _kept(monkeypatch)
    cache.write_text(change(cache.read_text()))
    assert _FAST not in _restored()
    cache.unlink()
    assert _restored() == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "file"))
    _kept(monkeypatch)
    assert _restored() == []


def test_measuring_ends_with_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = _Library([_FAST])
    _use(monkeypatch, lib)
    monkeypatch.setattr(levels, "has_choice", lambda: True)

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        levels.measure(fail)
    assert lib.measuring == 0
    assert not cache.exists()


def test_a_named_level_is_not_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTC_CPU_LEVEL", "portable")
    levels.measure(lambda: pytest.fail("it ran"))
    assert levels.times() == []


_SHAPE = GPTConfig.preset("tiny", block_size=32, n_layer=1, vocab_size=97)


def test_bench_ops_measures_both_levels(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTC_CPU_LEVEL", raising=False)
    result = bench_ops(_SHAPE, Options("cpu", "bf16", max_batch=2, max_seq=32), steps=1)
    names = {one["op"] for one in result["levels"]}
    lines = table(result)
    if not _HAS_AMX:
        assert not names
        assert "AMX" not in lines
        assert not cache.exists()
        return
    assert {"linear_forward", "attention_backward", "classifier_backward"} <= names
    assert lines.count("taken") == 1
    assert {one["op"] for one in json.loads(cache.read_text())["times"]} == names
    assert {(one["a"], one["b"]) for one in result["levels"]} >= {(96, 288), (96, 97)}
