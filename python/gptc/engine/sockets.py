"""The ranks of a job without MPI: each connects to all others, by the address of rank 0.

torchrun sets it (MASTER_ADDR, MASTER_PORT). Rank 0 listens there, hears the port of every rank, and
tells all. Then each connects to the ranks below it. A connection begins with the name of the job,
so that a stranger's is closed. As in torch, nothing is secret: the network has to be trusted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import struct
import time
from ipaddress import ip_address
from typing import Any, NamedTuple

from gptc.engine.launch import Place
from gptc.errors import GptcError
from gptc.files.words import plural

_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 20  # of a message: the ports of thousands of ranks
_GREETING_S = 5.0  # for a new connection to say who it is
_RETRY_S = 0.1
_FOREVER_S = 1e9


class MeetingError(GptcError):
    """Ranks that did not meet."""


class Address(NamedTuple):
    """That of rank 0."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def address() -> Address:
    """The address of rank 0, by the variables of torchrun.

    torchrun itself has the port MASTER_PORT, if it says so; rank 0 takes the next one then.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65535):
        raise MeetingError(
            f"RANK and WORLD_SIZE are set, but MASTER_ADDR is {host!r} and MASTER_PORT {port!r}: "
            "start ranks with torchrun or mpirun, or unset RANK for one process"
        )
    taken = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Address(host, int(port) + taken)


def connect(place: Place, at: Address, timeout_s: float) -> list[socket.socket | None]:
    """A connection to each other rank, in their order; None for this one. 0: without a limit."""
    meeting = _Meeting(place, at, time.monotonic() + (timeout_s or _FOREVER_S), timeout_s)
    try:
        meeting.hold()
    except BaseException:
        for found in meeting.peers:
            if found is not None:
                found.close()
        raise
    for found in meeting.peers:
        if found is not None:
            found.settimeout(None)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return meeting.peers


class _Meeting:
    def __init__(self, place: Place, at: Address, ends: float, timeout_s: float) -> None:
        self._place, self._at, self._ends, self._timeout_s = place, at, ends, timeout_s
        self.peers: list[socket.socket | None] = [None] * place.size
        named = [os.environ.get("TORCHELASTIC_RUN_ID", ""), str(at), place.size]
        self._job = hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def hold(self) -> None:
        """Connects to all."""
        if self._place.rank:
            self._come()
        else:
            self._invite()

    def _invite(self) -> None:
        """Rank 0: hears of all, then tells their addresses."""
        with self._listener() as listener:
            where = self._accept(listener, range(1, self._place.size))
        for rank in where:
            self._tell(rank, where)

    def _come(self) -> None:
        """Another rank: tells its port, then connects to those below and waits for those above."""
        rank = self._place.rank
        first = self._reach(0, self._at)
        with self._server(0, first.family) as listener:
            self._greet(0, listener.getsockname()[1])
            where = self._hear(first, f"no word from rank 0 at {self._at}")
            for other in range(1, rank):
                host, port = where[str(other)]
                self._reach(other, Address(host, port))
                self._greet(other, 0)
            self._accept(listener, range(rank + 1, self._place.size))

    def _listener(self) -> socket.socket:
        """Of rank 0."""
        host, port = self._at
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            return self._server(port, family)
        except OSError as error:
            raise MeetingError(
                f"rank 0 cannot listen at {self._at}: {_reason(error)}; choose another "
                "--master-port"
            ) from error

    def _server(self, port: int, family: int) -> socket.socket:
        """At all addresses of this host, whose name may mean another one here than elsewhere.

        Other hosts may know its IPv4 address alone.
        """
        host = self._at.host if _is_loopback(self._at.host) else ""
        both = not host and family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)

    def _known_host(self, host: str) -> str:
        """The host of a connection to rank 0, by a name for other hosts too."""
        if "." in host:
            host = host.removeprefix("::ffff:")  # IPv4, at a socket of both
        return self._at.host if _is_loopback(host) else host

    def _accept(self, listener: socket.socket, ranks: range) -> dict[int, Address]:
        """Waits for these ranks; the address of each."""
        where: dict[int, Address] = {}
        while len(where) < len(ranks):
            missing = [rank for rank in ranks if rank not in where]
            listener.settimeout(self._left(f"{_named(missing)} did not come to {self._at}"))
            try:
                found, whence = listener.accept()
            except (TimeoutError, ConnectionAbortedError):
                continue
            except OSError as error:
                problem = f"rank {self._place.rank} cannot accept connections"
                raise MeetingError(f"{problem}: {_reason(error)}") from error
            try:
                job, rank, port = _receive(found, _GREETING_S)
                if job != self._job or rank not in missing or not isinstance(port, int):
                    raise ValueError
            except (OSError, ValueError, TypeError, RecursionError):
                found.close()  # of another job, or of a stranger
                continue
            self.peers[rank] = found
            where[rank] = Address(self._known_host(str(whence[0])), port)
        return where

    def _reach(self, rank: int, at: Address) -> socket.socket:
        """A connection to a rank, which may not be there yet."""
        problem: OSError | None = None
        while True:
            why = f" ({_reason(problem)})" if problem else ""
            left = self._left(f"no connection to rank {rank} at {at}{why}")
            try:
                found = _connected(at, left)
            except OSError as error:
                problem = error
                time.sleep(_RETRY_S)
                continue
            self.peers[rank] = found
            return found

    def _greet(self, rank: int, port: int) -> None:
        self._tell(rank, [self._job, self._place.rank, port])

    def _tell(self, rank: int, value: object) -> None:
        to = self.peers[rank]
        assert to is not None
        try:
            _send(to, value)
        except OSError as error:
            raise MeetingError(
                f"the connection to rank {rank} has ended: {_reason(error)}"
            ) from error

    def _hear(self, found: socket.socket, problem: str) -> Any:
        try:
            return _receive(found, self._left(problem))
        except (OSError, ValueError) as error:
            raise MeetingError(f"{problem}: {_reason(error)}") from error

    def _left(self, problem: str) -> float:
        """The seconds that are left; at the end MeetingError."""
        left = self._ends - time.monotonic()
        if left <= 0:
            raise MeetingError(f"{problem} for {self._timeout_s:g} s")
        return min(left, 1e6)


def _connected(at: Address, seconds: float) -> socket.socket:
    """A connection to an address, and not to its own end: TCP can give it the port it asks for."""
    found = socket.create_connection(at, timeout=seconds)
    try:
        own = found.getsockname() == found.getpeername()
    except OSError:
        found.close()
        raise
    if own:
        found.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _named(ranks: list[int]) -> str:
    few = ", ".join(map(str, ranks[:5])) + (", …" if len(ranks) > 5 else "")
    return f"{plural(len(ranks), 'rank')} ({few})" if len(ranks) > 1 else f"rank {few}"


def _reason(error: BaseException | None) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _send(to: socket.socket, value: object) -> None:
    data = json.dumps(value).encode()
    to.sendall(_LENGTH.pack(len(data)) + data)


def _receive(found: socket.socket, seconds: float) -> Any:
    ends = time.monotonic() + seconds
    (n,) = _LENGTH.unpack(_exactly(found, _LENGTH.size, ends))
    if n > _MOST_BYTES:
        raise ValueError("not a message of a rank")
    return json.loads(_exactly(found, n, ends))


def _exactly(found: socket.socket, n: int, ends: float) -> bytes:
    data = b""
    while len(data) < n:
        found.settimeout(max(ends - time.monotonic(), 1e-3))
        part = found.recv(n - len(data))
        if not part:
            raise ConnectionError("the connection has ended")
        data += part
    return data
