"""Programs that are prepared once answer each request in a copy of the process, within limits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptc.files import warm
from gptc.files.bounded import Fault
from gptc.files.warm import end_all, warm_answer

PROGRAM = """
import os, sys, time

def prepare(data):
    if data == b"loop":
        while True: pass
    if data == b"leave":
        os._exit(3)
    return [data, os.getpid()]

def answer(state, data):
    state.append(data)
    if data == b"memory":
        bytearray(1 << 29)
    if data == b"loop":
        while True: pass
    if data == b"pipes":
        os.write(1, b"xxxx")
        return str(os.read(0, 9)).encode()
    if data == b"files":
        open(os.devnull)
    if data == b"large":
        return b"x" * 3_000_000
    return f"{state[1]} {state[0].decode()} {len(state)} {len(data)}".encode()
"""
SPACE = 1 << 28


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    end_all()
    yield path
    end_all()


def ask(program: Path, data: bytes, prepared: bytes = b"a") -> list[str]:
    return warm_answer(program, prepared, data, 1, SPACE).decode().split()


def test_one_process_answers_all_requests_and_none_sees_another(program: Path) -> None:
    first, second = ask(program, b"abc"), ask(program, b"x" * 1_000_000)
    assert first[1:] == ["a", "3", "3"]
    assert second == [first[0], "a", "3", "1000000"]
    assert len(warm_answer(program, b"a", b"large", 1, SPACE)) == 3_000_000
    assert ask(program, b"abc") == first
    assert ask(program, b"pipes") == ["b''"]  # of standard input; nothing reaches the protocol
    assert ask(program, b"abc") == first
    other = ask(program, b"abc", b"b")
    assert other[0] != first[0]
    assert other[1] == "b"


@pytest.mark.parametrize(
    ("data", "fault"), [(b"memory", "crashes"), (b"loop", "longer than 1 s"), (b"files", "crashes")]
)
def test_a_request_that_fails_leaves_no_process(program: Path, data: bytes, fault: str) -> None:
    (pid, *_) = ask(program, b"abc")
    with pytest.raises(Fault, match=fault):
        ask(program, data)
    assert not Path(f"/proc/{pid}").exists()
    assert ask(program, b"abc")[0] != pid


@pytest.mark.parametrize(("data", "fault"), [(b"loop", "longer than 1 s"), (b"leave", "crashes")])
def test_preparing_that_fails_is_a_fault(program: Path, data: bytes, fault: str) -> None:
    with pytest.raises(Fault, match=fault):
        ask(program, b"abc", data)


def test_a_process_that_was_killed_is_replaced(program: Path) -> None:
    pid = int(ask(program, b"abc")[0])
    os.kill(pid, signal.SIGKILL)
    assert int(ask(program, b"abc")[0]) != pid


def test_few_processes_wait_and_no_file_stays_open(program: Path) -> None:
    n_before = len(list(Path("/proc/self/fd").iterdir()))
    pids = [ask(program, b"abc", f"{i}".encode())[0] for i in range(warm.MOST_IDLE + 2)]
    assert [Path(f"/proc/{pid}").exists() for pid in pids] == [False] * 2 + [True] * warm.MOST_IDLE
    end_all()
    assert len(list(Path("/proc/self/fd").iterdir())) == n_before


def test_a_forked_process_has_its_own(program: Path) -> None:
    first = ask(program, b"abc")
    if (child := os.fork()) == 0:
        own = ask(program, b"abc")
        end_all()
        os._exit(own[0] == first[0])
    assert os.waitpid(child, 0)[1] == 0
    assert ask(program, b"abc") == first


def test_the_process_ends_with_its_parent(program: Path) -> None:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, ask(program, b"abc")[0].encode())
        os._exit(0)
    pid = os.read(reading, 20).decode()
    os.waitpid(child, 0)
    for end in (reading, writing):
        os.close(end)
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # of whoever adopted it
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{pid}").exists()
