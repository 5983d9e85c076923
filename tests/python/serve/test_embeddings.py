"""/v1/embeddings has the vectors of gptc.embed, in OpenAI's shape, and delays no text."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from plain_http import call

from gptc import Model, embed, generate
from gptc.engine.config import GPTConfig
from gptc.engine.session import Session
from gptc.generation.batch import MOST_ROWS
from gptc.generation.embedding import embedding, vector_of
from gptc.generation.request import make_request
from gptc.serve.jobs import Event
from gptc.serve.scheduler import Scheduler
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config, varied

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["Once", "a longer text of more than one block of tokens"]


def vectors(server: Any, **body: Any) -> Any:
    reply = call(server.url, EMBEDDINGS, body)
    assert reply.status == 200, reply.body
    assert [entry["index"] for entry in reply.json["data"]] == list(range(len(reply.json["data"])))
    assert {entry["object"] for entry in reply.json["data"]} == {"embedding"}
    return [entry["embedding"] for entry in reply.json["data"]]


@pytest.fixture(scope="module")
def expected() -> Iterator[Callable[..., Any]]:
    with varied(make_config(block_size=2048)) as model:
        yield lambda texts, **options: embed(model, make_tokenizer("bytes"), texts, **options)


def test_vectors_of_each_form_of_input(server: Any, expected: Callable[..., Any]) -> None:
    for pooling in ("mean", "last"):
        want = expected(TEXTS, pooling=pooling)
        np.testing.assert_allclose(vectors(server, input=TEXTS, pooling=pooling), want, atol=1e-5)
    want = expected(TEXTS)
    ids = [list(text.encode()) for text in TEXTS]
    for given in (TEXTS, ids):
        np.testing.assert_allclose(vectors(server, input=given), want, atol=1e-5)
        np.testing.assert_allclose(vectors(server, input=given[1]), want[1:], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(want, axis=1), 1, rtol=1e-6)


def test_base64_has_the_same_numbers(server: Any) -> None:
    plain = vectors(server, input=TEXTS, encoding_format="float", dimensions=32)
    coded = vectors(server, input=TEXTS, encoding_format="base64")
    for numbers, text in zip(plain, coded, strict=True):
        assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == numbers


def test_usage_counts_tokens(server: Any) -> None:
    found = call(server.url, EMBEDDINGS, {"input": TEXTS, "model": "tiny"}).json
    n = sum(map(len, TEXTS))
    assert found["usage"] == {"prompt_tokens": n, "total_tokens": n}
    assert (found["object"], found["model"]) == ("list", "tiny")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "input is missing"),
        ({"input": ""}, 400, "empty"),
        ({"input": ["a", ""]}, 400, "empty"),
        ({"input": []}, 400, "input has 0 items"),
        ({"input": [300]}, 400, "token 300"),
        ({"input": "a" * 3000}, 400, "3,000 tokens"),
        ({"input": ["a"] * 257}, 400, "at most 256"),
        ({"input": "a", "dimensions": 8}, 400, "vectors have 32 numbers"),
        ({"input": "a", "encoding_format": "hex"}, 400, "one of float, base64"),
        ({"input": "a", "pooling": "max"}, 400, "one of mean, last"),
        ({"input": "a", "model": "other"}, 404, "this server has tiny"),
    ],
)
def test_a_bad_body_gets_its_reason(server: Any, body: Any, status: int, says: str) -> None:
    reply = call(server.url, EMBEDDINGS, body)
    assert (reply.status, says in reply.message) == (status, True), reply


def test_the_openai_package(server: Any, expected: Callable[..., Any]) -> None:
    openai = pytest.importorskip("openai", reason="pip install openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    found = client.embeddings.create(model="tiny", input=TEXTS)
    np.testing.assert_allclose([e.embedding for e in found.data], expected(TEXTS), atol=1e-5)


def test_a_long_input_delays_a_text_by_one_block_at_a_time(
    config: Callable[..., GPTConfig], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two tokens of a running text there are at most MOST_ROWS rows of embeddings."""
    rows: list[tuple[str, int]] = []
    for name in ("states", "sample"):
        step = getattr(Session, name)

        def counted(
            self: Session, tokens: Any, *rest: Any, step: Any = step, name: str = name
        ) -> Any:
            rows.append((name, len(tokens)))
            return step(self, tokens, *rest)

        monkeypatch.setattr(Session, name, counted)
    model: Model
    with varied(config(block_size=512)) as model:
        expected = generate(model, tokenizer, "a", max_tokens=100, stop=())[0]
        alone = embed(model, tokenizer, "b" * 400)
        scheduler = Scheduler(model, tokenizer, 4)
        begun, ended, pieces = threading.Event(), threading.Semaphore(0), []

        def written(event: Event) -> None:
            pieces.append(event.piece)
            begun.set()
            if event.finish:
                ended.release()

        def read(event: Event) -> None:
            assert (event.finish, event.error) == ("stop", None)
            ended.release()

        held = threading.Lock()
        with held:
            original = scheduler._batch.step

            def gated() -> Any:
                with held:  # until all embeddings wait, the text has its first token alone
                    yield from original()

            scheduler._batch.step = gated
            text = make_request(model, tokenizer, "a", max_tokens=100, stop=())
            scheduler.submit(text, written)
            rows.clear()
            jobs = [scheduler.submit(embedding(model, tokenizer, "b" * 400), read, key=str(i))
                    for i in range(3)]  # fmt: skip
        for _ in range(4):
            assert ended.acquire(timeout=60)
        scheduler.close()
    assert "".join(pieces) == expected
    for job in jobs:
        np.testing.assert_allclose(vector_of(job.samples[0]), alone, atol=1e-5)
    together = [n for (name, n), (before, _) in zip(rows[1:], rows, strict=False)
                if name == "states" and before == "sample"]  # fmt: skip
    assert len(together) >= 15
    assert max(n for name, n in rows if name == "states") <= MOST_ROWS
    runs = "".join("x" if name == "states" else " " for name, _ in rows[: 2 * len(together)])
    assert "xx" not in runs
