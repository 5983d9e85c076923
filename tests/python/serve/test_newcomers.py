"""What a new user meets first: a wrong base URL, a prompt that is too long, a monitor's HEAD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from plain_http import call

HELLO = [{"role": "user", "content": "Hello"}]
COMPLETIONS = "/v1/completions"


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


CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}
PART = " is 'image_url'; it must be one of text, input_text, output_text"


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (COMPLETIONS, {"prompt": [9999]}, "prompt", "token 9999, outside"),
        (COMPLETIONS, {"prompt": "a" * 3000}, "prompt", "maximum context length"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 3000}]}, "messages", "maximum"),
        (RESPONSES, {"input": "a" * 3000}, "input", "maximum context length"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias", "token 9999"),
        (COMPLETIONS, {"prompt": "a", "regex": "("}, "regex", "unclosed group"),
        (COMPLETIONS, {"prompt": "a", "grammar": "x"}, "grammar", "::= is expected"),
        (
            COMPLETIONS,
            {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {
                "type": "nothing"}}}},
            "response_format",
            "nothing",
        ),
        (CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": "required"}, "tools", "nothing"),
        (
            CHAT, {"messages": [*HELLO, {"role": "user"}]}, "messages[1].content",
            "messages[1].content is missing: give its text",
        ),
        (
            RESPONSES, {"input": [{"role": "user"}], "instructions": "x"}, "input[0].content",
            "input[0].content is missing: give its text",
        ),
        (
            CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages[0].content[0].type", "messages[0].content[0].type" + PART,
        ),
        (
            RESPONSES, {"input": [{"role": "user", "content": [IMAGE]}]},
            "input[0].content[0].type", "input[0].content[0].type" + PART,
        ),
        (
            CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text", "messages[0].content[0].text is missing: give text",
        ),
        (RESPONSES, {"input": "a", "tools": [TOOL]}, "tools", "tools are for /v1/chat/completions"),
    ],
)  # fmt: skip
def test_an_error_names_the_field_at_fault(
    server: Any, path: str, body: dict[str, Any], param: str, says: str
) -> None:
    if param in ("regex", "grammar", "response_format", "tools"):
        pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    reply = call(server.url, path, body)
    assert (reply.status, reply.json["error"]["param"]) == (400, param), reply.message
    assert says in reply.message


@pytest.mark.parametrize(
    ("path", "body", "more"),
    [
        (CHAT, {"messages": HELLO}, {"service_tier": "auto", "cache_prompt": True}),
        (CHAT, {"messages": HELLO}, {"safety_identifier": "x", "prompt_cache_key": "y"}),
        (COMPLETIONS, {"prompt": "a"}, {"cache_prompt": False}),
        (RESPONSES, {"input": "a"}, {"tools": [], "text": {"format": {"type": "text"}}}),
        (RESPONSES, {"input": "a"}, {"tool_choice": "auto", "store": False}),
    ],
)
def test_fields_that_clients_send_change_nothing(
    server: Any, path: str, body: dict[str, Any], more: dict[str, Any]
) -> None:
    length = {"max_output_tokens" if path == RESPONSES else "max_tokens": 4, "seed": 1}
    found = [call(server.url, path, {**body, **length, **given}) for given in ({}, more)]
    assert [reply.status for reply in found] == [200, 200], found[1].body
    texts = [r.json["output" if path == RESPONSES else "choices"][0] for r in found]
    for text in texts:
        text.pop("id", None)
    assert texts[0] == texts[1]


def test_an_effort_is_a_value_for_the_template(own_server: Callable[..., Any]) -> None:
    with own_server(
        template="{{ reasoning_effort or 'unset' }}{{ messages[0].content }}"
    ) as server:
        for given, n in (
            ({}, 10),
            ({"reasoning_effort": "low"}, 8),
            ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "l"}}, 6),
        ):
            body = {"messages": HELLO, "max_tokens": 1, **given}
            assert call(server.url, CHAT, body).json["usage"]["prompt_tokens"] == n
