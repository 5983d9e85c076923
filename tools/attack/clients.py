"""Hostile clients of a server, while others read streams that must neither change nor stall.

    gptc serve -m runs/tiny --port 8124 --timeout 5 &
    python tools/attack/clients.py http://127.0.0.1:8124 --requests 10000 --pid $!

Among the requests are completions, conversations and embeddings as they should be, and clients that
vanish, stop in the middle of a body, send or read a byte a second, or send other text than JSON,
deep or huge JSON, fields of any type, and schemas that explode. No answer may be an error of the
server, no stream of the readers may differ from its run alone, and at the end nothing runs, and no
connection is open. With --record, the result is written to results.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/tokenize")
_WAIT_S = 120.0
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    10**30,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"": 1},
    [{}],
)
_CHILD = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
s.sendall(sys.stdin.buffer.read())
print(flush=True)
while s.recv(1): pass
"""


def http(body: bytes, path: str = PATHS[0], length: int | None = None) -> bytes:
    """A request; its header may claim another length."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode() + body


def stream_of(kind: int, n_tokens: int = 24) -> bytes:
    """The body of a stream; kind gives its prompt and seed."""
    return json.dumps(
        {"prompt": f"Reader {kind} says: " + "word " * kind, "max_tokens": n_tokens, "seed": kind,
         "temperature": 0.8, "stream": True}
    ).encode()  # fmt: skip


@dataclass
class Found:
    """What the attack has seen."""

    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    n_streams: int = 0


class Attack:
    """Clients of one server, chosen by a seed."""

    def __init__(self, url: str, seed: int = 0, slow_s: float = 1.0) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.rng, self.slow_s, self.found = random.Random(seed), slow_s, Found()
        self.clock: Callable[[], float] = time.monotonic  # of the gaps in streams
        self._hostile: tuple[tuple[int, Callable[[], Awaitable[None]]], ...] = (
            (30, self.well_behaved), (12, self.vanish), (10, self.half_body), (10, self.not_json),
            (16, self.any_types), (4, self.deep), (2, self.huge), (2, self.schema),
            (2, self.read_slowly), (2, self.write_slowly), (1, self.killed), (4, self.garbage),
        )  # fmt: skip

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    async def _send(self, data: bytes) -> tuple[int, bytes]:
        """The status and the rest of an answer; 0: the server has closed the connection."""
        reader, writer = await self._connect()
        try:
            writer.write(data)
            await writer.drain()
            answer = await asyncio.wait_for(reader.read(), _WAIT_S)
        except (ConnectionError, BrokenPipeError):
            answer = b""  # it did not wait for the rest of a body
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1]) if head else 0
        self.found.statuses[status] += 1
        if status >= 500 and status != 503:
            self.found.problems.append(f"status {status} for {data[:300]!r}: {body[:300]!r}")
        return status, body

    async def _must(self, data: bytes, *statuses: int) -> None:
        status, body = await self._send(data)
        if status not in (*statuses, 429):
            self.found.problems.append(
                f"status {status}, not one of {statuses}, for {data[:300]!r}: {body[:300]!r}"
            )

    # ---- clients that must get their answer ----

    async def well_behaved(self) -> None:
        """A short request of any path."""
        path = self.rng.choice(PATHS)
        text = "word " * self.rng.randrange(1, 20)
        bodies: dict[str, dict[str, Any]] = {
            PATHS[0]: {"prompt": text, "max_tokens": 4, "n": self.rng.choice((1, 2))},
            PATHS[1]: {"messages": [{"role": "user", "content": text}], "max_tokens": 3},
            PATHS[2]: {"input": [text, "x"]},
            PATHS[3]: {"input": text, "max_output_tokens": 3},
            PATHS[4]: {"content": text},
        }
        await self._must(
            http(json.dumps(bodies[path]).encode(), path), 200, 400
        )  # 400: no chat template

    # ---- clients that leave ----

    async def vanish(self) -> None:
        """Resets the connection of a stream that runs."""
        reader, writer = await self._connect()
        writer.write(http(stream_of(self.rng.randrange(20), 200)))
        await writer.drain()
        await asyncio.wait_for(reader.read(self.rng.choice((1, 400))), _WAIT_S)
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def killed(self) -> None:
        """A client in a process, which SIGKILL ends at a random moment."""
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-c", _CHILD, self.host, str(self.port),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert child.stdin
        assert child.stdout
        child.stdin.write(http(stream_of(self.rng.randrange(20), 200)))
        child.stdin.close()
        await child.stdout.readline()
        await asyncio.sleep(self.rng.random() * 0.2)
        with suppress(ProcessLookupError):  # its stream was short, and it has ended
            os.kill(child.pid, signal.SIGKILL)
        await child.wait()

    async def half_body(self) -> None:
        """Leaves after a part of a body."""
        _, writer = await self._connect()
        whole = http(stream_of(3))
        writer.write(whole[: self.rng.randrange(1, len(whole))])
        await writer.drain()
        await asyncio.sleep(self.rng.random() * 0.05)
        writer.close()

    # ---- clients that send something else ----

    async def not_json(self) -> None:
        """Bytes that are not UTF-8, or not JSON."""
        body = bytearray(stream_of(self.rng.randrange(20)))
        for _ in range(self.rng.randrange(1, 5)):
            body[self.rng.randrange(len(body))] = self.rng.randrange(0xF8, 0x100)  # never UTF-8
        await self._must(http(bytes(body), self.rng.choice(PATHS)), 400)

    async def garbage(self) -> None:
        """Bytes that are not HTTP."""
        await self._send(self.rng.randbytes(self.rng.randrange(1, 2000)) + b"\r\n\r\n")

    async def any_types(self) -> None:
        """A field with a value of any type."""
        names = (
            "prompt", "messages", "input", "n", "stop", "seed", "logit_bias", "tools", "stream",
            "response_format", "content", "temperature", "logprobs", "grammar",
        )  # fmt: skip
        body = {"prompt": "a", "max_tokens": 2, self.rng.choice(names): self.rng.choice(_VALUES)}
        await self._must(http(json.dumps(body).encode(), self.rng.choice(PATHS)), 200, 400)

    async def deep(self) -> None:
        """Nested lists or objects."""
        n = self.rng.choice((100, 5_000, 200_000))
        inner = self.rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
        value = inner[0] * n + b"1" + inner[1] * n
        name = self.rng.choice((b"prompt", b"logit_bias", b"tools", b"metadata"))
        body = b'{"prompt": "a", "max_tokens": 1, "%s": %s}' % (name, value)
        await self._must(http(body), 200, 400)  # 200: metadata is ignored

    async def huge(self) -> None:
        """A body above the limit, or a text far above the context."""
        n = self.rng.choice((9 << 20, 1 << 20))
        body = b'{"prompt": "' + b"a" * n + b'"}'
        status, _ = await self._send(http(body))
        if status not in (0, 400, 413, 429):
            self.found.problems.append(f"status {status} for a body of {n} bytes")

    async def schema(self) -> None:
        """A schema or a pattern that explodes."""
        deep: Any = {"type": "string"}
        for _ in range(200):
            deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
        wide = {f"k{i}": {"type": "integer"} for i in range(self.rng.choice((50, 9000)))}
        schemas = (
            deep, {"type": "object", "properties": wide}, {"$ref": "#"}, {"allOf": [{"$ref": "#"}]},
            {"type": "string", "pattern": "(a|b|c|d){1,4000}(x{1,4000}){1,4000}"},
        )  # fmt: skip
        form = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": self.rng.choice(schemas)},
        }
        body = {
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 2,
            "response_format": form,
        }
        await self._must(http(json.dumps(body).encode(), PATHS[1]), 200, 400)

    # ---- slow clients, which the server cuts off ----

    async def read_slowly(self) -> None:
        """Reads a byte a second of a long stream, and leaves after some."""
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, (self.host, self.port))
        with raw:
            await loop.sock_sendall(raw, http(stream_of(5, 400)))
            for _ in range(5):
                await asyncio.sleep(self.slow_s)
                if not await loop.sock_recv(raw, 1):
                    break

    async def write_slowly(self) -> None:
        """Sends a byte a second, and leaves after some."""
        _, writer = await self._connect()
        for byte in http(stream_of(5))[:5]:
            writer.write(bytes([byte]))
            await asyncio.sleep(self.slow_s)
        writer.close()

    # ---- the readers, and the whole ----

    async def read(self, kind: int) -> tuple[str, list[float]]:
        """The text of a stream, and the seconds between its pieces. Tries again after a 429."""
        while True:
            reader, writer = await self._connect()
            try:
                writer.write(http(stream_of(kind)))
                status = int((await asyncio.wait_for(reader.readline(), _WAIT_S)).split()[1])
                if status == 429:
                    await asyncio.sleep(0.5)
                    continue
                text, at = "", []
                while line := await asyncio.wait_for(reader.readline(), _WAIT_S):
                    if line.startswith(b"data: {"):
                        at.append(self.clock())
                        text += json.loads(line[6:])["choices"][0]["text"]
                return text, [later - sooner for sooner, later in pairwise(at)]
            finally:
                writer.close()

    async def _readers(self, n: int, alone: list[str], ended: asyncio.Event) -> None:
        async def one(first: int) -> None:
            kind = first
            while not ended.is_set():
                kind = (kind + 1) % len(alone)
                text, gaps = await self.read(kind)
                self.found.n_streams += 1
                self.found.gaps_s += gaps
                if text != alone[kind]:
                    self.found.problems.append(f"stream {kind} is {text!r}; alone {alone[kind]!r}")

        await asyncio.gather(*(one(i * 3) for i in range(n)))

    async def run(self, requests: int, at_once: int = 16, readers: int = 4,
                  report: Callable[[int], object] = lambda n: None) -> Found:  # fmt: skip
        """Sends so many requests, some at a time, next to readers of streams."""
        alone = [(await self.read(kind))[0] for kind in range(12)]
        ended, left = asyncio.Event(), iter(range(requests))
        watching = asyncio.create_task(self._readers(readers, alone, ended))
        weights, clients = zip(*self._hostile, strict=True)

        async def attacker() -> None:
            for i in left:
                # Each of them once, and then by their weights.
                client = clients[i] if i < len(clients) else self.rng.choices(clients, weights)[0]
                self.found.kinds[client.__name__] += 1
                await client()
                report(i + 1)

        try:
            await asyncio.gather(*(attacker() for _ in range(at_once)))
        finally:
            ended.set()  # a reader that is cancelled while a line arrives would not end
        await watching
        return self.found

    async def idle(self) -> bool:
        """Whether the server has nothing left to do, within a minute."""
        for _ in range(600):
            reader, writer = await self._connect()
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            page = (await reader.read()).decode()
            writer.close()
            if "gptc_running 0.0" in page and "gptc_waiting 0.0" in page:
                return True
            await asyncio.sleep(0.1)
        return False


def n_sockets(pid: int) -> int:
    """The open sockets of a process; its other files are few, such as a renderer's of templates."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed in the meantime
            found += link.readlink().name.startswith("socket:")
    return found


