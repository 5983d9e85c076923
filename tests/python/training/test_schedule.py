"""The learning rate follows its schedule, in short runs too."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from gptc.checkpoint.find import find_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.errors import UsageError
from gptc.training.options import TrainOptions
from gptc.training.resolve import new_options
from gptc.training.run import train
from gptc.training.schedule import idle, learning_rate
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


@pytest.mark.parametrize(("share", "last_full"), [(0.2, 79), (0.5, 49), (1.0, 10), (0.001, 98)])
def test_the_share_of_the_steps_in_which_wsd_falls(share: float, last_full: int) -> None:
    rates = schedule(schedule="wsd", decay_share=share)
    assert rates[10] == rates[last_full] == 1.0
    assert rates[last_full + 1] < 1.0
    assert rates[-1] == pytest.approx(0.1)


def test_the_warm_up_as_a_share_of_the_steps(options: Options) -> None:
    summary = train({**options, "steps": 10, "warmup_share": 0.5, "lr": 1e-3})
    assert (summary.options["warmup_steps"], summary.options["warmup_share"]) == (5, None)
    assert [m["lr"] for m in metrics(options["out"])][:5] == pytest.approx(
        [2e-4, 4e-4, 6e-4, 8e-4, 1e-3]
    )
    resumed = train({"steps": 20, "warmup_share": 0.75}, resume=options["out"])
    assert resumed.options["warmup_steps"] == 15
    with pytest.raises(UsageError, match=r"--warmup-share 0.5 sets --warmup-steps: leave out"):
        train({**options, "warmup_share": 0.5, "warmup_steps": 3})


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"preset": "modern", "optimizer": "adamw"}, None),  # the preset's momentum
        ({"schedule": "wsd", "decay_share": 0.5, "optimizer": "muon", "momentum": 0.5}, None),
        ({"warmup_steps": 9}, "--warmup-steps 9 is more than the run's 8 steps, so that the learn"),
        ({"decay_share": 0.5}, "--decay-share 0.5 has no effect with --schedule cosine"),
        ({"momentum": 0.5}, "--momentum 0.5 has no effect with --optimizer adamw"),
        ({"momentum_warmup": 7}, "--momentum-warmup 7 has no effect with --optimizer adamw"),
        ({"muon_beta2": 0.5}, "--muon-beta2 0.5 has no effect with --optimizer adamw"),
        ({"recompute_layers": 1}, "--recompute-layers 1 has no effect without --recompute: add"),
        ({"recompute_layers": 1, "recompute": "mlp"}, None),
    ],
)
def test_an_option_that_the_schedule_does_not_use_is_noted(
    changes: Options, message: str | None
) -> None:
    notes = list(idle(new_options(changes), 8))
    assert len(notes) == (message is not None)
    assert all(note.startswith(f"note: {message}") for note in notes)


def test_a_run_notes_it_before_its_steps(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    train({**options, "warmup_steps": 9, "steps": 2})
    shown = capsys.readouterr().err
    assert 0 < shown.index("note: --warmup-steps 9 is more") < shown.index("val loss")


def test_a_run_of_minutes_notes_what_does_not_depend_on_steps(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    train({**options, "steps": None, "minutes": 0.001, "recompute_layers": 1})
    assert "note: --recompute-layers 1 has no effect" in capsys.readouterr().err
