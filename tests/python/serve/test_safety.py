"""No client can crash, hang or read another: wrong types, sizes, speeds, keys and departures."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from plain_http import Reply, call, events

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
VALUES = [
    None, True, -1, 0, 1.5, 1e400, 10**30, -(2**63), "", "x", "\ud800", [], [[]], [None], {},
    {"": 1}, {"type": 7}, {"type": "json_schema"}, [1, "a"], [[1], "a"], [-1], [10**9], [{}],
    [{"role": 3}], [{"role": "user", "content": [{"type": "image_url"}]}],
]  # fmt: skip


def fields() -> Iterator[tuple[str, str]]:
    """Each field of each path but the ignored, from the tables that the server reads."""
    pytest.importorskip("starlette", reason="pip install '.[serve]'")
    from gptc.serve import tables
    from gptc.serve.options import ServeOptions

    of_path = {
        COMPLETIONS: tables.completion_fields,
        CHAT: tables.chat_fields,
        "/v1/responses": tables.response_fields,
        EMBEDDINGS: tables.embedding_fields,
        "/tokenize": tables.tokenize_fields,
        "/detokenize": tables.detokenize_fields,
    }
    for path, table in of_path.items():
        schemas = table(ServeOptions())
        yield from ((path, name) for name, schema in schemas.items() if len(schema) > 1)


VALID = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    EMBEDDINGS: {"input": "a"},
    "/tokenize": {"content": "a"},
    "/detokenize": {"tokens": [1]},
}


def answered(reply: Reply) -> None:
    """An answer, or an error of OpenAI's shape, but not one of the server's."""
    assert reply.status in (200, 400, 404), reply
    if reply.status != 200:
        assert reply.message
        assert "\n" not in reply.message


@pytest.mark.parametrize(("path", "name"), list(fields()))
def test_a_field_of_any_type_is_taken_or_refused_by_name(server: Any, path: str, name: str) -> None:
    for value in VALUES:
        if isinstance(value, int) and not isinstance(value, bool) and "max" in name and value > 99:
            continue  # a long text is not an error
        body = json.dumps({**VALID[path], name: value}).replace("Infinity", "1e400")
        reply = call(server.url, path, body.encode())
        answered(reply)
        if reply.status == 400:
            assert name in reply.message or name in str(reply.json["error"]["param"])


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"", 400, "not JSON"),
        (b"\xff\xfe{}", 400, "byte 0 of the body is not UTF-8"),
        (b"[" * 100_000, 400, "nested"),
        (b'{"prompt": NaN}', 400, "NaN is not"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, ""),
        (b"[]", 400, "must be an object"),
        (b'{"promt": "a"}', 400, "did you mean prompt?"),
        (b'{"prompt": "a", "n_predict": 3}', 400, "did you mean max_tokens?"),
        (b'{"prompt": "' + b"a" * (9 << 20) + b'"}', 413, "exceeds"),
        (b'{"prompt": "' + b"a" * 5000 + b'"}', 400, "5,000 tokens"),
        (b'{"prompt": "a", "n": 17}', 400, "n is 17; it must be a whole number between 1 and 16"),
        (b'{"prompt": [300]}', 400, "token 300"),
        (b'{"prompt": "a", "suffix": "b"}', 400, "suffix is not supported"),
        (b'{"prompt": "a", "model": "gpt-4"}', 404, "this server has tiny"),
        (b'{"prompt": "a", "grammar": "root ::= ("}', 400, "grammar"),
        (b'{"prompt": "a", "regex": "(a"}', 400, "regex"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', 400, "token id"),
        (b'{"prompt": "a", "logit_bias": {"256": 1}}', 400, "vocabulary"),
        (b'{"prompt": "a", "logit_bias": {"65": null}}', 400, "logit_bias.65 is None"),
    ],
)  # fmt: skip
def test_a_bad_body_gets_its_reason(server: Any, body: bytes, status: int, says: str) -> None:
    reply = call(server.url, COMPLETIONS, body)
    assert (reply.status, says in reply.message) == (status, True), reply
    assert call(server.url, COMPLETIONS, VALID[COMPLETIONS]).status == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": None}}, "is missing"),
        ({"chat_template_kwargs": {"messages": 5}}, "set messages"),
        ({"chat_template_kwargs": {"tools": []}}, "set tools"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "add_generation_prompt"),
    ],
)
def test_a_bad_body_of_a_chat_gets_its_reason(server: Any, body: Any, says: str) -> None:
    reply = call(server.url, CHAT, {**VALID[CHAT], **body})
    assert (reply.status, says in reply.message) == (400, True), reply


def test_schema_bombs_are_refused_in_bounded_time(server: Any) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    deep: Any = {"type": "string"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    wide = {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(9000)}}
    many = {"type": "string", "pattern": "(a|b|c|d){1,4000}(x{1,4000}){1,4000}"}
    for schema in (deep, wide, many, {"$ref": "#"}, {"allOf": [{"$ref": "#"}]}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        begin = time.monotonic()
        answered(call(server.url, CHAT, {**VALID[CHAT], "response_format": form}))
        assert time.monotonic() - begin < 60


def test_paths_methods_and_types(server: Any) -> None:
    url = server.url
    assert call(url, "/v1/nothing", {}).status == 404
    wrong = call(url, COMPLETIONS)
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert call(url, "/", {}).status == 405
    plain = call(url, COMPLETIONS, b"{}", Content_Type="text/plain")
    assert (plain.status, "application/json" in plain.message) == (415, True)
    foreign = call(url, COMPLETIONS, VALID[COMPLETIONS], Host="example.org")
    assert foreign.status == 403
    cors = call(url, "/health", Origin="https://example.org")
    assert "access-control-allow-origin" not in cors.headers
    assert call(url, "/../../etc/passwd").status in (400, 404)


def test_keys_protect_all_but_pages_and_health(
    own_server: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(b"\xef\xbb\xbf# ours, by an editor that writes a byte-order mark\n")
    with keys.open("a") as file:
        file.write("first-key-of-16-and-more\nsecond-key-of-16-and-more\n")
    with own_server(api_key_file=str(keys), cors=("https://ours.org",)) as server:
        url, caplog_level = server.url, caplog.at_level("INFO")
        with caplog_level:
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"},
                          {"Authorization": "Bearer first-key-of-16-and-mor"}):  # fmt: skip
                reply = call(url, COMPLETIONS, VALID[COMPLETIONS], **given)
                assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
            for key in ("first", "second"):
                bearer = f"Bearer {key}-key-of-16-and-more"
                right = call(url, COMPLETIONS, VALID[COMPLETIONS], Authorization=bearer)
                assert right.status == 200
        assert "key 2" in caplog.text
        assert "of-16" not in caplog.text
        assert call(url, "/metrics").status == call(url, "/v1/models").status == 401
        assert call(url, "/health").status == call(url, "/").status == 200
        shared = call(url, "/health", Origin="https://ours.org").headers
        assert shared["access-control-allow-origin"] == "https://ours.org"
        assert call(url, COMPLETIONS, method="OPTIONS", Origin="https://ours.org").status == 204


def test_prompts_are_in_the_log_only_when_asked_for(
    own_server: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    for asked in (False, True):
        caplog.clear()
        with own_server(log_prompts=asked) as server, caplog.at_level("INFO"):
            call(server.url, COMPLETIONS, {"prompt": "secret words", "max_tokens": 1})
            call(server.url, COMPLETIONS, {"prompt": "secret words", "n": "secret"})
        assert ("secret" in caplog.text) == asked


# ---- slow clients, and those that leave ----


def connect(url: str) -> socket.socket:
    host, _, port = urlsplit(url).netloc.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.01)
    return condition()


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """slowly(server): each step takes 10 ms more, so that texts last while a test looks at them."""

    def slow(server: Any) -> None:
        batch = server.service.scheduler._batch
        step = batch.step
        monkeypatch.setattr(batch, "step", lambda: time.sleep(0.01) or step())

    return slow


def test_a_client_that_leaves_frees_its_sequence(
    server: Any, slowly: Callable[[Any], None]
) -> None:
    slowly(server)
    scheduler = server.service.scheduler
    for stream in (True, False):
        before = scheduler.counts.cancelled
        body = json.dumps({"prompt": "a", "max_tokens": 2000, "n": 8, "stream": stream}).encode()
        with connect(server.url) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            )  # fmt: skip
            assert until(lambda: scheduler.n_running == 8)
            if stream:
                assert b"200 OK" in client.recv(100)
        assert until(lambda: scheduler.n_running == 0)
        assert scheduler.counts.cancelled == before + 1


def test_slow_writers_and_readers_are_cut_off(own_server: Callable[..., Any]) -> None:
    with own_server(timeout=0.5) as server:
        with (
            connect(server.url) as silent,
            connect(server.url) as head,
            connect(server.url) as body,
        ):
            head.sendall(b"POST /v1/comple")
            body.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            )
            assert silent.recv(100) == b""
            assert head.recv(100) == b""
            assert b"408" in body.recv(100)
        scheduler = server.service.scheduler
        with connect(server.url) as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            many = {"prompt": "a", "max_tokens": 2000, "n": 8, "stream": True, "logprobs": 20}
            text = json.dumps(many).encode()
            reader.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\n"
                + f"Content-Length: {len(text)}\r\n\r\n".encode() + text
            )  # fmt: skip
            assert until(lambda: scheduler.n_running == 8)
            assert until(lambda: scheduler.n_running == 0, 60)
            assert until(lambda: not server.connections, 60)
        assert scheduler.counts.cancelled == 1


def test_a_whole_answer_that_nobody_reads_is_cut_off(own_server: Callable[..., Any]) -> None:
    with own_server(timeout=0.5) as server, connect(server.url) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        text = json.dumps({"content": "a" * 4_000_000}).encode()
        reader.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(text)}\r\n\r\n".encode() + text
        )  # fmt: skip
        assert until(lambda: len(server.connections) == 1)
        assert until(lambda: not server.connections, 60)


def test_a_long_text_to_tokenize_does_not_hold_up_other_requests(
    server: Any, monkeypatch: Any
) -> None:
    import threading

    tokenizer, go = server.service.scheduler.tokenizer, threading.Event()
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text: go.wait(30) and encode(self, text)
    )
    asking = threading.Thread(target=call, args=(server.url, "/tokenize", {"content": "a"}))
    asking.start()
    try:
        begin = time.monotonic()
        assert call(server.url, "/health").status == 200
        assert time.monotonic() - begin < 20
    finally:
        go.set()
        asking.join(60)


def test_a_full_queue_is_429_with_retry_after(
    own_server: Callable[..., Any], slowly: Callable[[Any], None]
) -> None:
    with own_server(parallel=1, max_waiting=1) as server:
        slowly(server)
        endless = {"prompt": "a", "max_tokens": 2000, "stream": True}
        netloc = urlsplit(server.url).netloc
        held = [http.client.HTTPConnection(netloc) for _ in range(2)]
        scheduler = server.service.scheduler
        for i, connection in enumerate(held):
            connection.request("POST", COMPLETIONS, json.dumps(endless),
                               {"Content-Type": "application/json"})  # fmt: skip
            assert until(lambda i=i: scheduler.n_running + scheduler.n_waiting == i + 1)
        reply = call(server.url, COMPLETIONS, VALID[COMPLETIONS])
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert reply.json["error"]["code"] == "queue_full"
        for connection in held:
            connection.close()
        assert until(lambda: scheduler.n_running + scheduler.n_waiting == 0)
        assert call(server.url, COMPLETIONS, VALID[COMPLETIONS]).status == 200


def test_the_end_lets_texts_finish_and_takes_no_more(
    own_server: Callable[..., Any], slowly: Callable[[Any], None]
) -> None:
    with own_server(drain_seconds=60) as server:
        slowly(server)
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        body = {"prompt": "a", "max_tokens": 400, "stream": True}
        connection.request("POST", COMPLETIONS, json.dumps(body),
                           {"Content-Type": "application/json"})  # fmt: skip
        answer = connection.getresponse()
        first = answer.readline()
        server.stop()
        assert until(lambda: not server.service.ready)
        assert call(server.url, "/ready").status == 503
        assert call(server.url, COMPLETIONS, VALID[COMPLETIONS]).status == 503
        rest = events(Reply(200, {}, first + answer.read()))
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert len("".join(e["choices"][0]["text"] for e in rest)) > 300


def test_a_second_signal_ends_texts_that_still_run(
    own_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_server(drain_seconds=3600) as server:
        batch = server.service.scheduler._batch
        step = batch.step
        monkeypatch.setattr(batch, "step", lambda: time.sleep(0.3) or step())
        body = json.dumps({"prompt": "a", "max_tokens": 2000, "stream": True}).encode()
        with connect(server.url) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            )  # fmt: skip
            assert b"200 OK" in client.recv(100)
            server._loop.call_soon_threadsafe(server._end)
            assert until(lambda: not server.service.ready)
            assert server.service.scheduler.n_running == 1
            server._loop.call_soon_threadsafe(server._end)
            assert until(lambda: server.service.scheduler.n_running == 0)
            assert until(lambda: server._loop.is_closed())


# ---- many at once ----


def test_many_streams_have_each_their_own_text(server: Any) -> None:
    """Each text of 200 clients at once is that of a run alone, and nothing stays open."""
    import threading

    def body(i: int) -> dict[str, Any]:
        return {"prompt": f"client {i % 50} asks", "max_tokens": 4 + i % 17, "seed": i % 50 + 100,
                "stream": i % 2 == 0}  # fmt: skip

    def text(reply: Reply, stream: bool) -> str:
        assert reply.status == 200
        found = events(reply) if stream else [reply.json]
        return "".join(e["choices"][0]["text"] for e in found)

    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    n = 200
    expected = [text(call(server.url, COMPLETIONS, body(i)), i % 2 == 0) for i in range(n)]
    before, found = files(), [""] * n

    def ask(i: int) -> None:
        found[i] = text(call(server.url, COMPLETIONS, body(i)), i % 2 == 0)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == expected
    assert until(lambda: files() <= before)
