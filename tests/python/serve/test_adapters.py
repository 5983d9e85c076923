"""A request's `model` chooses an adapter; its text is that of a run alone. SIGHUP reads all."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_http import call, events

from gptc import embed, generate
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.merged import AdapterSet, parse_adapters
from gptc.errors import GptcError, UsageError
from gptc.serve.adapters import Adapters
from gptc.serve.problems import NotFound
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_adapter, make_checkpoint, make_config

COMPLETIONS, NAMES = "/v1/completions", ("tiny", "one", "second")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A base and two adapters of different ranks and matrices."""
    base = make_checkpoint(make_config("llama", block_size=256), folder=tmp_path / "base").path
    return {
        "base": base,
        "one": make_adapter(tmp_path / "one", base, "all", 2),
        "two": make_adapter(tmp_path / "two", base, "qkv,mlp_proj", 5, kind="rslora"),
    }


def opened(folders: dict[str, Path]) -> AdapterSet:
    file = open_checkpoint(folders["base"])
    return AdapterSet(file, [folders["one"], folders["two"]], [None, "second"])


@contextmanager
def serving(own_server: Any, folders: dict[str, Path], **options: Any) -> Iterator[Any]:
    file = open_checkpoint(folders["base"])
    model = load_model(file, lora=opened(folders).lora, dtype="fp32", threads=1)
    with own_server(model=model, adapters=lambda: opened(folders), **options) as server:
        yield server


def expected(folders: dict[str, Path], use: Callable[[Any], Any]) -> dict[str, Any]:
    """The result of a function of the model, with each adapter alone."""
    files = opened(folders)
    with load_model(
        open_checkpoint(folders["base"]), lora=files.lora, dtype="fp32", threads=1
    ) as model:
        found = {}
        for name in NAMES:
            files.use(model, None if name == "tiny" else name)
            found[name] = use(model)
        return found


def text_of(server: Any, name: str, **body: Any) -> str:
    reply = call(server.url, COMPLETIONS, {"model": name, "seed": 1, **body})
    assert reply.status == 200, reply
    assert reply.json["model"] == name
    return str(reply.json["choices"][0]["text"])


PROMPT = "A prompt that all of them share, of several blocks."


def test_texts_of_several_adapters_at_once_are_those_of_runs_alone(
    own_server: Any, folders: dict[str, Path]
) -> None:
    tokenizer = make_tokenizer("bytes")
    options = {"max_tokens": 20, "stop": (), "temperature": 1.0, "seed": 1}
    want = expected(folders, lambda model: generate(model, tokenizer, PROMPT, **options)[0])
    assert len(set(want.values())) == 3
    with serving(own_server, folders) as server:
        for _ in range(2):  # the second time with caches of each
            found: dict[str, set[str]] = {name: set() for name in NAMES}

            def ask(name: str, found: dict[str, set[str]] = found) -> None:
                found[name].add(text_of(server, name, prompt=PROMPT, max_tokens=20))

            threads = [threading.Thread(target=ask, args=(name,)) for name in NAMES * 4]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert found == {name: {text} for name, text in want.items()}
        assert server.service.scheduler.counts.prompt_tokens_reused > 0


def test_every_path_knows_them(own_server: Any, folders: dict[str, Path]) -> None:
    tokenizer = make_tokenizer("bytes")
    want = expected(folders, lambda model: embed(model, tokenizer, "Hello"))
    with serving(own_server, folders) as server:
        models = call(server.url, "/v1/models").json["data"]
        assert [(m["id"], m["parent"]) for m in models] == [
            ("tiny", None), ("one", "tiny"), ("second", "tiny"),
        ]  # fmt: skip
        assert call(server.url, "/v1/models/second").json == models[2]
        for name in NAMES:
            body = {"model": name, "input": "Hello"}
            (found,) = call(server.url, "/v1/embeddings", body).json["data"]
            np.testing.assert_allclose(found["embedding"], want[name], atol=1e-5)
        hello = [{"role": "user", "content": "Hello"}]
        whole = call(server.url, "/v1/chat/completions",
                     {"model": "one", "messages": hello, "max_tokens": 4, "seed": 1})  # fmt: skip
        same = text_of(server, "one", prompt="user: Hello\nassistant:", max_tokens=4)
        assert whole.json["model"] == "one"
        assert whole.json["choices"][0]["message"]["content"] == same
        asked = {"model": "one", "input": "Hello", "max_output_tokens": 4, "seed": 1}
        response = call(server.url, "/v1/responses", asked)
        assert response.json["model"] == "one"
        assert response.json["output"][0]["content"][0]["text"] == same
        for path, rest in ((COMPLETIONS, {"prompt": "a"}), ("/v1/embeddings", {"input": "a"})):
            reply = call(server.url, path, {"model": "two", **rest})
            assert reply.status == 404
            assert "this server has tiny, one, second" in reply.message


