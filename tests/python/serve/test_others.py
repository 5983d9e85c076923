"""Clients of many users work: litellm, langchain, llm, lm-eval, schemathesis.

    pip install litellm 'lm-eval[api]' transformers langchain-openai llm schemathesis
    pytest -m clients tests/python/serve

The server is a process of `gptc serve` with a model that `gptc train` has made; schemathesis asks
one in a thread. The openai package and curl have their tests in test_clients.py, browsers theirs in
test_playground.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from others import Others, Started

from gptc import Model, embed
from gptc.checkpoint.find import open_checkpoint
from gptc.tokenizer.native import byte_characters
from harness_tasks import CHOICES, results, scores, write_tasks
from small_models import make_config, varied

pytestmark = pytest.mark.clients
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download of prices


def test_litellm(started: Started, other: Others) -> None:
    litellm = other.package("litellm")

    given: dict[str, Any] = {
        "model": "openai/tiny", "api_base": f"{started.url}/v1", "api_key": "none", "seed": 1,
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
    long = [{"role": "user", "content": "Hello" * 1000}]
    with pytest.raises(litellm.ContextWindowExceededError, match="maximum context length is 2,048"):
        litellm.completion(messages=long, **given)


def test_langchain(started: Started, other: Others) -> None:
    openai = other.package("langchain-openai")
    from langchain_core.messages import AIMessage

    chat = openai.ChatOpenAI(
        base_url=f"{started.url}/v1", api_key="none", model="tiny", seed=3, max_tokens=8,
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


def test_embeddings_of_langchain_and_litellm(started: Started, other: Others) -> None:
    langchain, litellm = other.package("langchain-openai"), other.package("litellm")
    texts = ["Once", "Twice"]
    with Model.load(started.run, threads=1) as model:
        expected = embed(model, open_checkpoint(started.run).tokenizer(), texts)
    given = langchain.OpenAIEmbeddings(
        base_url=f"{started.url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(given.embed_documents(texts), expected, atol=1e-5)
    found = litellm.embedding(
        model="openai/tiny", input=texts, api_base=f"{started.url}/v1", api_key="none"
    )
    np.testing.assert_allclose([e["embedding"] for e in found.data], expected, atol=1e-5)


def test_llm(started: Started, other: Others, tmp_path: Path) -> None:
    """Simon Willison's command line, with the model in its list of others' models."""
    other.package("llm")
    entry = f"- model_id: ours\n  model_name: tiny\n  api_base: {started.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)

    def run(*arguments: str) -> str:
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        command = [sys.executable, "-m", "llm", "-m", "ours", "--key", "none", *arguments]
        ran = subprocess.run(
            [*command, "-o", "max_tokens", "8", "-o", "seed", "1", "Hello"],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    streamed = run()
    assert len(streamed.encode()) >= 8
    assert run("--no-stream") == streamed


def test_schemathesis_finds_no_error_of_the_server(
    own_server: Any, other: Others, tmp_path: Path
) -> None:
    """Each field of each operation with values at its borders, beyond them and of wrong types.

    The context is short: answers without a limit fill it, and their text does not matter here.
    """
    other.package("schemathesis")
    with own_server(model=varied(make_config(block_size=128))) as server:
        command = [
            Path(sys.executable).with_name("st"), "run", f"{server.url}/openapi.json", "--seed",
            "1", "--checks", "not_a_server_error", "--phases", "coverage",
            "--generation-database", "none", "--warnings", "off",
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


NAMES = ("choice", "writing")  # which the server can answer


def test_lm_eval_has_the_numbers_of_the_model_in_process(
    started: Started, other: Others, tmp_path: Path
) -> None:
    """`local-completions` asks the server, and gptc's model class the model in this process."""
    other.package("lm-eval")
    for name in ("aiohttp", "tenacity", "transformers"):  # of lm-eval[api]
        pytest.importorskip(name, reason=f"pip install {name}")
    from lm_eval.tasks import TaskManager

    import gptc.bench.harness  # noqa: F401  (registers the model)

    folder = write_tasks(tmp_path / "tasks", NAMES, [f" {text}" for text in CHOICES])
    served = (
        f"base_url={started.url}/v1/completions,model=tiny,num_concurrent=4,max_length=2000,"
        f"tokenizer_backend=huggingface,tokenizer={byte_folder(tmp_path / 'tokenizer')}"
    )
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    ours = results("gptc", f"model={started.run}", NAMES, tasks)
    theirs = results("local-completions", served, NAMES, tasks)
    for name in NAMES:
        for metric, value in ours["results"][name].items():
            if isinstance(value, float):
                assert theirs["results"][name][metric] == value, metric
        for one, two in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            if name == "writing":
                assert one["resps"] == two["resps"]
                assert one["resps"][0][0]
            else:
                expected, found = scores(one["resps"]), scores(two["resps"])
                assert len(expected) == 8  # a score and whether it is the likeliest, four times
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
