"""A signal drops the current step and saves the run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.checkpoint.find import find_checkpoint
from gptc.checkpoint.names import list_checkpoints
from gptc.engine import library
from gptc.training.run import train
from runs import content, metrics, reproducible

Options = dict[str, Any]


def test_an_interrupted_step_is_dropped_and_done_again(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of many micro-batches takes minutes: the run does not wait for its end."""
    whole = {**options, "grad_accum": 3, "dropout": 0.2, "out": str(tmp_path / "whole")}
    parts = {**whole, "out": str(tmp_path / "parts")}
    train(whole)
    really, count = Model._backward, 0

    def interrupt_at(last: int) -> Callable[..., None]:
        def backward(model: Model, *args: Any) -> None:
            nonlocal count
            count += 1
            really(model, *args)
            if count == last:
                signal.raise_signal(signal.SIGINT)

        return backward

    monkeypatch.setattr(Model, "_backward", interrupt_at(2))
    summary = train(parts)
    assert (summary.signal, summary.step, summary.checkpoint, count) == (2, 0, None, 2)
    count = 0
    monkeypatch.setattr(Model, "_backward", interrupt_at(3 * 5 + 1))
    assert train(parts).step == 5
    assert count == 3 * 5 + 1
    monkeypatch.undo()
    assert train({}, resume=parts["out"]).finished
    last = "ckpt-000008"
    assert content(tmp_path / "whole" / last) == content(tmp_path / "parts" / last)
    assert reproducible(metrics(parts["out"])) == reproducible(metrics(whole["out"]))


def test_a_pass_is_dropped_too(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only pass of a step may take a minute: the library asks between its layers."""
    really, count = Model._backward, 0

    def backward(model: Model, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGINT)
            library._ask()  # as it does between two layers
        really(model, *args)

    monkeypatch.setattr(Model, "_backward", backward)
    summary = train({**options, "grad_accum": 1})
    assert (summary.signal, summary.step, count) == (signal.SIGINT, 2, 3)
    assert find_checkpoint(options["out"]).name == "ckpt-000002"


def test_sigterm_saves(options: Options) -> None:
    def stop(step: int, model: Model) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    summary = train(options, on_step=stop)
    assert (summary.signal, summary.step, summary.sample) == (signal.SIGTERM, 3, None)
    assert find_checkpoint(options["out"]).name == "ckpt-000003"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_aborts_at_once(options: Options) -> None:
    def stop(step: int, model: Model) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(options, on_step=stop)
    assert list_checkpoints(Path(options["out"])) == []
