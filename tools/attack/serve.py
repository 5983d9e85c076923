"""Many streams of a server at once: each text must be that of its run alone.

    python tools/attack/serve.py http://127.0.0.1:8000 --streams 1000 --rounds 10

Some clients leave in the middle. A client that gets status 429 tries again. At the end the server
must have nothing left that runs or waits; its memory and open files are printed if PID is given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATH = "/v1/completions"


def body_of(i: int) -> bytes:
    """The request of client i: one of 20, so that each has few texts to compare with."""
    kind = i % 20
    return json.dumps(
        {
            "prompt": f"Client {kind} says: " + "word " * (kind * 3),
            "max_tokens": 4 + kind % 7,
            "seed": kind,
            "temperature": 0.8,
            "stream": True,
        }
    ).encode()


async def ask(host: str, port: int, body: bytes, leaves: bool = False) -> str | None:
    """The text of a stream; None for a client that left. Tries again after status 429."""
    while True:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(
                f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            await writer.drain()
            line = await reader.readline()
            if not line:
                raise SystemExit(
                    "a connection was closed without an answer: its request took longer than the "
                    "server's --timeout, or the server failed"
                )
            status = int(line.split()[1])
            if leaves:
                return None
            data = await reader.read()
        finally:
            writer.close()
        if status == 429:
            await asyncio.sleep(1)
            continue
        if status != 200:
            raise SystemExit(f"status {status}: {data[-300:]!r}")
        lines = [line for line in data.split(b"\r\n") if line.startswith(b"data: {")]
        events = [json.loads(part[6:]) for line in lines for part in line.split(b"\n\n") if part]
        if b"[DONE]" not in data:
            raise SystemExit(f"a stream has no end: {data[-300:]!r}")
        return "".join(event["choices"][0]["text"] for event in events)


async def attack(url: str, streams: int, rounds: int, pid: int | None) -> int:
    """Prints a line a round; the number of texts that differ."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    alone = [await ask(host, port, body_of(kind)) for kind in range(20)]
    wrong = 0
    for number in range(rounds):
        every = range(streams)
        texts = await asyncio.gather(
            *(ask(host, port, body_of(i), leaves=i % 17 == 3) for i in every)
        )
        told = [(text, alone[i % 20]) for i, text in enumerate(texts) if text is not None]
        differ = sum(text != expected for text, expected in told)
        wrong += differ
        print(f"round {number + 1}: {len(told)} texts, {streams - len(told)} left, {differ} differ",
              memory(pid), flush=True)  # fmt: skip
    return wrong


def memory(pid: int | None) -> str:
    """The resident memory and open files of a process."""
    if pid is None:
        return ""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    kept = next(line for line in status if line.startswith("VmRSS")).split()[1]
    return f"{int(kept) // 1024} MiB, {len(list(Path(f'/proc/{pid}/fd').iterdir()))} files"


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pid", type=int)
    given: Any = parser.parse_args()
    sys.exit(bool(asyncio.run(attack(given.url, given.streams, given.rounds, given.pid))))


if __name__ == "__main__":
    main()
