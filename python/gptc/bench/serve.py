"""How fast a server of OpenAI's kind answers many clients: gptc serve, or another program.

Each client sends one request after another, a stream of text, from this process.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from gptc.errors import GptcError, UsageError
from gptc.files.words import plural

CLIENTS = (1, 4, 16, 64)
_TIMEOUT_S = 600.0
_WORDS = ("the", "river", "stone", "a", "king", "walked", "over", "seven", "hills", "and", "saw")


@dataclass
class _Times:
    """The times of all clients, in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    n_tokens: int = 0
    n_failed: int = 0


@dataclass(frozen=True)
class Row:
    """The result for a number of clients. Times in milliseconds; nan: no such thing."""

    clients: int
    tokens_per_s: float
    first_ms: float
    first_p99_ms: float
    between_ms: float
    between_p99_ms: float
    failed: int


def bench_serve(
    url: str,
    *,
    clients: Sequence[int] = CLIENTS,
    requests: int = 2,
    prompt_words: int = 100,
    max_tokens: int = 64,
    seconds: float = math.inf,
    model: str | None = None,
    key: str | None = None,
    report: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """Lets so many clients at once send `requests` requests each. GptcError if none succeeds.

    After so many seconds no client begins another request; each sends one at least.
    """
    ask = _Asker(url, prompt_words, max_tokens, model, key)
    rows = []
    for n in clients:
        report(f"{plural(n, 'client')}, {plural(requests, 'request')} each")
        rows.append(_row(n, *_together(ask, n, requests, seconds)))
    return rows


def _together(ask: _Asker, n: int, requests: int, seconds: float) -> tuple[_Times, float]:
    times, lock = _Times(), threading.Lock()
    end = time.perf_counter() + seconds

    def client(i: int) -> None:
        for k in range(requests):
            if k > 0 and time.perf_counter() > end:
                return
            try:
                first, between, n_tokens = ask(1000 * n + requests * i + k)
            except (OSError, http.client.HTTPException, GptcError):
                with lock:
                    times.n_failed += 1
                continue
            with lock:
                times.first.append(first)
                times.between += between
                times.n_tokens += n_tokens

    threads = [threading.Thread(target=client, args=(i,)) for i in range(n)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not times.first:
        raise GptcError("no request succeeded: is this the address of a server of OpenAI's kind?")
    return times, time.perf_counter() - begin


class _Asker:
    """Sends a request for a stream, and times its pieces."""

    def __init__(
        self, url: str, prompt_words: int, max_tokens: int, model: str | None, key: str | None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.netloc:
            raise UsageError(f"--against is {url!r}; it must be an address such as "
                             "http://127.0.0.1:8000")  # fmt: skip
        self._netloc, self._path = parts.netloc, parts.path.rstrip("/") + "/v1/completions"
        self._n_words, self._max_tokens, self._model = prompt_words, max_tokens, model
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def __call__(self, seed: int) -> tuple[float, list[float], int]:
        """Seconds to the first piece and between pieces, and the number of tokens."""
        words = random.Random(seed)
        prompt = " ".join(words.choice(_WORDS) for _ in range(self._n_words))
        body: dict[str, Any] = {
            "prompt": prompt, "max_tokens": self._max_tokens, "temperature": 0.8, "seed": seed,
            "stream": True,
        }  # fmt: skip
        if self._model:
            body["model"] = self._model
        connection = http.client.HTTPConnection(self._netloc, timeout=_TIMEOUT_S)
        try:
            begin = time.perf_counter()
            connection.request("POST", self._path, json.dumps(body), self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise GptcError(f"status {answer.status}: {answer.read()[:200]!r}")
            at = [time.perf_counter() for line in answer if self._is_piece(line)]
        finally:
            connection.close()
        if not at:
            raise GptcError("the answer has no text")
        between = [later - sooner for sooner, later in pairwise(at)]
        return at[0] - begin, between, len(at)

    @staticmethod
    def _is_piece(line: bytes) -> bool:
        return line.startswith(b"data: ") and b'"text"' in line


def _row(n: int, times: _Times, seconds: float) -> Row:
    first, between = sorted(times.first), sorted(times.between) or [float("nan")]

    def p99(values: list[float]) -> float:
        return 1000 * values[min(len(values) - 1, int(0.99 * len(values)))]

    return Row(
        n,
        times.n_tokens / seconds,
        1000 * statistics.median(first),
        p99(first),
        1000 * statistics.median(between),
        p99(between),
        times.n_failed,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as lines to read."""
    heads = ("clients", "tokens/s", "first ms", "p99", "between ms", "p99", "failed")
    lines = ["".join(f"{head:>12}" for head in heads)]
    for row in rows:
        values = asdict(row).values()
        lines.append("".join(f"{value:12,.0f}" for value in values))
    return "\n".join(lines)
