"""`gptc serve` and other servers with the same GGUF file, by `gptc bench serve`.

    python3 -m venv other && other/bin/pip install 'llama-cpp-python[server]==0.3.36'   # compiles
    python tools/measure/compare_servers.py MODEL.gguf --python other/bin/python
    python tools/measure/compare_servers.py MODEL.gguf --llama-server build/bin/llama-server

Prompts have 128 and 1,024 words, of a token each with most tokenizers. The servers take turns at
each number of clients and length of prompts. A row takes about --seconds, or as long as a request
of each client. Besides what the benchmark prints, it gives the CPU time of each server for a token,
which depends less on other programs.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from gptc.bench.serve import CLIENTS, Row, bench_serve

_START_S = 120.0


class Server:
    """A server in a process, which answers at `url`."""

    def __init__(self, name: str, command: list[str], path: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self._child = subprocess.Popen(
            [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + _START_S
        while time.monotonic() < end and self._child.poll() is None:
            with suppress(OSError), urllib.request.urlopen(self.url + path, timeout=5):
                return
            time.sleep(0.2)
        self.close()
        raise SystemExit(f"{name} does not start: {' '.join(command)}")

    def cpu_s(self) -> float:
        """CPU seconds of the process."""
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def measure(self, clients: int, **options: Any) -> tuple[Row, float]:
        """A row of the benchmark, and the CPU time in ms a token."""
        begin_cpu, begin = self.cpu_s(), time.perf_counter()
        (row,) = bench_serve(self.url, clients=[clients], **options)
        n_tokens = row.tokens_per_s * (time.perf_counter() - begin)
        return row, 1000 * (self.cpu_s() - begin_cpu) / n_tokens

    def close(self) -> None:
        """Ends the process."""
        self._child.terminate()
        self._child.wait()


def commands(given: argparse.Namespace, n_ctx: int) -> list[tuple[str, list[str], str]]:
    """Name, command and path of gptc's server and of the named ones, with the same context.

    llama-cpp-python's has one sequence at a time.
    """
    threads, parallel, model = str(given.threads), str(given.parallel), given.model
    ours = [
        sys.executable, "-m", "gptc", "serve", "-m", model, "--threads", threads,
        "--parallel", parallel, "--context", str(n_ctx),
    ]  # fmt: skip
    found = [("gptc", ours, "/ready")]
    if given.python:
        theirs = [
            given.python, "-m", "llama_cpp.server", "--model", model, "--n_threads", threads,
            "--n_threads_batch", threads, "--n_ctx", str(n_ctx), "--interrupt_requests", "false",
        ]  # fmt: skip
        found.append(("llama-cpp-python", theirs, "/v1/models"))
    if given.llama_server:
        theirs = [
            given.llama_server, "-m", model, "--threads", threads, "--threads-batch", threads,
            "--ctx-size", str(n_ctx * given.parallel), "--parallel", parallel, "--no-webui",
        ]  # fmt: skip
        found.append(("llama-server", theirs, "/health"))
    return found


def main() -> None:
    """Reads the arguments and prints a line for each server, number of clients and prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--python", help="that has llama-cpp-python[server]")
    parser.add_argument("--llama-server", help="llama.cpp's own server, a program")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--words", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--parallel", type=int, default=16)
    given = parser.parse_args()
    n_ctx = 2 * max(given.words) + given.tokens + 64  # words have at most two tokens
    heads = ("words", "clients", "server", "tokens/s", "first ms", "p99", "between ms", "p99",
             "CPU ms", "failed")  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    with ExitStack() as stack:
        compared = []
        for command in commands(given, n_ctx):
            compared.append(Server(*command))
            stack.callback(compared[-1].close)
            compared[-1].measure(1, prompt_words=8, max_tokens=8)  # reads the file's pages
        for words in given.words:
            for n in given.clients:
                for server in compared:
                    row, cpu_ms = server.measure(
                        n, requests=given.requests, prompt_words=words, max_tokens=given.tokens,
                        seconds=given.seconds,
                    )  # fmt: skip
                    numbers = (
                        row.tokens_per_s, row.first_ms, row.first_p99_ms, row.between_ms,
                        row.between_p99_ms, cpu_ms,
                    )  # fmt: skip
                    told = " | ".join(f"{number:,.1f}" for number in numbers)
                    print(f"| {words} | {n} | {server.name} | {told} | {row.failed} |", flush=True)


if __name__ == "__main__":
    main()
