"""`metrics.jsonl` stays bounded, and times are those of a clock.

The class: reports that grow or err with the length of a run.
"""

from __future__ import annotations

import re
import time
from datetime import datetime, timezone
from typing import Any

import pytest

from gptc import Model
from gptc.training.horizon import Horizon
from gptc.training.options import TrainOptions
from gptc.training.progress import PlainProgress
from gptc.training.run import train
from gptc.training.state import State
from runs import metrics

Options = dict[str, Any]


def steps_in(run: str) -> list[int]:
    return [line["step"] for line in metrics(run)]


def test_lines_are_few_and_the_evaluations_are_among_them(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptc.training.run.MOST_LINES", 10)
    train({**options, "steps": 95, "eval_every": 33})
    assert steps_in(options["out"]) == [1, *range(10, 31, 10), 33, *range(40, 61, 10), 66,
                                        *range(70, 91, 10), 95]  # fmt: skip
    train({"steps": 99, "log_every": 2}, resume=options["out"])
    assert steps_in(options["out"])[-4:] == [95, 96, 98, 99]


def test_every_step_is_logged_in_a_short_run_or_if_asked_for(options: Options) -> None:
    train(options)
    assert steps_in(options["out"]) == list(range(1, 9))
    train({**options, "log_every": 5, "out": options["out"] + "2"})
    assert steps_in(options["out"] + "2") == [1, 4, 5, 8]


def test_lines_have_the_time_of_day(options: Options) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    train(options)
    for line in metrics(options["out"]):
        at = datetime.strptime(line["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        assert before <= at <= datetime.now(timezone.utc)


def test_left_is_the_time_budget(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    """Although evaluations take most of the time, which the pace of steps does not contain."""

    def sleep(step: int, model: Model) -> None:
        time.sleep(0.2)

    del options["steps"]
    train({**options, "minutes": 0.05}, progress=PlainProgress(interval_s=0.0), on_step=sleep)
    left = re.findall(r"left (\d):(\d\d)", capsys.readouterr().err)
    seconds = [60 * int(m) + int(s) for m, s in left]
    assert seconds[0] in (2, 3)
    assert seconds == sorted(seconds, reverse=True)
    assert len(seconds) > 5


def test_the_first_limit_is_what_is_left() -> None:
    horizon = Horizon(TrainOptions(minutes=10.0, steps=50), State(), 1000, step_s=1.0)
    horizon.follow_clock(10, 10.0, 1.0)
    assert horizon.left_s(10, 1.0) == 40.0  # the steps end first
    horizon.follow_clock(10, 300.0, 30.0)
    assert horizon.left_s(10, 1.0) == 300.0  # the time does
    assert Horizon(TrainOptions(steps=50), State(), 1000, None).left_s(20, 2.0) == 60.0
