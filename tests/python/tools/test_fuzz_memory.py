"""Memory that a reader takes for a damaged file is found, traced or not.

The class of fault: a file of a few bytes that takes as much memory as it claims to need.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fuzzing import fuzz

from model_files import Target  # isort: skip


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize(
    "read",
    [
        lambda: bytearray(24 << 20),
        lambda: ["x" * 60] * (3 << 20),
        lambda: [b"x" * (i + 60_000) for i in range(500)],
    ],
)
def test_too_much_memory_fails(tmp_path: Path, read: Callable[[], object], traced: bool) -> None:
    path = tmp_path / "x"
    with pytest.raises(fuzz.Failed, match=r"allocated \d\d,\d{3},\d{3} bytes for a file of 5"):
        fuzz.attempt(Target(path, read), b"whole", traced)
    assert fuzz.attempt(Target(path, lambda: None), b"whole", traced) == "read"


def test_every_so_many_cases_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"whole")
    traced: list[bool] = []
    monkeypatch.setattr(fuzz, "attempt", lambda target, content, every: traced.append(every))
    fuzz.fuzz("x", Target(path, lambda: None), range(3, 8), 0, trace_every=3)
    assert traced == [True, False, False, True, False]
