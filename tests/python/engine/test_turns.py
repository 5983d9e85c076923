"""Threads, forks, signal handlers, copies and the interpreter's end.

The class: a use of a model at a time, or from a place, where its memory is not there or not whole.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model, Session
from gptc.errors import GptcError
from gptc.formats.binary import Binary
from small_models import make_config

TOOLS = Path(__file__).resolve().parents[3] / "tools" / "attack"
T = 24


def make(**options: Any) -> Model:
    return Model.create(
        make_config("llama"), **{"threads": 2, "max_batch": 2, "max_seq": T, **options}
    )


@pytest.fixture
def model() -> Model:
    return make()


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, T), dtype=np.int32)


def run_python(code: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    head = """
        import os, sys, threading, time
        import numpy as np
        from gptc import GPTConfig, Model
        config = GPTConfig.preset("tiny", vocab_size=256, block_size=64, n_layer=4)
        model = Model.create(config, threads=2, max_batch=4, max_seq=64)
        tokens = np.zeros((4, 64), np.int32)
    """
    # Python 3.12 and newer warn of a fork while threads exist, which some of these tests are about.
    python = [sys.executable, "-W", "ignore::DeprecationWarning"]
    return subprocess.run(
        [*python, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )


# ---- threads ----


def test_threads_get_what_each_call_gives_alone() -> None:
    done = subprocess.run(
        [sys.executable, TOOLS / "threads.py", "--calls", "300"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout == "300 calls by 8 threads: 0 failures\n", done.stderr
    assert done.returncode == 0


def test_a_training_step_is_one_turn(model: Model, tokens: np.ndarray) -> None:
    wanted = model.train_step([tokens, tokens], [tokens, tokens], lr=0.0, weight_decay=0.0)
    seen: list[object] = []
    other = threading.Thread(
        target=lambda: seen.append(model.backward(tokens[:1], tokens[:1])), daemon=True
    )

    def between() -> None:
        if not other.ident:
            other.start()
        time.sleep(0.1)
        assert not seen

    got = model.train_step(
        [tokens, tokens], [tokens, tokens], lr=0.0, weight_decay=0.0, check=between
    )
    other.join()
    assert got == wanted
    assert len(seen) == 1


def test_close_waits_for_the_call_of_another_thread(tokens: np.ndarray) -> None:
    model = make(max_batch=8)
    batch = np.tile(tokens, (4, 1))
    ends: list[str] = []

    def work() -> None:
        try:
            while True:
                model.loss(batch, batch)
        except GptcError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    model.close()
    for thread in threads:
        thread.join()
    assert ends == ["this model is closed; create or load a new one"] * 3


def test_sessions_are_freed_by_garbage_collection_during_calls(
    model: Model, tokens: np.ndarray
) -> None:
    """The collector runs in any thread, while another one computes."""
    stop = threading.Event()

    def litter() -> None:
        while not stop.is_set():
            session = model.session(1, T)
            session.decode(tokens[0])
            session.self = session  # type: ignore[attr-defined]  # a cycle
            del session
            gc.collect()

    thread = threading.Thread(target=litter)
    thread.start()
    wanted = model.loss(tokens, tokens)
    try:
        assert {model.loss(tokens, tokens) for _ in range(50)} == {wanted}
    finally:
        stop.set()
        thread.join()


# ---- signal handlers ----


@pytest.mark.parametrize("use", ["close", "step", "loss"])
def test_a_signal_handler_cannot_use_the_model_that_it_interrupts(use: str) -> None:
    config = make_config("byte", n_layer=24, n_embd=256, block_size=256)
    model = Model.create(config, threads=1, max_batch=8)
    batch = np.zeros((8, 256), np.int32)
    uses: dict[str, Callable[[], object]] = {
        "close": model.close,
        "step": lambda: model.step,
        "loss": lambda: model.loss(batch[:1], batch[:1]),
    }
    before = signal.signal(signal.SIGUSR1, lambda number, frame: uses[use]())
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(GptcError, match="in the middle of a call"):
            model.train_step(batch, batch, lr=0.0)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert np.isfinite(model.loss(batch[:1, :8], batch[:1, :8]))
    model.close()


# ---- copies ----


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_owners_of_memory_and_files_refuse_copies(
    model: Model, tmp_path: Path, way: Callable[[object], object]
) -> None:
    (tmp_path / "f").write_bytes(b"12345678")
    for owner in (model, model.session(1, 4), Binary(tmp_path / "f")):
        name = type(owner).__name__
        with pytest.raises(GptcError, match=f"a {name} cannot be copied or pickled"):
            way(owner)
        with pytest.raises(GptcError, match=f"a {name} cannot be copied or pickled"):
            way([owner] if way is not copy.copy else owner)


# ---- forks ----

IN_CHILD = """
    wanted = model.loss(tokens, tokens)
    session = model.session(1, 64)
    time.sleep(0.1)  # the pool's threads sleep
    {before}
    child = os.fork()
    if child == 0:
        {child}
        sys.exit(0)  # as a program ends: with destructors, and without os._exit
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), model.loss(tokens, tokens) == wanted)
"""


def test_a_forked_child_computes_and_ends() -> None:
    child = "assert model.loss(tokens, tokens) == wanted; session.decode([1, 2]); model.close()"
    done = run_python(IN_CHILD.format(before="", child=child))
    assert (done.stdout, done.stderr) == ("0 True\n", "")


def test_a_forked_child_that_leaves_the_model_alone_ends() -> None:
    done = run_python(IN_CHILD.format(before="", child="pass"))
    assert (done.stdout, done.stderr) == ("0 True\n", "")


def test_a_fork_during_a_call_of_another_thread_is_an_error_in_the_child() -> None:
    before = """
    def work():
        while True:
            model.loss(tokens, tokens)
    threading.Thread(target=work, daemon=True).start()
    model._turns.lock.acquire(); model._turns.lock.release()
    while model._turns.lock.acquire(blocking=False):
        model._turns.lock.release()
    """
    child = "\n        ".join(
        [
            "for use in (lambda: model.loss(tokens, tokens), lambda: session.decode([1])):",
            "    try:",
            "        use()",
            "    except Exception as error:",
            "        assert 'was forked while another thread used this model' in str(error), error",
            "    else:",
            "        sys.exit('no error')",
            "model.close()",
        ]
    )
    done = run_python(IN_CHILD.format(before=before.strip(), child=child))
    assert (done.stdout, done.stderr) == ("0 True\n", "")


# ---- the interpreter's end ----


@pytest.mark.parametrize(
    "work", ["model.loss(tokens, tokens)", "session.decode([1]); session.rewind()"]
)
def test_daemon_threads_do_not_crash_the_end(work: str) -> None:
    code = f"""
    sessions = [model.session(1, 64) for _ in range(4)]
    def work(session):
        while True:
            {work}
    for session in sessions:
        threading.Thread(target=work, args=(session,), daemon=True).start()
    time.sleep(0.1)
    """
    for _ in range(3):
        done = run_python(code)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_long_call_of_a_daemon_thread_is_ended_with_the_interpreter() -> None:
    code = """
    config = GPTConfig.preset("byte", block_size=256, n_layer=60, n_embd=256, n_head=2)
    big = Model.create(config, threads=1, max_batch=8)
    batch = np.zeros((8, 256), np.int32)
    work = lambda: big.train_step(batch, batch, lr=0)
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.5)
    print(time.monotonic(), flush=True)
    """
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - float(done.stdout) < 5


def test_the_main_thread_may_use_a_model_at_the_end() -> None:
    code = """
    import atexit
    import gptc.engine.turns
    atexit.register(lambda: print("late", model.loss(tokens, tokens) > 0))
    """
    done = run_python(code.replace("import gptc.engine.turns", "", 1))
    assert (done.stdout, done.stderr) == ("late True\n", "")


# ---- wrong types ----


def test_errors_of_types_name_the_parameter(model: Model, tokens: np.ndarray) -> None:
    session = model.session(2, 8)

    def set_step(value: Any) -> None:
        model.step = value

    wrong: list[tuple[str, Callable[[], object]]] = [
        ("seed", lambda: model.init("one")),  # type: ignore[arg-type]
        ("seed", lambda: make(seed="one")),
        ("step", lambda: set_step(1.5)),
        ("n_seq", lambda: model.session("one")),  # type: ignore[arg-type]
        ("n_ctx", lambda: model.session(1, "one")),  # type: ignore[arg-type]
        ("length", lambda: session.rewind(0, 1.5)),  # type: ignore[arg-type]
        ("seq", lambda: session.rewind("a")),  # type: ignore[arg-type]
        ("seq", lambda: session.length(None)),  # type: ignore[arg-type]
        ("seq", lambda: session.fork("a", 1)),  # type: ignore[arg-type]
        ("to", lambda: session.fork(0, "a", 0)),  # type: ignore[arg-type]
        ("seq", lambda: session.decode([1], "a")),
        ("tokens", lambda: session.decode("abc")),
        ("tokens", lambda: model.logits([[1, 2], [3]])),
        ("tokens", lambda: model.logits(None)),  # type: ignore[arg-type]
        ("inputs", lambda: model.loss([[1.5]], [[1]])),
        ("inputs", lambda: model.train_step([[1], [2, 3]], tokens, lr=0)),
        ("targets", lambda: model.train_step(tokens, None, lr=0)),  # type: ignore[arg-type]
        ("lr", lambda: model.train_step(tokens, tokens, lr="high")),  # type: ignore[arg-type]
        ("scale", lambda: model.backward(tokens, tokens, "a")),  # type: ignore[arg-type]
        ("wte.weight", lambda: model.set("wte.weight", None)),  # type: ignore[arg-type]
        ("name", lambda: model.get(["wte"])),  # type: ignore[arg-type]
        ("device", lambda: make(device=5)),
        ("dtype", lambda: make(dtype=None)),
        ("threads", lambda: make(threads="2")),
        ("max_batch", lambda: make(max_batch=1.5)),
        ("max_seq", lambda: make(max_seq="a")),
        ("dropout", lambda: make(dropout="a")),
        ("config", lambda: Model.create({"n_layer": 1})),  # type: ignore[arg-type]
    ]
    for name, use in wrong:
        with pytest.raises(GptcError) as error:
            use()
        assert name in str(error.value).split() or f"{name}:" in str(error.value), (name, error)
    assert isinstance(session, Session)
    assert np.isfinite(model.loss(tokens, tokens))
