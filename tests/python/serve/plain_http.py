"""Plain HTTP requests of a test."""

from __future__ import annotations

import http.client
import json
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Reply(NamedTuple):
    """The answer to a request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The message of an error of OpenAI's shape."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["message"])


def call(url: str, path: str, body: Any = None, method: str = "", **headers: str) -> Reply:
    """Sends a body (bytes as they are, else JSON) and waits for the answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if data is not None else {}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method or ("GET" if data is None else "POST"), path, data, given)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, found, answer.read())
    finally:
        connection.close()


def events(reply: Reply) -> list[Any]:
    """The JSON of each server-sent event; the last one must be [DONE]."""
    blocks = [block for block in reply.body.decode().split("\n\n") if block]
    values = [line[6:] for block in blocks for line in block.split("\n") if line[:6] == "data: "]
    assert values.pop() == "[DONE]"
    return [json.loads(value) for value in values]
