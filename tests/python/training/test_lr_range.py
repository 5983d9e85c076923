"""The range of learning rates in which a run's loss falls."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gptc.errors import UsageError
from gptc.training import lr_range
from gptc.training.lr_range import _marks, find_range
from gptc.training.progress import SilentProgress
from gptc.training.resolve import new_options
from gptc.training.setup import set_up

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

Gptc = Callable[..., Any]


def test_marks_are_the_steepest_fall_and_the_least() -> None:
    rates = [10.0 ** (i / 10) for i in range(40)]
    losses = (
        [5.0] * 12 + [4.9, 4.7, 4.2, 3.6, 3.2, 3.0, 2.9, 2.8, 2.75] + [2.75 + i for i in range(19)]
    )
    steepest, least = _marks(rates, losses)
    assert rates[13] <= steepest <= rates[15]
    assert least == rates[20]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls_within_the_range(options: dict[str, Any], optimizer: str) -> None:
    given = {**options, "optimizer": optimizer, "batch_size": 8, "grad_accum": 2, "threads": 1}
    with closing(set_up(new_options(given), None, SilentProgress())) as setup:
        found = find_range(setup)
    assert 1e-6 < found.steepest < found.least < 1
    assert found.rates == sorted(found.rates)
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    at = found.rates.index(found.least)
    assert found.smoothed[at] == min(found.smoothed[10:])
    assert found.smoothed[0] - found.smoothed[at] > 0.5  # it learns there


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
    for out, message in (
        ("rates.html", "rates.html is not an image: use .png"),
        ("none/rates.png", "cannot write"),
    ):
        ran = gptc("plan", *arguments, "--find-lr", tmp_path / out)
        assert ran.code != 0
        assert message in ran.err
