"""A target that a speedrun cannot reach is refused before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptc.errors import UsageError
from gptc.training import expected, speedrun
from gptc.training.expected import Rule, check_target
from gptc.training.speedrun import RECIPES

Gptc = Callable[..., Any]
NAME = "shakespeare-char"
RECIPE = RECIPES[NAME]


def _check(target: float, **given: Any) -> None:
    check_target(RECIPE.rule, given, {**RECIPE.options, **given}, target, Path())


def test_the_rule_has_a_floor_and_falls_with_both() -> None:
    rule = Rule(1.0, 2.0, 0.5, 3.0, 1.0, margin=0.1)
    assert rule.result(4, 6) == 1 + 1 + 0.5
    assert rule.result(4, math.inf) == 2
    assert rule.tokens_for(4, 2.5) == 6
    assert rule.tokens_for(4, 2.0) == math.inf


def test_the_recipe_itself_is_as_measured() -> None:
    """Its median of five seeds is 1.8707; docs/log/2026-11-27-training-craft.md."""
    assert RECIPE.rule is not None
    size = 2 * (4 * 64**2 + 3 * 64 * 192)
    assert RECIPE.rule.result(size, 250 * 16 * 64) == pytest.approx(1.8707, rel=0.02)
    assert RECIPE.target is not None
    _check(RECIPE.target)


@pytest.mark.parametrize("given", [{"steps": 60}, {"tokens": 61_440}])
def test_too_few_tokens_are_refused_with_the_steps_that_it_takes(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        _check(1.88, **given)
    message = str(caught.value)
    assert message.startswith("--target 1.88 cannot be reached: 61.4K tokens with 106K numbers")
    value, steps = re.search(r"end at (\d\.\d+); use --steps (\d+)", message).groups()  # type: ignore[union-attr]
    assert 2.0 < float(value) < 2.3
    _check(1.88, steps=int(steps), tokens=None)
    _check(float(value), **given)


def test_a_target_below_the_floor_of_a_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"any number of tokens .* use a larger model"):
        _check(1.2)
    _check(1.6, n_layer=6, n_embd=384, n_head=6, n_ff=1024, steps=10**5)


def test_other_data_and_optimizers_are_not_known() -> None:
    for given in (
        {"n_expert": 4},
        {"data": "book.txt"},
        {"optimizer": "adamw"},
        {"preset": "gpt2"},
        {"ema": 0.9},
    ):
        _check(0.1, **given)
    check_target(None, {}, RECIPE.options, 0.1, Path())
    check_target(RECIPE.rule, {}, RECIPE.options, None, Path())
    _check(1.7, steps=None, epochs=0.1)  # the number of tokens is not known yet


def test_a_time_is_turned_into_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    setup = SimpleNamespace(close=lambda: closed.append(True))
    found = SimpleNamespace(tokens=50_000)
    monkeypatch.setattr(expected, "set_up", lambda options, base, show: setup)
    monkeypatch.setattr(expected, "Trainer", lambda *rest: None)
    monkeypatch.setattr(expected, "forecast", lambda *rest: found)
    with pytest.raises(UsageError, match=r"50\.0K tokens .* use --steps \d+"):
        _check(1.88, minutes=0.01, steps=None)
    found.tokens = 10**6
    _check(1.88, minutes=0.01, steps=None)
    assert closed == [True, True]


def test_the_command_refuses_before_any_work(
    gptc: Gptc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedrun, "run_attempts", None)
    monkeypatch.chdir(tmp_path)
    ran = gptc("speedrun", NAME, "--steps", 40)
    assert (ran.code, ran.out) == (2, "")
    assert "--target 1.88 cannot be reached: 41.0K tokens" in ran.err
    ran = gptc("speedrun", NAME, "--depth", 1, "--tokens", "40K", "--target", 1.5)
    assert "cannot be reached: 40.0K tokens with 53.2K numbers" in ran.err
    assert not list(tmp_path.iterdir())
