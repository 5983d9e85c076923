"""How .ci/run runs stages at the same time: what fails, what it counts, and what it leaves."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

CI = Path(__file__).parents[2] / ".ci" / "run"
STAGES = """
side() {
    stage first
    true
    stage second
    inner
}
inner() { stage third; %s; echo done; }
start_side side
stage main
%s
stage rest
wait_side side
"""


def run(tmp_path: Path, inner: str, main: str) -> subprocess.CompletedProcess[str]:
    """The stages above, with the functions of .ci/run."""
    text = CI.read_text()
    begin = text.index("mkdir -p build\n")
    functions = text[begin : text.index("trap 'finish $?' EXIT\n")]
    script = f"set -euo pipefail\n{functions}trap 'finish $?' EXIT\n{STAGES % (inner, main)}"
    return subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )


def is_running(pid: str) -> bool:
    """Whether a process is there, and has not ended without its parent's notice."""
    try:
        return (Path("/proc") / pid / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end_with_complaint(started: list[str]) -> None:
    """Fails if any of these processes has not ended, and ends it."""
    ends = time.monotonic() + 10  # a signal takes effect a little later
    while (left := [pid for pid in started if is_running(pid)]) and time.monotonic() < ends:
        time.sleep(0.02)
    for pid in left:
        subprocess.run(["kill", pid], check=False)
    assert not left


@pytest.mark.parametrize("inner", ["false", "false | cat", "false || { echo why; exit 3; }"])
def test_a_failure_at_the_same_time_fails_the_run(tmp_path: Path, inner: str) -> None:
    ran = run(tmp_path, inner, "true")
    assert ran.returncode not in (0, 2), ran.stderr
    assert "FAILED  third (at the same time)" in ran.stdout
    assert "ok      second (at the same time)" in ran.stdout
    assert "done" not in ran.stdout
    assert run(tmp_path, "true", "true").returncode == 0


@pytest.mark.parametrize("main", ["true", "sleep 3"])  # the side ends later, or before
def test_cpu_seconds_are_those_of_their_stage(tmp_path: Path, main: str) -> None:
    busy = f"{sys.executable} -c 'import time\nwhile time.process_time() < 1.1: pass'"
    ran = run(tmp_path, busy, main)
    found = re.findall(r"(\d+) CPU s  (?:ok      )?(\w+)", ran.stdout)
    assert {name: int(seconds) for seconds, name in found} == {
        "first": 0,
        "second": 0,
        "third": 1,
        "main": 0,
        "rest": 0,
        "in": 1,
    }, ran.stdout


def test_a_failure_of_the_main_stages_leaves_no_process(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # Its first process ends, and it starts others while those after the first are being ended.
    inner = (
        f"note() {{ echo $! >>{pids}; }}; sleep 300 & note; local first=$!; sleep 301 & note; "
        f"sleep 302 & note; wait $first || true; sleep 303 & note; sleep 304"
    )
    ran = run(
        tmp_path, inner, f'until [ "$(wc -l 2>/dev/null <{pids})" = 3 ]; do sleep 0.05; done; false'
    )
    assert ran.returncode == 1, ran.stderr
    assert "FAILED  main" in ran.stdout
    end_with_complaint(pids.read_text().split())


def test_a_failure_at_the_same_time_leaves_no_process(tmp_path: Path) -> None:
    """What a side has started, such as an installation for a later stage, ends with it."""
    pids = tmp_path / "pids"
    ran = run(tmp_path, f"sleep 300 & echo $! >{pids}; false", "true")
    assert "FAILED  third (at the same time)" in ran.stdout
    end_with_complaint(pids.read_text().split())
