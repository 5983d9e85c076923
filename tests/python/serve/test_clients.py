"""Clients of others work: the openai package and curl, and gptc's own benchmark of servers."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import Any

import pytest
from others import Others

from gptc.bench.serve import bench_serve, table
from gptc.errors import GptcError, UsageError

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def test_the_openai_package(url: str, other: Others) -> None:
    openai = other.package("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.completions.create(
        model="tiny", prompt="Once", max_tokens=8, n=2, seed=1, logprobs=3
    )
    assert len(whole.choices) == 2
    assert len(whole.choices[0].logprobs.token_logprobs) == 8
    stream = client.completions.create(
        model="tiny", prompt="Once", max_tokens=8, n=2, seed=1, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts, usage = ["", ""], None
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage == whole.usage
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=2
    )
    assert len(chat.choices[0].logprobs.content) == 5
    answer = client.responses.create(model="tiny", input="Hello", max_output_tokens=6, top_p=0.9)
    assert answer.usage.output_tokens == 6
    assert isinstance(answer.output_text, str)
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.completions.create(model="other", prompt="a")


def test_the_openai_package_with_schemas_tools_and_async(url: str, other: Others) -> None:
    openai = other.package("openai")
    pytest.importorskip("llguidance", reason="pip install '.[grammar]'")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    chat = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form)
    assert json.loads(chat.choices[0].message.content).keys() == {"on"}
    tool = {"type": "function", "function": {"name": "switch", "parameters": schema}}
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[tool], tool_choice="required"
    )
    (made,) = chat.choices[0].message.tool_calls
    assert made.function.name == "switch"

    async def together() -> list[str]:
        ours = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        async def one(seed: int) -> str:
            stream = await ours.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=6, seed=seed, stream=True
            )
            return "".join([e.choices[0].delta.content or "" async for e in stream])

        try:
            return list(await asyncio.gather(*(one(seed % 4) for seed in range(12))))
        finally:
            await ours.close()

    texts = asyncio.run(together())
    assert texts[:4] * 3 == texts
    assert len(set(texts)) == 4


def test_the_benchmark_of_servers(server: Any) -> None:
    told: list[str] = []
    given: dict[str, Any] = {"requests": 2, "prompt_words": 5, "max_tokens": 6}
    rows = bench_serve(server.url, clients=(1, 3), report=told.append, **given)
    assert told[:2] == ["1 client, 2 requests each", "3 clients, 2 requests each"]
    assert [row.clients for row in rows] == [1, 3]
    assert all(row.tokens_per_s > 0 and row.failed == 0 and row.first_ms > 0 for row in rows)
    assert len(table(rows).splitlines()) == 3
    counted = server.service.metrics.requests.labels("/v1/completions", "200")._value
    before = counted.get()
    bench_serve(server.url, clients=(3,), requests=9, prompt_words=5, max_tokens=2, seconds=0)
    assert counted.get() == before + 3
    with pytest.raises(UsageError, match="http://127"):
        bench_serve("127.0.0.1")
    with pytest.raises(GptcError, match="no request succeeded"):
        bench_serve(f"{server.url}/nothing", clients=(1,))


def test_curl(url: str, other: Others) -> None:
    curl = other.program("curl", install="apt install curl")
    body = json.dumps({"prompt": "Once", "max_tokens": 5, "seed": 1, "stream": True})
    command = [
        curl, "-sSN", "--fail", "-H", "Content-Type: application/json", "-d", body,
        f"{url}/v1/completions",
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode()
    events = [json.loads(line[6:]) for line in said.split("\n") if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert said.endswith("data: [DONE]\n\n")