def usage(pid: int) -> tuple[int, int]:
    """The resident memory in MiB and the open sockets of a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    kept = next(line for line in status if line.startswith("VmRSS")).split()[1]
    return int(kept) // 1024, n_sockets(pid)


async def _attack(given: Any) -> int:
    attack, begin = Attack(given.url, given.seed), time.monotonic()
    first = usage(given.pid)
    seen: list[tuple[int, int]] = []

    def report(n: int) -> None:
        if n % max(1, given.requests // 10) == 0:
            seen.append(usage(given.pid))
            gap = max(attack.found.gaps_s, default=0)
            print(f"{n:,} requests: {seen[-1][0]} MiB, {seen[-1][1]} sockets; a gap of {gap:.2f} s "
                  f"in a stream; {len(attack.found.problems)} problems", flush=True)  # fmt: skip

    found = await attack.run(given.requests, report=report)
    idle = await attack.idle()
    await asyncio.sleep(2 * given.timeout)  # until slow clients are cut off
    last = usage(given.pid)
    gaps = sorted(found.gaps_s)
    print(f"clients: {dict(found.kinds)}\nstatuses: {dict(found.statuses)}")
    print(
        f"{found.n_streams} streams next to them; seconds between pieces: median "
        f"{gaps[len(gaps) // 2]:.3f}, p99 {gaps[int(0.99 * len(gaps))]:.3f}, most {gaps[-1]:.2f}"
    )
    print(f"memory {first[0]} MiB, {seen[0][0]} after a tenth, {last[0]} at the end; "
          f"sockets {first[1]} and {last[1]}; {time.monotonic() - begin:.0f} s")  # fmt: skip
    for problem in found.problems[:10]:
        print(problem)
    failures = len(found.problems) + (not idle) + (last[1] > first[1])
    if given.record:
        import results

        result = (
            f"{failures} failures; {seen[0][0]} MiB after a tenth, {last[0]} at the end; "
            f"{last[1] - first[1]} sockets left open"
        )
        results.record(
            "clients", f"{given.requests:,} requests, {found.n_streams:,} streams", result
        )
    return bool(failures)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=5.0, help="of the server")
    parser.add_argument("--record", action="store_true")
    sys.exit(asyncio.run(_attack(parser.parse_args())))


if __name__ == "__main__":
    main()
