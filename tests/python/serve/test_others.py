"""Clients of many users work against the server: litellm, lm-eval, langchain, schemathesis.

    pip install litellm 'lm-eval[api]' transformers langchain-openai schemathesis
    pytest -m clients

The openai package and curl have their tests in test_clients.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import embed
from gptc.tokenizer.native import byte_characters

pytestmark = pytest.mark.clients
HELLO = [{"role": "user", "content": "Hello"}]


def test_litellm(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download of prices
    import litellm

    given: dict[str, Any] = {
        "model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none", "seed": 1,
        "max_tokens": 8, "num_retries": 0,
    }  # fmt: skip
    whole = litellm.completion(messages=HELLO, **given)
    assert whole.usage.completion_tokens == 8
    pieces = litellm.completion(messages=HELLO, stream=True, **given)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    plain = litellm.text_completion(
        prompt="Once", **{**given, "model": "text-completion-openai/tiny"}
    )
    assert plain.choices[0].text
    given["model"] = "openai/tiny"
    with pytest.raises(litellm.BadRequestError, match="temperature is"):
        litellm.completion(messages=HELLO, **given, temperature=-1.0)


def test_langchain(server: Any) -> None:
    from langchain_core.messages import AIMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", seed=3, max_tokens=8,
        max_retries=0,
    )  # fmt: skip
    whole = chat.invoke("Hello")
    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(str(piece.content) for piece in chat.stream("Hello")) == whole.content
    schema = {
        "title": "Switch", "type": "object", "properties": {"on": {"type": "boolean"}},
        "required": ["on"], "additionalProperties": False,
    }  # fmt: skip
    for method in ("json_schema", "function_calling"):
        longer = chat.model_copy(update={"max_tokens": 200})
        found = longer.with_structured_output(schema, method=method).invoke("Is it on?")
        assert found["on"] in (True, False)


def test_embeddings_of_langchain_and_litellm(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from langchain_openai import OpenAIEmbeddings

    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    service, texts = server.service, ["Once", "Twice"]
    expected = embed(service.scheduler.model, service.scheduler.tokenizer, texts)
    given = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(given.embed_documents(texts), expected, atol=1e-5)
    found = litellm.embedding(
        model="openai/tiny", input=texts, api_base=f"{server.url}/v1", api_key="none"
    )
    np.testing.assert_allclose([e["embedding"] for e in found.data], expected, atol=1e-5)


def test_schemathesis_finds_no_error_of_the_server(server: Any, tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("st"), "run", f"{server.url}/openapi.json", "--seed", "1",
        "--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", "5",
        "--generation-database", "none",
    ]  # fmt: skip
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout
    assert "10 passed" in ran.stdout


# ---- lm-eval ----


def byte_folder(path: Path) -> str:
    """A folder of Hugging Face with a tokenizer whose ids are bytes."""
    import tokenizers
    import transformers

    names = byte_characters()
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=names, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=made, eos_token=next(iter(names))).save_pretrained(path)
    return str(path)


def log_likelihood(model: Any, context: bytes, rest: bytes) -> tuple[float, bool]:
    """The log-probability of a text after another, in process; whether it is the likeliest."""
    with model.session() as session:
        tokens = list(context + rest)
        logits = session.decode(np.array(tokens, np.int32), 0, np.ones(len(tokens), bool))
    rows = logits[len(context) - 1 : -1].astype(np.float64)
    scores = rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
    scores -= rows.max(1, keepdims=True)
    best = bool((rows.argmax(1) == list(rest)).all())
    return float(scores[np.arange(len(rest)), list(rest)].sum()), best


def test_lm_eval_has_the_numbers_of_the_model(server: Any, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    harness = get_model("local-completions")(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer_backend="huggingface",
        tokenizer=byte_folder(tmp_path), num_concurrent=4, max_retries=1, max_length=500,
    )  # fmt: skip
    pairs = [("Once upon a time", " there was"), ("The", " end"), ("x", "yz"), ("1 + 1 =", " 2")]

    def instances(kind: str, values: list[Any]) -> list[Any]:
        return [
            Instance(request_type=kind, doc={}, arguments=value, idx=i, metadata=("t", i, 1))
            for i, value in enumerate(values)
        ]

    found = harness.loglikelihood(instances("loglikelihood", pairs))
    model = server.service.scheduler.model
    for (score, best), (context, rest) in zip(found, pairs, strict=True):
        expected, likeliest = log_likelihood(model, context.encode(), rest.encode())
        assert score == pytest.approx(expected, abs=1e-4)
        assert best == likeliest
    until = [("Once", {"until": ["\n"], "max_gen_toks": 6, "temperature": 0})]
    (text,) = harness.generate_until(instances("generate_until", until))
    from gptc.generation.decoder import generate

    options = {"max_tokens": 6, "stop": ["\n"], "temperature": 0.0}
    (ours,) = generate(model, server.service.scheduler.tokenizer, "Once", **options)
    assert text == ours
