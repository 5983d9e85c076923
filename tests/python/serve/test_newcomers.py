"""What a new user meets first: a wrong base URL, a prompt that is too long, a monitor's HEAD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from plain_http import call

HELLO = [{"role": "user", "content": "Hello"}]


def test_a_base_url_with_the_wrong_end_is_told_where_to_go(server: Any) -> None:
    body = {"prompt": "a"}
    for wrong in ("/completions", "/v1/v1/completions", "//v1/completions"):
        reply = call(server.url, wrong, body)
        assert reply.status == 404
        assert "; /v1/completions is one: the client's base URL" in reply.message
    assert "; /tokenize is one" in call(server.url, "/v1/tokenize", {"content": "a"}).message
    assert call(server.url, "/nothing", body).message.endswith("see /docs")


def test_the_log_names_paths_that_are_not_here(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        call(server.url, "/completions", {"prompt": "a"})
        call(server.url, "/a%20b%0a200%20" + "x" * 500, {"prompt": "a"})
    lines = [r.getMessage() for r in caplog.records if r.name == "gptc.serve"]
    assert len(lines) == 2
    assert "POST /completions 404 " in lines[0]
    assert "POST /a%20b%0A200%20xxx" in lines[1]
    assert len(lines[1]) < 200
    assert 'path="/completions"' not in call(server.url, "/metrics").body.decode()


def test_a_prompt_that_is_too_long_has_the_words_that_clients_know(
    own_server: Callable[..., Any],
) -> None:
    with own_server(context=64) as server:
        for n in (65, 3000):  # more than a sequence holds, and more than the model does
            for path, body in (
                ("/v1/completions", {"prompt": "a" * n}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * n}]}),
                ("/v1/embeddings", {"input": "a" * n}),
            ):
                reply = call(server.url, path, body)
                assert (reply.status, reply.json["error"]["code"]) == (
                    400, "context_length_exceeded",
                )  # fmt: skip
                assert "this model's maximum context length is 64 tokens: shorten it" in (
                    reply.message
                )


def test_a_head_has_the_status_of_a_get(server: Any) -> None:
    for path, status in (
        ("/", 200),
        ("/health", 200),
        ("/v1/models", 200),
        ("/v1/completions", 405),
    ):
        reply = call(server.url, path, method="HEAD")
        assert (reply.status, reply.body) == (status, b"")
    counted = call(server.url, "/metrics").body
    assert b'path="/health",status="200"' in counted


def test_a_large_bound_is_written_out(server: Any) -> None:
    reply = call(server.url, "/v1/completions", {"prompt": "a", "seed": -1})
    assert reply.message.endswith("between 0 and 9,223,372,036,854,775,807")