def reloaded(server: Any, caplog: pytest.LogCaptureFixture, says: str) -> None:
    caplog.clear()
    server._loop.call_soon_threadsafe(server.reload)
    end = time.monotonic() + 30
    while says not in caplog.text and time.monotonic() < end:
        time.sleep(0.01)
    assert says in caplog.text


def test_adapters_are_read_again(
    own_server: Any, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A text that has begun keeps its adapter; a request that comes later has the new one."""
    body = {"prompt": PROMPT, "max_tokens": 150}
    caplog.set_level("INFO")
    with serving(own_server, folders) as server:
        before = {name: text_of(server, name, **body) for name in NAMES}
        batch, held, begun = server.service.scheduler._batch, threading.Lock(), threading.Event()
        step = batch.step

        def gated() -> Iterator[Any]:
            with held:
                yield from step()
            begun.set()

        batch.step = gated
        streamed: list[str] = []

        def stream() -> None:
            reply = call(server.url, COMPLETIONS,
                         {"model": "one", "seed": 1, "stream": True, **body})  # fmt: skip
            streamed.append("".join(e["choices"][0]["text"] for e in events(reply)))

        asking = threading.Thread(target=stream)
        asking.start()
        assert begun.wait(30)
        with held:  # no step is made while the folder changes
            shutil.rmtree(folders["one"])
            other = make_adapter(folders["one"].parent / "other", folders["base"], "all", 3)
            shutil.move(other, folders["one"])
            server._loop.call_soon_threadsafe(server.reload)
        reloaded(server, caplog, "the adapters are read again: one, second")
        after = {name: text_of(server, name, **body) for name in NAMES}
        asking.join(60)
        assert streamed == [before["one"]]
        assert {name: after[name] == before[name] for name in NAMES} == {
            "tiny": True, "one": False, "second": True,
        }  # fmt: skip
        damaged = folders["two"] / "adapter_model.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")  # found after the first one is read
        assert text_of(server, "tiny", **body) == after["tiny"]
        reloaded(server, caplog, "the adapters stay as they were")
        assert {name: text_of(server, name, **body) for name in NAMES} == after
        shutil.rmtree(folders["one"])
        make_adapter(folders["one"], folders["base"], "all", 9)
        reloaded(server, caplog, "start the server again")
        assert text_of(server, "one", **body) == after["one"]


def test_names_and_paths(own_server: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    given = [str(folders["one"]), f"x={folders['two']}", str(odd)]
    assert parse_adapters(given) == ([folders["one"], folders["two"], odd], ["one", "x", "a=b"])
    run, latest = tmp_path / "poems", tmp_path / "latest"
    shutil.copytree(folders["one"], run / "ckpt-000004")
    (run / "best").symlink_to("ckpt-000004")
    latest.symlink_to("poems")
    for path, name in ((run / "best", "poems"), (run / "ckpt-000004", "poems"), (run, "poems"),
                       (latest, "latest"), (latest / "best", "latest")):  # fmt: skip
        assert parse_adapters([str(path)])[1] == [name]
    file = open_checkpoint(folders["base"])
    assert AdapterSet(file, [run / "best"]).names == ("poems",)
    same = lambda: AdapterSet(file, [folders["one"]], ["tiny"])  # noqa: E731
    model = load_model(file, lora=same().lora, dtype="fp32", threads=1)
    with pytest.raises(UsageError, match="both named tiny"), own_server(model=model, adapters=same):
        pass


def test_names_stay_as_they_were_at_the_start(folders: dict[str, Path]) -> None:
    """Else a request would have the text of the model alone, or of an adapter of its name."""
    file, names = open_checkpoint(folders["base"]), ["one"]
    read = lambda: AdapterSet(file, [folders["one"]], names)  # noqa: E731
    with load_model(file, lora=read().lora, dtype="fp32", threads=1) as model:
        adapters = Adapters(model, read)
        assert adapters.find("one") is not adapters.none
        with pytest.raises(NotFound, match="'tiny' is not here"):
            adapters.find("tiny")
        names[0] = "tiny"
        with pytest.raises(GptcError, match="are tiny, and were one at the start"):
            adapters.reload(None)  # type: ignore[arg-type]
        assert adapters.names == ("one",)
