"""Ranks without MPI: how they find each other, and the errors of those that do not."""

from __future__ import annotations

import errno
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest

from gptc.engine import library, sockets, world
from gptc.engine.launch import STARTERS, Place
from gptc.engine.sockets import Address, MeetingError
from gptc.engine.world import JobError
from mpi_jobs import free_port

TORCHRUN = next(starter for starter in STARTERS if starter.name == "torchrun")


def place(rank: int, size: int) -> Place:
    return Place(rank, size, rank, TORCHRUN)


def meet(size: int, port: int) -> list[list[socket.socket | None]]:
    """The connections of every rank."""
    at = Address("127.0.0.1", port)
    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(sockets.connect, place(rank, size), at, 30) for rank in range(size)]
        return [rank.result(60) for rank in ranks]


def close(every: list[list[socket.socket | None]]) -> None:
    for found in (found for peers in every for found in peers if found is not None):
        found.close()


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_is_connected_to_each_other(size: int) -> None:
    every = meet(size, free_port())
    for rank, peers in enumerate(every):
        for other, found in enumerate(peers):
            assert (found is None) == (rank == other)
            if found is not None:
                found.sendall(bytes([rank, other]))
    for rank, peers in enumerate(every):
        for other, found in enumerate(peers):
            if found is not None:
                assert found.recv(2) == bytes([other, rank])
    close(every)


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n", b"\x02\0\0\0[]", b"\xff\xff\xff\xff", b""])
def test_a_stranger_is_not_a_rank(sent: bytes) -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(sockets.connect, place(0, 2), Address("127.0.0.1", port), 30)
        stranger = sockets._Meeting(place(1, 2), Address("127.0.0.1", port), 1e12, 30)._reach(
            0, Address("127.0.0.1", port)
        )
        with closing(stranger):
            stranger.sendall(sent)
            with suppress(OSError):  # it may have been closed already, with data that nobody read
                stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert not stranger.recv(1)
        close([sockets.connect(place(1, 2), Address("127.0.0.1", port), 30), first.result(60)])


@pytest.mark.parametrize(
    ("rank", "size", "problem"),
    [
        (0, 2, "rank 1 did not come to 127.0.0.1:{port} for 0.3 s"),
        (0, 3, "2 ranks (1, 2) did not come to 127.0.0.1:{port} for 0.3 s"),
        (1, 2, "no connection to rank 0 at 127.0.0.1:{port} (Connection refused) for 0.3 s"),
    ],
)
def test_the_error_names_the_rank_and_the_address(rank: int, size: int, problem: str) -> None:
    port = free_port()
    with pytest.raises(MeetingError) as caught:
        sockets.connect(place(rank, size), Address("127.0.0.1", port), 0.3)
    assert str(caught.value) == problem.format(port=port)


def test_a_rank_that_leaves_early_is_named() -> None:
    at = Address("127.0.0.1", free_port())
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(sockets.connect, place(0, 3), at, 30)
        leaving = sockets._Meeting(place(1, 3), at, 1e12, 30)
        found = leaving._reach(0, at)
        leaving._greet(0, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        found.close()
        last = pool.submit(sockets.connect, place(2, 3), at, 30)
        with pytest.raises(MeetingError, match="the connection to rank 1 has ended: "):
            first.result(60)
        with pytest.raises(MeetingError, match=f"no word from rank 0 at {at}: "):
            last.result(60)


def test_a_rank_does_not_connect_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TCP allows where nobody listens yet and the ports of both ends are the same."""
    at = Address("127.0.0.1", free_port())

    def connect_to_itself(*_: object, **__: object) -> socket.socket:
        found = socket.socket()
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(at)
        found.connect(at)
        return found

    monkeypatch.setattr(socket, "create_connection", connect_to_itself)
    with pytest.raises(MeetingError, match=r"no connection to rank 0 .*\(Connection refused\)"):
        sockets.connect(place(1, 2), at, 0.3)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_a_host_with_both_kinds_of_addresses_is_reached_by_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "_is_loopback", lambda host: False)
    meeting = sockets._Meeting(place(0, 2), Address("::1", free_port()), 1e12, 30)
    with meeting._listener() as listener:
        for host in ("127.0.0.1", "::1"):
            to = Address(host, listener.getsockname()[1])
            with socket.create_connection(to, 5):
                found, whence = listener.accept()
                found.close()
                assert meeting._known_host(whence[0]) == host


def test_an_address_of_ipv6_is_written_in_brackets() -> None:
    assert str(Address("fe80::1", 29500)) == "[fe80::1]:29500"
    assert str(Address("node1", 29500)) == "node1:29500"


def test_a_rank_without_files_for_connections_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", refuse)
    with pytest.raises(MeetingError, match="rank 0 cannot accept connections: Too many open"):
        sockets.connect(place(0, 2), Address("127.0.0.1", free_port()), 5)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(MeetingError, match=f"cannot listen at 127.0.0.1:{port}: .*in use"):
            sockets.connect(place(0, 2), Address("127.0.0.1", port), 1)


def test_torchrun_has_the_master_port_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert sockets.address() == ("node1", 29500)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert sockets.address() == ("node1", 29501)


@pytest.mark.parametrize("port", ["", "x", "0", "65535"])
def test_variables_without_an_address_are_refused(
    monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(JobError, match="unset RANK for one process"):
        world._join(place(0, 2), 1)


def test_a_failed_meeting_is_one_line_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(JobError, match=f":{port} for 0.2 s; let these hosts connect") as caught:
        world._join(place(0, 2), 0.2)
    assert "mpirun" not in str(caught.value)
    assert not caught.value.silent
    assert library.load()
