"""Each endpoint answers in OpenAI's shape, whole and as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from plain_http import call, events

from gptc import generate
from gptc.serve.tools import parse_calls
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config, varied

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def complete(server: Any, **body: Any) -> Any:
    reply = call(server.url, COMPLETIONS, {"seed": 1, "max_tokens": 12, **body})
    assert reply.status == 200, reply.body
    return reply.json


def test_a_completion_is_the_text_of_generate(server: Any) -> None:
    found = complete(server, prompt="Once", n=3)
    with varied(make_config(block_size=2048)) as model:
        texts = generate(
            model, make_tokenizer("bytes"), "Once", max_tokens=12, num_samples=3, temperature=1.0,
            seed=1, stop=(),
        )  # fmt: skip
    assert [choice["text"] for choice in found["choices"]] == texts
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 36, "total_tokens": 40}
    assert (found["object"], found["model"]) == ("text_completion", "tiny")


def test_a_stream_has_the_same_text_and_usage(server: Any) -> None:
    body = {"prompt": ["One", "Two"], "n": 2, "seed": 1, "max_tokens": 12, "logprobs": 2}
    whole = call(server.url, COMPLETIONS, body).json
    options = {"include_usage": True}
    reply = call(server.url, COMPLETIONS, {**body, "stream": True, "stream_options": options})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(reply)
    for expected in whole["choices"]:
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == expected["index"]]
        assert "".join(piece["text"] for piece in mine) == expected["text"]
        tokens = [token for piece in mine for token in piece["logprobs"]["token_logprobs"]]
        assert tokens == expected["logprobs"]["token_logprobs"]
        offsets = [at for piece in mine for at in piece["logprobs"]["text_offset"]]
        assert offsets == expected["logprobs"]["text_offset"]
        assert [piece["finish_reason"] for piece in mine][-1] == "length"
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]


def test_echo_scores_the_prompt_as_the_model_does(server: Any) -> None:
    found = complete(server, prompt="Hello", echo=True, logprobs=1, max_tokens=0)
    choice = found["choices"][0]
    assert choice["text"] == "Hello"
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("Hello")
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is None
    with varied(make_config(block_size=2048)) as model, model.session() as session:
        for i, token in enumerate(b"Hell"):
            row = session.decode([token]).astype(float)
            expected = row[b"Hello"[i + 1]] - row.max()
            expected -= float(
                __import__("numpy").log(__import__("numpy").exp(row - row.max()).sum())
            )
            assert logprobs["token_logprobs"][i + 1] == pytest.approx(expected, abs=1e-3)


def test_echo_scores_the_prompt_of_each_choice(server: Any) -> None:
    body = {"prompt": "Hello", "echo": True, "logprobs": 1, "max_tokens": 5}
    (one,) = complete(server, **body)["choices"]
    many = complete(server, n=3, **body)["choices"]
    assert len(many) == 3
    for choice in many:
        found, expected = choice["logprobs"]["token_logprobs"], one["logprobs"]["token_logprobs"]
        assert (found[0], len(found)) == (None, 10)
        assert found[1:5] == pytest.approx(expected[1:5], abs=1e-4)


def test_offsets_count_whole_characters(server: Any) -> None:
    body = {"prompt": "é!", "echo": True, "logprobs": 0, "max_tokens": 0}
    assert complete(server, **body)["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1]


def test_token_ids_best_of_stop_and_biases(server: Any) -> None:
    by_ids = complete(server, prompt=list(b"Once"))["choices"][0]["text"]
    assert by_ids == complete(server, prompt="Once")["choices"][0]["text"]
    biased = complete(server, prompt="a", logit_bias={"65": 100}, return_token_ids=True)
    assert biased["choices"][0]["text"] == "A" * 12
    assert biased["choices"][0]["token_ids"] == [65] * 12
    stopped = complete(server, prompt="a", logit_bias={"65": 100}, stop="AAA")["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    many = complete(server, prompt="Once", n=4, logprobs=0)["choices"]
    best = complete(server, prompt="Once", best_of=4, logprobs=0)["choices"]
    sums = {c["text"]: sum(c["logprobs"]["token_logprobs"]) for c in many}
    assert best[0]["text"] == max(sums, key=sums.__getitem__)


def test_structured_text_matches(server: Any) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    assert complete(server, regex="[0-9]{4}")["choices"][0]["text"].isdigit()
    assert complete(server, grammar='root ::= "yes" | "no"')["choices"][0]["text"] in ("yes", "no")
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": form, "seed": 3}
    found = call(server.url, CHAT, body).json["choices"][0]
    assert isinstance(json.loads(found["message"]["content"])["on"], bool)
    assert found["finish_reason"] == "stop"


# ---- conversations ----

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def test_an_answer_is_continued(server: Any) -> None:
    """The answer is the rest of the last message, as a completion of the same text has it."""
    begun = [*HELLO, {"role": "assistant", "content": "Once "}]
    body = {"messages": begun, "max_tokens": 9, "seed": 4, "continue_final_message": True}
    text = "user: Hello\nassistant: Once "
    same = complete(server, prompt=text, max_tokens=9, seed=4)["choices"][0]["text"]
    found = call(server.url, CHAT, body).json["choices"][0]["message"]["content"]
    assert found == same
    as_vllm_wants = {**body, "add_generation_prompt": False}
    assert call(server.url, CHAT, as_vllm_wants).json["choices"][0]["message"]["content"] == found
    again = {**body, "continue_final_message": False}
    assert call(server.url, CHAT, again).json["choices"][0]["message"]["content"] != found
    plain = {"messages": HELLO, "max_tokens": 9, "seed": 4, "add_generation_prompt": False}
    same = complete(server, prompt="user: Hello\n", max_tokens=9, seed=4)["choices"][0]["text"]
    assert call(server.url, CHAT, plain).json["choices"][0]["message"]["content"] == same
    refused = call(server.url, CHAT, {**body, "messages": HELLO})
    assert refused.status == 400
    assert refused.json["error"]["param"] == "continue_final_message"
    called = {"tools": TOOLS, "tool_choice": "required"}
    assert call(server.url, CHAT, {**body, **called}).status == 400


def test_a_completion_has_a_form(server: Any) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}},
              "required": ["on"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    text = complete(server, prompt="Once", response_format=form, max_tokens=200)["choices"][0][
        "text"
    ]
    assert isinstance(json.loads(text)["on"], bool)


def test_an_answer_whole_and_as_a_stream(server: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 9, "seed": 4, "logprobs": True, "top_logprobs": 3}
    found = call(server.url, CHAT, body).json
    choice = found["choices"][0]
    same = call(server.url, COMPLETIONS,
                {"prompt": "user: Hello\nassistant:", "max_tokens": 9, "seed": 4})  # fmt: skip
    assert choice["message"] == {"role": "assistant", "content": same.json["choices"][0]["text"]}
    assert len(choice["logprobs"]["content"]) == found["usage"]["completion_tokens"] == 9
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 3
    pieces = events(call(server.url, CHAT, {**body, "stream": True}))
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d.get("content", "") for d in deltas) == choice["message"]["content"]
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"


def test_one_space_is_stripped_whole_and_as_a_stream(server: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(server.service.scheduler.tokenizer, "strips_space", True)
    spaces = {"messages": HELLO, "logit_bias": {"32": 100}, "max_tokens": 4}
    whole = call(server.url, CHAT, spaces).json["choices"][0]["message"]["content"]
    pieces = events(call(server.url, CHAT, {**spaces, "stream": True}))
    assert whole == "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == "   "


def test_a_required_call_is_valid_and_parsed(server: Any) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        body = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice, "seed": 2}
        found = call(server.url, CHAT, body).json["choices"][0]
        assert found["finish_reason"] == "tool_calls"
        (made,) = found["message"]["tool_calls"]
        assert made["function"]["name"] == "weather"
        assert json.loads(made["function"]["arguments"])["city"] in ("Paris", "Rome")
        pieces = events(call(server.url, CHAT, {**body, "stream": True}))
        assert all(piece["choices"][0]["delta"] for piece in pieces)
        last = pieces[-1]["choices"][0]
        assert last["delta"]["tool_calls"][0]["function"] == made["function"]


def test_calls_are_found_in_the_text_and_other_text_stays() -> None:
    call_text = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    text, calls = parse_calls(f"Well.\n{call_text}\n{call_text}")
    assert text == "Well."
    assert [c["function"] for c in calls] == [{"name": "f", "arguments": '{"x": 1}'}] * 2
    for plain in ("no call", "<tool_call>{broken</tool_call>", '<tool_call>["f"]</tool_call>'):
        assert parse_calls(plain) == (plain, [])
    assert parse_calls(call_text[:-12])[1][0]["function"]["name"] == "f"  # without its end


def test_text_that_only_begins_like_a_call_is_told(server: Any) -> None:
    for text in ("<tool_c", "<tool_call>", "a<b"):
        body = {"messages": HELLO, "tools": TOOLS, "grammar": f'root ::= "{text}"'}
        whole = call(server.url, CHAT, body).json["choices"][0]["message"]["content"]
        assert whole == text
        pieces = events(call(server.url, CHAT, {**body, "stream": True}))
        deltas = [piece["choices"][0]["delta"].get("content", "") for piece in pieces]
        assert "".join(deltas) == text


def test_a_conversation_with_calls_reaches_the_template(server: Any) -> None:
    made = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [made]},
                {"role": "tool", "tool_call_id": "1", "content": "2"}]  # fmt: skip
    reply = call(server.url, CHAT, {"messages": messages, "tools": TOOLS, "max_tokens": 1})
    assert reply.status == 200
    text = f"tools: {json.dumps(TOOLS)}\n"
    assert reply.json["usage"]["prompt_tokens"] > len(text)


def test_a_model_without_a_template_says_how_to_give_one(own_server: Callable[..., Any]) -> None:
    with own_server(template=None) as server:
        reply = call(server.url, CHAT, {"messages": HELLO})
        assert reply.status == 400
        assert "start the server with --chat-template FILE" in reply.message
    with own_server(template="{{ messages[0].content }}") as server:
        reply = call(server.url, CHAT, {"messages": HELLO, "tools": TOOLS})
        assert reply.status == 400
        assert "no place for tools" in reply.message
    with own_server(template="{{ 1 + messages[0].content }}") as server:
        reply = call(server.url, CHAT, {"messages": HELLO})
        assert reply.message.startswith("the chat template fails (line 1: ")
        assert reply.message.endswith(
            "): give other messages, or start the server with another --chat-template FILE"
        )


# ---- the other endpoints ----


def test_a_response_whole_and_as_a_stream(server: Any) -> None:
    body = {"input": "Hello", "instructions": "Be brief.", "max_output_tokens": 7, "seed": 5}
    found = call(server.url, "/v1/responses", body).json
    text = found["output"][0]["content"][0]["text"]
    assert found["status"] == "incomplete"
    assert found["usage"]["output_tokens"] == 7
    reply = call(server.url, "/v1/responses", {**body, "stream": True})
    blocks = [b.split("\ndata: ") for b in reply.body.decode().split("\n\n") if b]
    data = [json.loads(block[1]) for block in blocks]
    assert [d["sequence_number"] for d in data] == list(range(len(data)))
    assert "".join(d["delta"] for d in data if d["type"] == "response.output_text.delta") == text
    assert data[-1]["type"] == "response.incomplete"


def test_tokens_models_health_metrics_and_docs(server: Any) -> None:
    url = server.url
    tokens = call(url, "/tokenize", {"content": "Hé"}).json["tokens"]
    assert tokens == list("Hé".encode())
    assert call(url, "/detokenize", {"tokens": tokens}).json == {"content": "Hé"}
    (model,) = call(url, "/v1/models").json["data"]
    assert model["id"] == "tiny"
    assert call(url, "/v1/models/tiny").json == model
    assert call(url, "/v1/models/other").status == 404
    assert call(url, "/health").json == {"status": "ok"}
    assert call(url, "/ready").status == 200
    complete(server, prompt="Once" * 20)
    complete(server, prompt="Once" * 20)
    metrics = call(url, "/metrics").body.decode()
    for name in ("gptc_waiting", "gptc_tokens_total", "gptc_time_to_first_token_seconds_bucket",
                 "gptc_batch_size_bucket", "gptc_prompt_tokens_reused_total",
                 "gptc_draft_tokens_accepted_total"):  # fmt: skip
        assert name in metrics
    document = call(url, "/openapi.json").json
    assert set(document["paths"]) >= {COMPLETIONS, CHAT, "/tokenize", "/health"}
    for page in ("/", "/docs", "/docs.js", "/playground.js", "/playground.css"):
        reply = call(url, page)
        assert reply.status == 200
        assert "default-src 'self'" in reply.headers["content-security-policy"]
