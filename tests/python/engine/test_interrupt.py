"""Ctrl-C ends a long computation within a second, and leaves model and session usable.

The class: a call into C that Python's signal handlers cannot interrupt.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from gptc import GPTConfig, Model
from gptc.engine import library

T = 256


@pytest.fixture(scope="module")
def model() -> Model:
    """Many short layers: a step takes seconds, a layer a tenth of one."""
    config = GPTConfig.preset(
        "byte",
        vocab_size=500,
        block_size=T,
        n_layer=40,
        n_head=4,
        n_kv_head=4,
        n_embd=256,
        n_ff=1024,
    )
    return Model.create(config, max_batch=8, max_seq=T, threads=1)


@pytest.fixture
def tokens(model: Model) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 500, (8, T), dtype=np.int32)


def interrupt_after(seconds: float, call: Callable[[], object]) -> float:
    """Sends SIGINT during `call`; returns after how much CPU time it ended."""
    sent = []

    def send() -> None:
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, send)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
        return time.process_time() - sent[0]
    finally:
        timer.join()


def test_a_training_step_is_interrupted(model: Model, tokens: np.ndarray) -> None:
    small = tokens[:1, :16]
    before = model.loss(small, small)
    late = interrupt_after(0.5, lambda: model.train_step(tokens, tokens, lr=1e-3))
    assert late < 1
    assert model.step == 0
    assert model.loss(small, small) == before
    assert np.isfinite(model.train_step(small, small, lr=1e-3).loss)


def test_a_check_ends_a_step(model: Model, tokens: np.ndarray) -> None:
    """Between two layers of its first pass; outside of `ended_by` nothing is asked."""

    class Ended(Exception):
        pass

    asked = []

    def check() -> None:
        asked.append(time.monotonic())
        raise Ended

    small = tokens[:1, :16]
    before, step = model.loss(small, small), model.step
    with library.ended_by(check), pytest.raises(Ended):
        model.train_step(tokens, tokens, lr=1e-3)
    assert (len(asked), model.step, model.loss(small, small)) == (1, step, before)
    assert np.isfinite(model.loss(small, small))
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["loss", "logits"])
def test_other_calls_are_interrupted(model: Model, tokens: np.ndarray, name: str) -> None:
    arguments = (tokens, tokens) if name == "loss" else (tokens,)
    assert interrupt_after(0.3, lambda: getattr(model, name)(*arguments)) < 2


def test_a_long_prompt_is_interrupted(model: Model, tokens: np.ndarray) -> None:
    session = model.session(8)
    seqs = np.repeat(np.arange(8), T - 1)
    prompt = tokens[:, 1:].ravel()
    session.decode(tokens[:, 0], np.arange(8))
    assert interrupt_after(0.3, lambda: session.decode(prompt, seqs)) < 2
    assert [session.length(i) for i in range(8)] == [1] * 8
    assert np.isfinite(session.decode(tokens[:, 1], np.arange(8))).all()


def test_a_handler_that_does_not_raise_interrupts_nothing(model: Model, tokens: np.ndarray) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        assert np.isfinite(model.loss(tokens[:3], tokens[:3]))
        assert seen == [signal.SIGINT]
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
