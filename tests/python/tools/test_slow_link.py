"""Two ranks over a link that tools/measure/slow_link.py makes, where the machine allows it."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[3] / "tools" / "measure" / "slow_link.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slow_link", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_rank_is_in_a_namespace_of_the_link(tool: ModuleType, tmp_path: Path) -> None:
    if lacks := tool.missing():
        pytest.skip(f"needs {lacks}")
    with tool.network("100mbit"):
        show = ["tc", "-n", tool.SPACES[1], "qdisc", "show", "dev", f"{tool.SPACES[1]}-0"]
        assert "rate 100Mbit" in subprocess.run(show, capture_output=True, text=True).stdout
        command = [*tool.mpirun(tmp_path), "hostname"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert sorted(ran.stdout.split()) == sorted(tool.SPACES), ran.stderr
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in spaces for name in tool.SPACES)
