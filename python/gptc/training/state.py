"""The progress of a run: updated by each step, saved in each checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptc.checkpoint.reader import Checkpoint
from gptc.training.options import TrainOptions
from gptc.training.resolve import stored_options
from gptc.training.schedule import learning_rate


@dataclass
class State:
    """The steps done and the results so far."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0  # of the whole run, over all its processes
    lr: float | None = None  # of the last step
    best_val_loss: float | None = None  # of evaluations over the same batches
    best_step: int | None = None
    since_best: int = 0  # evaluations since then
    evaluation: dict[str, float] = field(default_factory=dict)  # the last one
    saved: Path | None = None  # the newest checkpoint

    @classmethod
    def of(cls, base: Checkpoint) -> State:
        """The state in a checkpoint."""
        trainer = base.trainer()
        assert trainer is not None
        return cls(
            step=trainer["step"],
            tokens=trainer["tokens"],
            elapsed_s=trainer["elapsed_s"],
            lr=_last_rate(trainer, stored_options(base)),
            best_val_loss=trainer["best_val_loss"],
            best_step=trainer.get("best_step"),  # older checkpoints have neither
            since_best=trainer.get("since_best", 0),
            evaluation=trainer["evaluation"],
            saved=base.path,
        )

    def go_back(self, base: Checkpoint) -> None:
        """Takes the values of an earlier checkpoint, but for the time, which has passed."""
        vars(self).update(vars(replace(State.of(base), elapsed_s=self.elapsed_s)))

    def to_json(self) -> dict[str, Any]:
        """The values for trainer.json."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "elapsed_s": round(self.elapsed_s, 3),
            "best_val_loss": self.best_val_loss,
            "best_step": self.best_step,
            "since_best": self.since_best,
            "evaluation": self.evaluation,
        }

    def compare(self, val_loss: float) -> None:
        """Updates the best loss, which is finite, with that of an evaluation at this step."""
        best = self.best_val_loss
        is_first = best is None or not math.isfinite(best)
        if math.isfinite(val_loss) and (is_first or val_loss < best):  # type: ignore[operator]
            self.best_val_loss, self.best_step, self.since_best = val_loss, self.step, 0
        else:
            self.since_best += 1

    def forget_best(self) -> None:
        """Makes the next evaluation the best: those before are of other data."""
        self.best_val_loss, self.best_step, self.since_best = None, None, 0

    def out_of_patience(self, options: TrainOptions) -> bool:
        """Whether --patience ends the run."""
        return 0 < options.patience <= self.since_best


def _last_rate(trainer: dict[str, Any], options: TrainOptions) -> float:
    """The learning rate of the last step before a checkpoint."""
    return learning_rate(trainer["step"] - 1, options.steps or trainer["step"], options)
