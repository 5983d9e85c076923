"""A run that goes back to its last checkpoint after a loss that is not finite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.names import CHECKSUMS, TRAINER, list_checkpoints, step_of
from gptc.checkpoint.writer import _record
from gptc.data.loader import Loader
from gptc.errors import GptcError
from gptc.training.run import train
from gptc.training.trainer import Trainer
from gptc.training.trouble import MOST_ROLLBACKS
from runs import content, metrics

Options = dict[str, Any]


def _poison(at: int, times: int, crash: int | None = None) -> Callable[[int, Model], None]:
    """Makes the weights not finite after a step, so often; ends a second visit of `crash`."""
    seen: list[int] = []

    def on_step(step: int, model: Model) -> None:
        seen.append(step)
        name = model.trained[0].name
        if step == at and seen.count(at) <= times:
            model.set(name, np.full_like(model.get(name), np.nan))
        if step == crash and seen.count(crash) == 2:
            raise MemoryError

    return on_step


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the batches that training takes."""
    positions: list[int] = []
    real = Loader.next_rows

    def next_rows(loader: Loader) -> Any:
        positions.append(loader.position)
        return real(loader)

    monkeypatch.setattr(Loader, "next_rows", next_rows)
    return positions


def test_going_back_skips_the_batches_since(
    options: Options, drawn: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**options, "on_nan": "rollback", "ema": 0.5, "eval_every": 100, "save_every": 4}
    summary = train(given, on_step=_poison(at=6, times=1))
    run = Path(given["out"])
    assert summary.finished
    assert summary.step == 8
    assert drawn == list(range(0, 2 * (7 + 4), 2))  # seven, of which three are lost, and four again
    assert [line["step"] for line in metrics(run)] == list(range(1, 9))
    assert np.isfinite([line["train_loss"] for line in metrics(run)]).all()
    shown = capsys.readouterr().err
    assert "at step 7 (wte.weight itself is not finite" in shown
    assert f"going back to {run / 'ckpt-000004'}; the batches since then are skipped" in shown
    # A run that ends in between comes to the same weights.
    other = {**given, "out": given["out"] + "-2"}
    with pytest.raises(MemoryError):
        train(other, on_step=_poison(at=6, times=1, crash=6))
    train({}, resume=other["out"], on_step=_poison(at=6, times=1))
    assert content(run / "ckpt-000008") == content(Path(other["out"]) / "ckpt-000008")

    # So does one that begins at the checkpoint, with the batches behind the bad one.
    begun = run.with_name("begun")
    shutil.copytree(run, begun, symlinks=True)
    shutil.rmtree(begun / "ckpt-000008")
    (begun / "best").unlink()
    folder = begun / "ckpt-000004"
    trainer = json.loads((folder / TRAINER).read_text())
    (folder / TRAINER).write_text(json.dumps({**trainer, "loader_position": 2 * 7}))
    sums = json.loads((folder / CHECKSUMS).read_text())
    sums["files"][TRAINER] = _record(folder / TRAINER)
    (folder / CHECKSUMS).write_text(json.dumps(sums))
    train({}, resume=begun)
    assert content(run / "ckpt-000008") == content(begun / "ckpt-000008")


def test_it_goes_back_so_often_and_not_without_a_checkpoint(
    options: Options, drawn: list[int]
) -> None:
    given = {**options, "on_nan": "rollback", "eval_every": 100, "save_every": 4}
    message = rf"after {MOST_ROLLBACKS} rollbacks to .*ckpt-000004: the loss is not finite at step "
    with pytest.raises(GptcError, match=message + "7 .* --lr"):
        train(given, on_step=_poison(at=6, times=100))
    assert len(drawn) == 4 + 3 * (1 + MOST_ROLLBACKS)
    other = {**given, "out": given["out"] + "-2"}
    with pytest.raises(GptcError, match=r"at step 3 \(.*\); try a smaller --lr"):
        train(other, on_step=_poison(at=2, times=100))


def test_a_validation_loss_that_is_not_finite_is_never_saved(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, seen = Trainer._measured, [0]

    def measured(trainer: Trainer, n_batches: int) -> dict[str, float]:
        seen[0] += 1
        return {**real(trainer, n_batches), **({"val_loss": np.nan} if seen[0] == 2 else {})}

    monkeypatch.setattr(Trainer, "_measured", measured)
    given = {**options, "on_nan": "rollback", "eval_every": 4, "save_every": 2}
    summary = train(given)
    assert summary.finished
    assert summary.best_val_loss is not None
    assert np.isfinite(summary.best_val_loss)
    shown = capsys.readouterr().err
    assert "not finite at step 8 (the validation loss is nan): going back to" in shown
    seen[0] = 0
    other = {**given, "on_nan": "stop", "out": given["out"] + "-2"}
    with pytest.raises(GptcError, match=r"at step 8 \(the validation loss is nan\); the last "):
        train(other)
    assert [step_of(path) for path in list_checkpoints(Path(other["out"]))][-1] == 6
