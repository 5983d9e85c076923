"""The progress of a run: updated by each step, saved in each checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptc.checkpoint.reader import Checkpoint


@dataclass
class State:
    """The steps done and the results so far."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0  # of the whole run, over all its processes
    best_val_loss: float | None = None
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
            best_val_loss=trainer["best_val_loss"],
            evaluation=trainer["evaluation"],
            saved=base.path,
        )

    def to_json(self) -> dict[str, Any]:
        """The values for trainer.json."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "elapsed_s": round(self.elapsed_s, 3),
            "best_val_loss": self.best_val_loss,
            "evaluation": self.evaluation,
        }
