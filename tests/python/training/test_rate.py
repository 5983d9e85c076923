"""Advice that trains a run on never raises its learning rate without a word.

The class: a printed command whose effect is not what its reader expects. A longer schedule is
stretched, so its rate in the middle is several times the last one.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runs import metrics

Gptc = Callable[..., Any]
SCHEDULES = [
    ("cosine", ()),
    ("linear", ("--min-lr", "0.002")),
    ("wsd", ("--min-lr", "0")),
    ("constant", ()),
    ("cosine", ("--warmup-steps", "100", "--min-lr", "0.004")),
]


def command_in(text: str) -> list[str]:
    """The last gptc command of a message, without its first word."""
    return shlex.split(text[text.rindex("gptc train") :].splitlines()[0])[1:]


@pytest.mark.parametrize(("schedule", "more"), SCHEDULES)
def test_training_on_as_advised_keeps_the_rate(
    gptc: Gptc, arguments: list[str], tmp_path: Path, schedule: str, more: tuple[str, ...]
) -> None:
    run = tmp_path / "run's folder"
    arguments[arguments.index("--out") + 1] = str(run)
    assert gptc("train", *arguments, "--lr", "0.01", "--schedule", schedule, *more).code == 0
    last = metrics(run)[-1]["lr"]
    for steps in (16, 32):  # twice: the advice must hold for the longer run too
        ended = gptc("train", "--resume", run).err
        assert "continue, at a constant learning rate, with" in ended
        command = command_in(ended)
        ran = gptc(*command)
        assert (ran.code, "note: the learning rate rises" in ran.err) == (0, False), ran.err
        expected = last or 0.001  # a rate of 0 would change nothing: the usual last rate
        rates = [line["lr"] for line in metrics(run)[8:]]
        assert len(rates) == steps - 8
        assert rates == pytest.approx([expected] * (steps - 8), rel=1e-5)


def test_a_rate_that_rises_is_noted(gptc: Gptc, arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    begun = gptc("train", *arguments, "--lr", "0.01", "--warmup-steps", 2).err
    assert "  rate    2 warm-up steps to 0.01, cosine to 0.001 at the end\n" in begun
    assert "note:" not in begun
    ran = gptc("train", "--resume", run, "--steps", 16)
    first = metrics(run)[8]["lr"]
    assert first > 5 * metrics(run)[7]["lr"]
    assert f"  rate    {first:.3g} at step 9, cosine to 0.001 at the end\n" in ran.err
    assert (
        f"note: the learning rate rises from 0.001 to {first:.3g}, since its schedule or --lr has "
        "changed; to avoid that, add: --schedule constant --lr 0.001 --warmup-steps 0\n"
    ) in ran.err


def test_resuming_an_interrupted_run_has_no_note(
    gptc: Gptc, arguments: list[str], tmp_path: Path
) -> None:
    """Its schedule has not changed, and may be within the warm-up."""
    arguments += ["--warmup-steps", "6", "--save-every", "1", "--keep-last", "0"]
    assert gptc("train", *arguments).code == 0
    run = tmp_path / "run"
    for step in (2, 7):
        for newer in range(step + 1, 9):
            folder = run / f"ckpt-{newer:06d}"
            if folder.exists():
                folder.rename(tmp_path / f"{step}-{newer}")
        ran = gptc("train", "--resume", run)
        assert ran.code == 0
        assert "rises" not in ran.err
