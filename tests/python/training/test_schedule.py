"""The learning rate follows its schedule, in short runs too."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from gptc.checkpoint.find import find_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.training.options import TrainOptions
from gptc.training.resolve import new_options
from gptc.training.run import train
from gptc.training.schedule import learning_rate
from runs import metrics

Options = dict[str, Any]


def schedule(steps: int = 100, **changes: Any) -> list[float]:
    options = TrainOptions(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **changes})
    return [learning_rate(step, steps, options) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules(name: str) -> None:
    rates = schedule(schedule=name)
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    middle = {"cosine": 0.55, "linear": 0.55, "wsd": 1.0, "constant": 1.0}
    assert (rates[54] + rates[55]) / 2 == pytest.approx(middle[name], abs=1e-3)
    if name == "wsd":
        assert rates[79] == 1.0
        assert rates[80] < 1.0


def test_schedules_of_short_runs_stay_finite() -> None:
    for name in ("cosine", "linear", "wsd"):
        assert schedule(1, warmup_steps=0, schedule=name) == [1.0]
        assert schedule(2, warmup_steps=0, schedule=name)[1] == pytest.approx(0.1)
        assert all(math.isfinite(rate) for rate in schedule(3, warmup_steps=5, schedule=name))
    assert schedule(10, min_lr=None, warmup_steps=0)[-1] == pytest.approx(0.1)


def test_a_short_run_has_a_short_warm_up(options: Options) -> None:
    train({**options, "steps": 20})
    assert metrics(options["out"])[1]["lr"] == pytest.approx(new_options({}).lr)
    stored = Checkpoint(find_checkpoint(options["out"])).trainer()
    assert stored is not None
    assert stored["options"]["warmup_steps"] == 2
