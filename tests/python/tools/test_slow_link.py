"""Two ranks over a link that tools/measure/slow_link.py makes, where the machine allows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mpi_jobs import ours
from tool_files import load_tool

FILE = Path(__file__).resolve().parents[3] / "tools" / "measure" / "slow_link.py"


# Answers "refused" over the network, and prints how long that has taken.
_CALL = """
import socket, sys, time
begin = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 9), timeout=60)
except ConnectionRefusedError:
    print(time.monotonic() - begin)
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FILE.parent))
    return load_tool("measure/slow_link")


@pytest.mark.parametrize(("ranks", "latency_s"), [(2, 0), (3, 0.03)])
def test_each_rank_is_in_a_namespace_of_the_link(
    tool: ModuleType, tmp_path: Path, ranks: int, latency_s: float
) -> None:
    if lacks := tool.missing():
        pytest.skip(f"needs {lacks}")
    names = [tool.space(rank) for rank in range(ranks)]
    with tool.network("100mbit", ranks, latency_s):
        show = ["tc", "-n", names[1], "qdisc", "show", "dev", tool.CARD]
        assert "rate 100Mbit" in subprocess.run(show, capture_output=True, text=True).stdout
        command = [*tool.mpirun(tmp_path, ranks), "hostname"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        call = ["ip", "netns", "exec", names[0], sys.executable, "-c", _CALL]
        called = subprocess.run(
            [*call, tool.address(1)], capture_output=True, text=True, timeout=120
        )
    assert sorted(ran.stdout.split()) == sorted(names), ran.stderr
    assert float(called.stdout) >= 2 * latency_s, called.stderr
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert tool.space("") not in spaces


def test_ranks_that_cannot_reach_each_other_name_the_address(
    tool: ModuleType, tmp_path: Path
) -> None:
    """MPI is told to use a second network, in which nobody answers: frames go to no card."""
    if lacks := tool.missing():
        pytest.skip(f"needs {lacks}")
    with tool.network("100mbit"):
        for i, (own, other) in enumerate(("12", "21")):
            space = ["-n", tool.space(i)]
            tool.run("ip", *space, "link", "add", "d0", "type", "veth", "peer", "name", "d1")
            tool.run("ip", *space, "addr", "add", f"10.78.0.{own}/24", "dev", "d0")
            for device in ("d0", "d1"):
                tool.run("ip", *space, "link", "set", device, "up")
            nowhere = ["lladdr", "02:00:00:00:00:07", "nud", "permanent", "dev", "d0"]
            tool.run("ip", *space, "neigh", "add", f"10.78.0.{other}", *nowhere)
        start = tool.mpirun(tmp_path)
        start[start.index("btl_tcp_if_include") + 1] = "10.78.0.0/24"
        command = ["-m", "gptc", "train", "--comm-timeout", "2", "--out", str(tmp_path / "run")]
        ran = subprocess.run(
            [*start, sys.executable, *command],
            env=os.environ, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    (line,) = ours(ran.stderr)
    assert ran.returncode == 1
    assert line.startswith("gptc: error: no answer from rank 1 for 2 s; no connection to 10.78.0.2")
    assert "--mca btl_tcp_if_include" in line
    assert not (tmp_path / "run").exists()
