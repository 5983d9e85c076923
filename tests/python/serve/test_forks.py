"""A model that serves is closed, and its process is forked, while requests run: no hang."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.errors import GptcError
from gptc.generation.request import Request, make_request
from gptc.serve.jobs import Event
from gptc.serve.scheduler import Closed, Scheduler
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config, varied

TESTS = Path(__file__).resolve().parents[1]
IN_CHILD = """
import os, signal, sys, threading, time
from gptc.errors import GptcError
from gptc.generation.request import make_request
from gptc.serve.scheduler import Scheduler
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config, varied

model, tokenizer, begun = varied(make_config(block_size=128)), make_tokenizer("bytes"), []
request = make_request(model, tokenizer, "a", max_tokens=10**6, context_shift=True, stop=())
scheduler = Scheduler(model, tokenizer, 4)
jobs = [scheduler.submit(request, begun.append) for _ in range(4)]
while not begun:
    time.sleep(0.001)
uses = {
    "submit": lambda: scheduler.submit(request, print),
    "between_steps": lambda: scheduler.between_steps(lambda: None),
}
def fork(hold):
    hold.acquire()
    child = os.fork()
    if child:
        hold.release()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(60)
    scheduler.cancel(jobs[0])
    for name, use in uses.items():
        try:
            use()
        except GptcError as error:
            assert "was forked" in str(error), error
        else:
            sys.exit(name)
    assert not scheduler.ready
    scheduler.hurry()
    assert not scheduler.close(10)
    sys.exit(0)  # as a program ends: with destructors
class Held:  # another thread has the scheduler's lock
    def acquire(self):
        self.has, self.done = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.hold)
        self.thread.start()
        self.has.wait()
    def hold(self):
        with scheduler._changed:
            self.has.set()
            self.done.wait()
    def release(self):
        self.done.set()
codes = [fork(threading.Lock()) for _ in range(2)] + [fork(Held())]
assert scheduler.ready and len(begun) > 0
print(codes, scheduler.close(0))
"""


def test_a_forked_child_of_a_server_has_errors_and_ends() -> None:
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", IN_CHILD],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("[0, 0, 0] False\n", "")


class Heard:
    """A listener that waits for the end of a sample."""

    def __init__(self) -> None:
        self.begun, self.ended, self.last = threading.Event(), threading.Event(), list[Event]()

    def __call__(self, event: Event) -> None:
        self.last = [event]
        self.begun.set()
        if event.finish:
            self.ended.set()


@pytest.fixture
def serving() -> Iterator[tuple[Model, Scheduler, Request]]:
    model, tokenizer = varied(make_config(block_size=128)), make_tokenizer("bytes")
    request = make_request(model, tokenizer, "a", max_tokens=10**6, context_shift=True, stop=())
    scheduler = Scheduler(model, tokenizer, 2)
    yield model, scheduler, request
    scheduler.close()
    model.close()


def test_a_model_that_is_closed_ends_the_requests_that_run(
    serving: tuple[Model, Scheduler, Request],
) -> None:
    model, scheduler, request = serving
    heard = [Heard() for _ in range(3)]  # one of them waits
    for listener in heard:
        scheduler.submit(request, listener)
    assert heard[0].begun.wait(60)
    model.close()
    for listener in heard:
        assert listener.ended.wait(60)
        (event,) = listener.last
        assert event.finish == "error"
        assert "this model is closed" in str(event.error)
    with pytest.raises(Closed):
        scheduler.submit(request, Heard())
    assert scheduler.close(10)


def test_a_model_is_closed_below_a_server(own_server: Any) -> None:
    """Later requests have an error of the server."""
    from plain_http import call

    body = {"prompt": "a", "max_tokens": 4}
    with own_server() as server:
        assert call(server.url, "/v1/completions", body).status == 200
        server.service.scheduler.model.close()
        for path, more in (
            ("/v1/completions", body),
            ("/v1/completions", {**body, "stream": True}),
            ("/v1/embeddings", {"input": "a"}),
        ):
            reply = call(server.url, path, more)
            assert "model is closed" in str(reply) or reply.status == 503, (path, reply)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_scheduler_refuses_copies(
    serving: tuple[Model, Scheduler, Request], way: Callable[[object], object]
) -> None:
    with pytest.raises(GptcError, match="a Scheduler cannot be copied or pickled"):
        way(serving[1])
