"""Checkpoints that a thread writes while training continues."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.names import WEIGHTS, list_checkpoints, step_of
from gptc.engine.snapshot import Snapshot, snapshot_bytes
from gptc.errors import GptcError
from gptc.files.behind import Behind
from gptc.training import folder as run_folder
from gptc.training.run import train
from runs import content, metrics, reproducible
from small_models import batch

Options = dict[str, Any]
_LONG_S = 60.0  # a wait that only a fault lets pass


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves begin when it is set."""
    opened, real = threading.Event(), run_folder.save

    def save(*args: Any, **options: Any) -> None:
        assert opened.wait(_LONG_S)
        real(*args, **options)

    monkeypatch.setattr(run_folder, "save", save)
    return opened


def _opened_at(gate: threading.Event, last: int) -> Callable[[int, Model], None]:
    return lambda step, model: gate.set() if step == last else None


def test_training_continues_while_a_checkpoint_is_written(
    options: Options, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is of its step, although it is written after later ones were done."""
    found: dict[int, list[int]] = {}
    threads: list[threading.Thread] = []

    def on_step(step: int, model: Model) -> None:
        found[step] = [step_of(path) for path in list_checkpoints(Path(options["out"]))]
        if step == 4:  # before the second save, which waits for the first
            threads.extend(_writers())
            gate.set()

    given = {**options, "eval_every": 100, "save_every": 2, "keep_last": 0, "ema": 0.5}
    train(given, on_step=on_step)
    assert found[4] == []
    assert len(threads) == 1
    threads.clear()
    monkeypatch.undo()
    other = {**given, "out": options["out"] + "-2"}
    monkeypatch.setattr("gptc.engine.snapshot.available_bytes", lambda: 0)  # no memory for a copy
    train(other, on_step=lambda step, model: threads.extend(_writers()))
    assert not threads
    for step in (2, 4, 6, 8):
        one, two = (Path(g["out"]) / f"ckpt-{step:06}" for g in (given, other))
        assert content(one) == content(two)
    one, two = (reproducible(metrics(g["out"])) for g in (given, other))
    assert one == two


def _writers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "gptc-checkpoint"]


def test_a_checkpoint_that_fails_ends_the_run_soon(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_folder.save

    def save(path: Path, *args: Any, **named: Any) -> None:
        if path.name == "ckpt-000004":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args, **named)

    def on_step(step: int, model: Model) -> None:
        steps.append(step)
        for thread in _writers() if step > 4 else ():
            thread.join(_LONG_S)

    steps: list[int] = []
    monkeypatch.setattr(run_folder, "save", save)
    given = {**options, "eval_every": 100, "save_every": 2, "steps": 100_000}
    with pytest.raises(GptcError, match=r"o space left on device; .*ckpt-000002 is intact"):
        train(given, on_step=on_step)
    assert steps[-1] in (4, 5)  # and not 6, when the next save would have said so
    assert [step_of(path) for path in list_checkpoints(Path(options["out"]))] == [2]


def test_an_error_of_the_run_waits_for_the_checkpoint(
    options: Options, gate: threading.Event
) -> None:
    def crash(step: int, model: Model) -> None:
        if step == 3:
            gate.set()
            raise MemoryError

    with pytest.raises(MemoryError):
        train({**options, "eval_every": 100, "save_every": 2}, on_step=crash)
    assert [step_of(path) for path in list_checkpoints(Path(options["out"]))] == [2]
    assert not _writers()


def test_a_damaged_newer_checkpoint_is_not_what_is_kept(options: Options) -> None:
    """A run that resumes from an older one keeps what it saves until it is past the damage."""
    train({**options, "eval_every": 100, "save_every": 4, "keep_last": 0})
    run = Path(options["out"])
    os.truncate(run / "ckpt-000008" / WEIGHTS, 1000)
    found: dict[int, list[int]] = {}

    def on_step(step: int, model: Model) -> None:
        for thread in _writers():
            thread.join(_LONG_S)
        found[step] = [step_of(path) for path in list_checkpoints(run)]

    train({"save_every": 1, "keep_last": 1}, resume=run, on_step=on_step)
    assert found == {5: [4, 8], 6: [5, 8], 7: [6, 8], 8: [7, 8]}
    assert [step_of(path) for path in list_checkpoints(run)] == [8]
    assert open_checkpoint(run).verify()


def test_an_abandoned_checkpoint_changes_nothing(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C twice while a checkpoint is written: the folder is free, and its thread leaves it."""
    opened, real = threading.Event(), run_folder.save
    threads: list[threading.Thread] = []

    def save(*args: Any, **named: Any) -> None:
        threads.append(threading.current_thread())
        _interrupt_the_wait(twice=True)
        assert opened.wait(_LONG_S)
        real(*args, **named)

    run = Path(options["out"])
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train({**options, "eval_every": 100, "save_every": 4})
    assert [thread.is_alive() for thread in threads] == [True]
    train({**options, "eval_every": 100, "save_every": 2, "keep_last": 1})  # it is unlocked
    before = sorted(path.name for path in run.iterdir())
    opened.set()
    threads[0].join(_LONG_S)
    assert sorted(path.name for path in run.iterdir()) == before


def _interrupt_the_wait(twice: bool = False) -> None:
    """Sends SIGINT to the main thread once it waits for a piece."""
    main = threading.main_thread()
    assert main.ident is not None
    for _ in range(1 + twice):
        before = signal.getsignal(signal.SIGINT)
        while not _waits(sys._current_frames()[main.ident]):
            time.sleep(0.001)
        signal.pthread_kill(main.ident, signal.SIGINT)
        while twice and signal.getsignal(signal.SIGINT) is before:  # not heard yet
            if before is signal.default_int_handler:
                return
            time.sleep(0.001)


def _waits(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wait" and code.co_filename.endswith("behind.py"):
            return True
        frame = frame.f_back
    return False


def test_an_interrupted_wait_abandons_the_piece() -> None:
    behind, opened, done = Behind("a test"), threading.Event(), []

    def work() -> None:
        _interrupt_the_wait()
        assert opened.wait(_LONG_S)
        done.append("waited")
        behind.check_wanted()
        done.append("wanted")

    behind.start(work)
    thread = next(one for one in threading.enumerate() if one.name == "a test")
    with pytest.raises(KeyboardInterrupt):
        behind.finish()
    behind.finish()
    behind.check()
    assert thread.is_alive()
    opened.set()
    thread.join(_LONG_S)
    assert done == ["waited"]


def test_a_snapshot_is_a_copy(model: Model) -> None:
    copy = Snapshot(model, averaged=True)
    average = {name: values + 1 for name, values in model.parameters().items()}
    x, y = batch()
    model.train_step(x, y, lr=1e-2)
    copy.take(model, average)
    before = {name: values.copy() for name, values in model.parameters().items()}
    momenta = {name: model.read(name, "moment2") for name in before}
    model.train_step(x, y, lr=1e-2)
    for name, values in before.items():
        np.testing.assert_array_equal(copy.own[name], values)
        np.testing.assert_array_equal(copy.get(name), average[name])
        np.testing.assert_array_equal(copy.read(name, "moment2"), momenta[name])
        assert copy.states(name) == ("moment1", "moment2")
    arrays = [*copy.own.values(), *copy._tensors.values()]
    assert snapshot_bytes(model, averaged=True) == sum(array.nbytes for array in arrays)
    with pytest.raises(GptcError, match=r"out has the shape \(2,\) of float32; .* needs \("):
        model.read(next(iter(before)), "value", np.empty(2, np.float32))


def test_errors_of_pieces_are_raised_once() -> None:
    behind = Behind("a test")

    def fail() -> None:
        raise ValueError("no")

    behind.start(fail)
    with pytest.raises(ValueError, match="no"):
        behind.finish()
    behind.finish()
    behind.check()
    behind.start(fail)
    with pytest.raises(ValueError, match="no"):
        behind.start(lambda: None)
