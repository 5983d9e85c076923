"""Answers as JSON, and as server-sent events that a slow reader cannot hold up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from gptc.serve.answers import ClientGone
from gptc.serve.problems import BadRequest, Problem

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"


def encoded(value: Any) -> bytes:
    """JSON in ASCII, which also holds halves of surrogate pairs."""
    return json.dumps(value, separators=(",", ":")).encode()


class Json(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the answer."""
        return encoded(content)


def problem_response(problem: Problem) -> Json:
    """The answer for an error."""
    return Json(problem.body(), problem.status, headers=problem.headers)


def event_bytes(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encoded(value) + b"\n\n"


class Events(Response):
    """A stream of server-sent events. A reader that takes none for `timeout_s` is cut off.

    The first event is awaited before the status is sent, so an error up to there has its own.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], first: bytes, timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._first, self._timeout_s = events, first, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        watch = _Watch(self._timeout_s)

        async def put(data: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            watch.begin()
            await send(message)
            watch.end()

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await put(self._first)
            async for data in self._events:
                await put(data)
            await put(b"", more=False)
        except Problem as problem:
            await put(event_bytes(problem.body()) + DONE)
            await put(b"", more=False)
        except asyncio.CancelledError:
            if not watch.expired:
                raise
        except (ClientGone, OSError):
            pass  # uvicorn closes a connection whose answer has no end
        finally:
            watch.close()
            await _closed(self._events)


class _Watch:
    """Cancels this task if a send takes too long. One timer for all sends, which are many."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._begin_s = timeout_s, 0.0
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self.expired = False
        self._timer = self._loop.call_later(timeout_s / 4, self._check)

    def begin(self) -> None:
        self._begin_s = self._loop.time()

    def end(self) -> None:
        self._begin_s = 0.0

    def _check(self) -> None:
        if self._begin_s and self._loop.time() - self._begin_s > self._timeout_s and self._task:
            self.expired = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._timeout_s / 4, self._check)

    def close(self) -> None:
        self._timer.cancel()


async def stream(events: AsyncIterator[bytes], timeout_s: float) -> Events:
    """The answer of a stream whose first event has arrived."""
    try:
        first = await anext(events)
    except BaseException:
        await _closed(events)
        raise
    return Events(events, first, timeout_s)


async def _closed(events: AsyncIterator[bytes]) -> None:
    close = getattr(events, "aclose", None)
    if close:
        await close()


def refuse_together(fields: Mapping[str, Any], *names: str) -> None:
    """BadRequest if several of these fields are given."""
    given = [name for name in names if fields.get(name)]
    if len(given) > 1:
        raise BadRequest(f"{' and '.join(given)} exclude each other", param=given[-1])
