"""The range of learning rates in which a run's loss falls."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gptc.engine.optim import Muon
from gptc.errors import UsageError
from gptc.training import lr_range
from gptc.training import setup as run_setup
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
