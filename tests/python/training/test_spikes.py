"""A jump of the loss is noted, and its noise is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptc.training import spikes
from gptc.training.run import train
from gptc.training.spikes import Spikes
from gptc.training.trainer import Trainer


def _noted(losses: np.ndarray, sigmas: float = 6.0) -> list[int]:
    found = Spikes(sigmas)
    return [step for step, loss in enumerate(losses.tolist()) if found.add(step, loss)]


@pytest.mark.parametrize("seed", range(5))
def test_only_a_jump_is_noted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    at = np.arange(3000)
    losses = 2 + 6 * np.exp(-at / 200) + 0.05 * rng.standard_normal(3000)  # 0.05 is its noise
    assert _noted(losses) == []
    losses[1500] += 0.6  # 12 deviations
    assert _noted(losses) == [1500]
    assert _noted(losses, 0.0) == []
    assert _noted(losses, 20.0) == []
    losses[1501:] += 0.6  # a level that stays
    assert len(_noted(losses)) in (1, 2)
    losses[20] += 100  # before there is a mean of enough losses
    assert 20 not in _noted(losses)
    assert _noted(np.full(200, 3.0)) == []


def test_a_run_notes_it(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Trainer.step
    monkeypatch.setattr(spikes, "_FIRST", 3)

    def step(trainer: Trainer, check: Any) -> dict[str, Any]:
        record = real(trainer, check)
        return record | {"train_loss": 90.0} if record["step"] == 6 else record

    monkeypatch.setattr(Trainer, "step", step)
    train(options)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "deviations above" in line]
    assert note.startswith("note: the loss of step 6 is 90.0000, ")
