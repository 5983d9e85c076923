"""A server with a small model, for each test or for all of a file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gptc.serve.options import ServeOptions
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config, varied

TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@contextmanager
def running(
    template: str | None = TEMPLATE, model: Any = None, adapters: Any = None, **options: Any
) -> Iterator[Any]:
    """A server in a thread; its `url` is the address. `model` is closed at its end."""
    pytest.importorskip("starlette", reason="pip install '.[serve]'")
    pytest.importorskip("uvicorn", reason="pip install '.[serve]'")
    pytest.importorskip("prometheus_client", reason="pip install '.[serve]'")
    from gptc.serve.server import Server, make_service

    given = {"port": 0, "parallel": 8, "prefill_chunk": 16, "drain_seconds": 5, **options}
    with model or varied(make_config(block_size=2048)) as model:
        service = make_service(
            model, make_tokenizer("bytes"), ServeOptions(**given), name="tiny",
            chat_template=template, adapters=adapters,
        )  # fmt: skip
        begun = threading.Event()
        server = Server(service, lambda url: begun.set())
        thread = threading.Thread(target=server.run)
        thread.start()
        assert begun.wait(30)
        try:
            yield server
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server for the tests of a file."""
    with running() as found:
        yield found


@pytest.fixture
def own_server() -> Callable[..., Any]:
    """own_server(**options) is a context with a server of these options."""
    return running
