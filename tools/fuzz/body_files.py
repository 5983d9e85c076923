"""Valid bodies of requests to a server, and what it does with them before a model computes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mutate
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.serve.options import ServeOptions
from gptc.serve.problems import Problem
from gptc.serve.schema import check_fields
from gptc.tokenizer.registry import make_tokenizer
from model_files import Target

_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: "
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
_CALL = {"function": {"name": "f", "arguments": '{"x": 1}'}, "type": "function", "id": "c"}
_SAMPLING = {
    "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "seed": 7,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"65": 1.5}, "n": 2,
    "stop": ["\n", "x"], "priority": 1, "return_token_ids": True, "user": "me",
}  # fmt: skip
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_BODIES: dict[str, dict[str, Any]] = {
    "completion": {
        "model": "tiny", "prompt": ["Once", "Twice"], "max_tokens": 5, "logprobs": 3,
        "echo": True, "best_of": 2, "stream": False, **_SAMPLING,
    },
    "completion-ids": {"prompt": [[65, 66], [67]], "regex": "[ab]+", "stop": "x"},
    "chat": {
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "7", "tool_call_id": "c"},
        ],
        "tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}},
        "max_tokens": 9, "logprobs": True, "top_logprobs": 2,
        "chat_template_kwargs": {"enable_thinking": False}, "stream": True,
        "stream_options": {"include_usage": True},
    },
    "chat-schema": {
        "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 9,
        "response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}},
    },
    "response": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "instructions": "Be kind.", "max_output_tokens": 9, "temperature": 0.5, "seed": 3,
    },
    "embedding": {
        "model": "tiny", "input": ["Once", "Twice"], "encoding_format": "base64", "dimensions": 16,
        "pooling": "last", "priority": 1, "user": "me",
    },
    "embedding-ids": {"input": [[65, 66], [67]]},
    "tokenize": {"content": "the cat \u65e5", "add_special": True},
    "detokenize": {"tokens": [65, 66, 255]},
}  # fmt: skip
PATHS = {
    "completion": "/v1/completions", "chat": "/v1/chat/completions", "response": "/v1/responses",
    "embedding": "/v1/embeddings", "tokenize": "/tokenize", "detokenize": "/detokenize",
}  # fmt: skip
"""The endpoint of a body, by the name's first word."""


def targets(folder: Path) -> dict[str, Target]:
    """A valid body for each endpoint, in `folder`."""
    found = {}
    for name, body in _BODIES.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(body))
        found[f"body-{name}"] = Target(path, partial(ask, name, path), mutate.json_value)
    answer = folder / "answer.txt"
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    answer.write_text(f"Yes.\n{call}\n{call}")
    found["tool-calls"] = Target(answer, partial(_parse, answer), mutate.lines)
    return found


class _Http:
    """A request whose body is the content of a file."""

    headers: Mapping[str, str] = {"content-type": "application/json; charset=utf-8"}

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def stream(self) -> AsyncIterator[bytes]:
        """The body in two pieces."""
        half = len(self._body) // 2
        yield self._body[:half]
        yield self._body[half:]


@cache
def _service() -> Any:
    """A service as an endpoint sees it before there is a job: with the shape of a model alone."""
    from gptc.serve.service import Service

    config = GPTConfig.preset("byte", block_size=512, n_layer=1, n_embd=16, n_head=2, n_ff=64)
    tokenizer = make_tokenizer("bytes")
    tokenizer.marks = replace(tokenizer.marks, chat_template=_TEMPLATE)
    model = SimpleNamespace(config=config, max_seq=512)
    scheduler: Any = SimpleNamespace(model=model, tokenizer=tokenizer, n_ctx=512)
    pool: Any = None
    return Service("tiny", scheduler, ServeOptions(), metrics=None, pool=pool)  # type: ignore[arg-type]


def ask(name: str, path: Path) -> None:
    """Reads a body, checks its fields and makes the requests, as the endpoint does."""
    from gptc.serve import chat, completions, embeddings, responses
    from gptc.serve.bodies import read_json

    kind = name.partition("-")[0]
    modules = {
        "completion": completions, "chat": chat, "response": responses, "embedding": embeddings,
    }  # fmt: skip
    http: Any = _Http(path.read_bytes())
    try:
        fields = check_fields(_fields(kind), _loop().run_until_complete(read_json(http, 60)))
        if kind in modules:
            modules[kind].prepare(_service(), fields)
            return
        tokenizer = _service().scheduler.tokenizer
        if kind == "tokenize":
            tokenizer.encode(fields["content"])
        else:
            tokenizer.decode([int(token) for token in fields["tokens"]])
    except Problem as problem:
        json.dumps(problem.body())
        if problem.status >= 500 or not str(problem) or "\n" in str(problem):
            raise
        raise GptcError(str(problem)) from None


@cache
def _fields(kind: str) -> Any:
    """The fields of an endpoint's body."""
    from gptc.serve.app import endpoints

    (found,) = [each for each in endpoints(_service()) if each.path == PATHS[kind]]
    return found.fields


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _parse(path: Path) -> None:
    from gptc.serve.tools import bare_call, parse_calls

    text = path.read_bytes().decode("utf-8", "replace")
    rest, calls = parse_calls(text)
    json.dumps([rest, calls, bare_call(text)])
