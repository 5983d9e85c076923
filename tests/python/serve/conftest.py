"""A server with a small model, in a thread or a process, and the clients of others."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import others
import pytest
from others import Others, Started

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


@pytest.fixture
def attack_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a program of tools/attack, whose folder comes last: it hides no module of a test."""
    folder = Path(__file__).resolve().parents[3] / "tools" / "attack"
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    return importlib.import_module


@pytest.fixture(scope="session")
def started(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """`gptc serve` as users start it, with a model that `gptc train` has made.

    In fp32 on every machine, as the tests compute the numbers that they expect. At its end, no
    error of the server may be in its log.
    """
    folder = tmp_path_factory.mktemp("started")
    run, template, log = folder / "tiny", folder / "chat.jinja", folder / "log"
    gptc = [sys.executable, "-m", "gptc"]
    subprocess.run(
        [*gptc, "train", "--data", dataset_folder, "--out", run, "--preset", "tiny", "--n-layer",
         "2", "--n-head", "2", "--n-embd", "32", "--n-ff", "48", "--batch-size", "2", "--seq-len",
         "2048", "--steps", "12", "--eval-batches", "1", "--threads", "1"],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    template.write_text(TEMPLATE)
    with log.open("w") as out:
        server = subprocess.Popen(
            [*gptc, "serve", "-m", run, "--name", "tiny", "--port", "0", "--parallel", "8",
             "--prefill-chunk", "16", "--threads", "1", "--chat-template", template,
             "--dtype", "fp32"],
            stdout=out, stderr=out,
        )  # fmt: skip
    try:
        yield Started(_address(server, log), run, server.pid)
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    text = log.read_text()
    assert "Traceback" not in text
    assert not re.search(r" 5\d\d \d+ ms$", text, re.MULTILINE), text


def _address(server: subprocess.Popen[Any], log: Path) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r"^listening on (\S+)$", log.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(params=["thread", pytest.param("process", marks=pytest.mark.clients)])
def url(request: pytest.FixtureRequest) -> str:
    """The address of a server: in a thread of the tests, or with -m clients in a process."""
    name = {"thread": "server", "process": "started"}[request.param]
    return str(request.getfixturevalue(name).url)


@pytest.fixture
def other(record_property: Callable[[str, object], None]) -> Others:
    """other.package("litellm") is a client of others; without it the test is skipped."""
    return Others(record_property)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.skipped:
        others.note(report)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("markexpr") == "clients":
        for line in others.summary():
            terminalreporter.write_line(line)
