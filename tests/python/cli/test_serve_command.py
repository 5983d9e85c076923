"""`gptc serve` starts only where it is safe to, answers, and ends when it is told to."""

from __future__ import annotations

import builtins
import gc
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc.tokenizer.marks import Marks
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_adapter

Gptc = Callable[..., Any]


@pytest.fixture(autouse=True)
def _packages() -> None:
    for name in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(name, reason="pip install '.[serve]'")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "lets other machines use the model: give --api-key-file FILE"),
        (["--api-key-file", "missing"], "cannot read the keys in missing"),
        (["--api-key-file", "empty"], "empty has no key"),
        (["--api-key-file", "short"], "a key of less than 16 characters"),
        (["--tls-cert", "short"], "--tls-cert and --tls-key go together"),
        (["--tls-cert", "short", "--tls-key", "missing"], "--tls-key missing does not exist"),
        (["--tls-cert", "short", "--tls-key", "short"], "not a certificate and its key"),
        (["--port", "70000"], "--port is 70000; it must be"),
        (["--timeout", "0"], "--timeout is 0.0; it must be above 0"),
        (["--context", "1000"], "--context is 1,000; the model's context is 48"),
        (["--config", "bad.toml"], "unknown option 'prot'; did you mean port?"),
        (["--chat-template", "nothing"], "the chat template nothing does not exist"),
        (["--adapter", "x=saved"], "saved is a model, not an adapter"),
        (["--adapter", "nothing"], "the adapter nothing does not exist: check the path; gptc fine"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    gptc: Gptc, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("# none\n")
    Path("short").write_text("abc\n")
    Path("bad.toml").write_text("prot = 1\n")
    ran = gptc("serve", "-m", saved, "--port", 0, *arguments)
    assert ran.code == 2, ran
    assert says in ran.err
    assert len(ran.err.strip().splitlines()) <= 3


@pytest.mark.parametrize("draft", ["ngram", None])
def test_a_draft_may_be_a_model(gptc: Gptc, saved: Path, draft: str | None) -> None:
    ran = gptc("serve", "-m", saved, "--check", "--draft", draft or saved)
    assert (ran.code, ran.err.splitlines()[-1]) == (0, "ok"), ran


def test_check_loads_and_answers(gptc: Gptc, saved: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('parallel = 3\ncontext = 40\ncors = ["https://ours.org"]\n')
    ran = gptc("serve", "-m", saved, "--check", "--config", config, "--parallel", 2, "--no-auth",
               "--host", "0.0.0.0")  # fmt: skip
    assert (ran.code, ran.out) == (0, "")
    assert re.search(rf"{saved.name}: 2 sequences of 40 tokens, [\d.]+ [kM]B at most\nok", ran.err)


def test_garbage_is_not_sought_among_what_the_server_keeps(
    gptc: Gptc, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptc.serve.server import Server

    frozen = []

    def run(server: Server) -> bool:
        server.service.scheduler.close()
        frozen.append(any(server is one for one in gc.get_objects()))
        return True

    monkeypatch.setattr(Server, "run", run)
    assert gptc("serve", "-m", saved, "--port", 0).code == 0
    assert frozen == [False]
    assert gc.get_freeze_count() == 0


def test_without_the_packages_it_says_what_to_install(
    gptc: Gptc, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "uvicorn":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    ran = gptc("serve", "-m", saved, "--check")
    assert ran.code == 1
    assert "gptc serve needs the package uvicorn: " in ran.err
    assert ran.err.endswith("install starlette uvicorn prometheus-client\n")


def start(*arguments: object) -> tuple[subprocess.Popen[str], str]:
    """A server in a process, and its address."""
    command = [sys.executable, "-m", "gptc", "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stderr
    for line in process.stderr:
        if found := re.match(r"listening on (\S+)", line):
            return process, found[1]
    raise AssertionError(process.wait())


def ended(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_a_taken_port_is_named(saved: Path, number: int, gptc: Gptc) -> None:
    process, url = start("-m", saved)
    with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
        assert answer.status == 200
    ran = gptc("serve", "-m", saved, "--port", url.rpartition(":")[2])
    process.send_signal(number)
    errors = ended(process)
    assert "stopping: running choices: 0" in errors
    assert "Traceback" not in errors
    assert (ran.code, "choose another" in ran.err) == (1, True), ran


def test_adapters_are_listed_and_read_again_at_sighup(saved: Path, tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", saved, "all", 2)
    config = tmp_path / "serve.toml"
    config.write_text(f'adapter = ["poems={one}", "{one}"]\n')
    process, url = start("-m", saved, "--config", config)
    assert process.stderr
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        names = [model["id"] for model in json.load(answer)["data"]]
    assert names == ["saved", "poems", "one"]
    process.send_signal(signal.SIGHUP)
    for line in process.stderr:
        if "the adapters are read again: poems, one" in line:
            break
    process.terminate()
    ended(process)


def test_an_adapter_that_was_taught_to_talk_answers_messages(saved: Path, tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", saved, "all", 2)
    talker = make_adapter(tmp_path / "talker", saved, "all", 2)
    tokenizer = make_tokenizer("bytes")
    tokenizer.marks = Marks(chat_template="{{ messages[0].content }}")
    tokenizer.save(talker)
    process, url = start("-m", saved, "--adapter", one, "--adapter", talker)
    body = {"model": "talker", "messages": [{"role": "user", "content": "On"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["usage"]["prompt_tokens"] == 2
    process.terminate()
    ended(process)


def test_https(saved: Path, tmp_path: Path) -> None:
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key.pem",
         "-out", tmp_path / "cert.pem", "-days", "2"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl program to make a certificate: apt install openssl")
    process, url = start(
        "-m", saved, "--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem"
    )
    assert url.startswith("https://")
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    with urllib.request.urlopen(f"{url}/health", timeout=30, context=context) as answer:
        assert answer.status == 200
    process.terminate()
    ended(process)
