"""The range of learning rates in which a run's loss falls."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.engine.optim import Muon
from gptc.errors import UsageError
from gptc.training import lr_range
from gptc.training import setup as run_setup
from gptc.training.lr_range import LrRange, _marks, _smooth, find_range
from gptc.training.progress import SilentProgress
from gptc.training.resolve import new_options
from gptc.training.run import train
from gptc.training.setup import set_up
from runs import metrics

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

Gptc = Callable[..., Any]


RATES = [lr_range.LOWEST * 1e6 ** (i / 119) for i in range(120)]


def _marked(losses: list[float]) -> LrRange:
    smoothed = _smooth(losses)
    rates = RATES[: len(losses)]
    return LrRange(rates, losses, smoothed, *_marks(rates, losses, smoothed))


def _noisy(losses: list[float], size: float) -> list[float]:
    rng = random.Random(3)
    return [loss + rng.gauss(0, size) for loss in losses]


def test_marks_are_the_steepest_fall_and_the_end_of_the_fall() -> None:
    fall = [5 - 2 / (1 + math.exp((70 - i) / 3)) for i in range(100)]
    falling = _noisy([*fall, *[3 - 0.0001 * i for i in range(10)], *range(4, 14)], 0.02)
    found = _marked(falling)
    assert found.steepest is not None
    assert found.stops is not None
    assert RATES[67] <= found.steepest <= RATES[73]  # a mean of the past alone is late
    assert RATES[78] <= found.stops <= RATES[84]  # not the least of the flat floor
    assert str(found) == (
        f"  rates   the loss falls fastest at {found.steepest:.1e}, and stops falling at "
        f"{found.stops:.1e}: try an --lr between them"
    )


def test_a_loss_that_does_not_fall_or_does_not_stop_has_no_such_mark() -> None:
    never = _marked(_noisy([5.0] * 90 + [5 + 0.1 * i for i in range(20)], 0.05))
    assert (never.steepest, never.stops) == (None, None)
    last = f"{RATES[109]:.1e}"
    assert str(never) == f"  rates   the loss does not fall at a learning rate up to {last}"
    on = _marked(_noisy([5.0] * 60 + [5 - 0.05 * i for i in range(60)], 0.02))
    assert on.stops is None
    assert str(on) == (
        f"  rates   the loss falls fastest at {on.steepest:.1e}, and still falls at 1.0e+00"
    )
    ended = _marked([5.0] * 60 + [5 - 0.05 * i for i in range(20)])  # not finite at the next rate
    assert ended.stops is not None
    assert RATES[77] <= ended.stops <= RATES[79]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_is_good_at_both_marks_and_bad_beyond(
    options: dict[str, Any], optimizer: str
) -> None:
    sizes = {"batch_size": 8, "grad_accum": 2, "threads": 1, "steps": 150, "eval_every": 150}
    rate = {"schedule": "constant", "warmup_steps": 0}
    given = {**options, **sizes, **rate, "optimizer": optimizer}
    with closing(set_up(new_options(given), None, SilentProgress())) as setup:
        found = find_range(setup)
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    assert found.steepest is not None
    assert found.stops is not None
    assert 1e-6 < found.steepest < found.stops < 1

    def loss_at(lr: float) -> float:
        out = f"{options['out']}-{lr}"
        train({**given, "lr": lr, "out": out})
        return float(np.mean([line["train_loss"] for line in metrics(out)[-20:]]))

    steepest, stops, beyond = map(loss_at, (found.steepest, found.stops, 10 * found.stops))
    # From 5.5. At 0.2, the least of a mean of past steps, it is 2.3 (AdamW) and 1.4 (Muon).
    assert max(steepest, stops) < 1.1
    assert beyond > stops + 0.3


def test_a_loss_that_is_not_finite_ends_it(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(set_up(new_options(options), None, SilentProgress())) as setup:
        name = setup.model.trained[0].name
        setup.model.set(name, setup.model.get(name) * float("nan"))
        with pytest.raises(UsageError, match="is not finite at a learning rate of 1e-06: no range"):
            find_range(setup)


def test_the_plan_draws_it_and_says_what_cannot_be(
    gptc: Gptc, arguments: list[str], options: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(lr_range, "STEPS", 30)
    ran = gptc("plan", *arguments, "--find-lr", tmp_path / "rates.png", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert len(found["lr_range"]["rates"]) <= 30
    assert found["steps"] == 8
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert not Path(options["out"]).exists()


def test_what_cannot_be_drawn_is_refused_before_the_model_is_made(
    gptc: Gptc, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_setup, "set_up", None)  # it would be called
    unknown = "does not end with a known suffix: use .png, .svg, .pdf\n"
    picture = tmp_path / "rates.png"
    pairs = ["--data", tmp_path, "--init-from", "gpt2", "--dpo"]
    for out, given, message in (
        (tmp_path / "rates.html", arguments, f"--find-lr {tmp_path / 'rates.html'} {unknown}"),
        (tmp_path / "rates.txt", arguments, f"--find-lr {tmp_path / 'rates.txt'} {unknown}"),
        (tmp_path / "none" / "rates.png", arguments, "choose another file with --find-lr\n"),
        (picture, pairs, "--find-lr is not for --dpo: leave one out\n"),
    ):
        ran = gptc("plan", *given, "--find-lr", out)
        assert ran.code != 0
        assert message in ran.err
    assert not picture.exists()


def test_its_updates_are_those_of_the_options(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_range, "STEPS", 12)
    muon = {"optimizer": "muon", "muon_rows": True, "muon_beta2": 0.5, "muon_cautious": True}
    given = new_options({**options, **muon, "momentum": 0.8, "beta2": 0.9, "weight_decay": 0.2})
    with closing(set_up(given, None, SilentProgress())) as setup:
        taken: list[dict[str, Any]] = []
        step = setup.model.train_step

        def noted(*rows: Any, **settings: Any) -> Any:
            taken.append(settings)
            return step(*rows, **settings)

        monkeypatch.setattr(setup.model, "train_step", noted)
        find_range(setup)
    last = taken[-1]
    assert last["muon"] == Muon(1.0, 0.8, 0.2, beta2=0.5, cautious=True)
    assert {name: last[name] for name in ("lr", "beta2", "weight_decay")} == {
        "lr": 1.0, "beta2": 0.9, "weight_decay": 0.2
    }  # fmt: skip
