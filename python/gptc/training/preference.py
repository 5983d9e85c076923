"""Direct preference optimization (DPO): Rafailov et al. 2023, as trl computes it.

The loss of a pair is -log sigmoid(beta (r_chosen - r_rejected)) with r = log p - log p_reference of
an answer, the sum over its tokens; beta r is the answer's reward. The reference is the model before
training. Letters in shapes: B pairs of a batch, T positions, P pairs of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.data.loader import Rows
from gptc.data.pairs import PairLoader, Pairs
from gptc.engine.arrays import FloatArray
from gptc.engine.library import GPT_ERR_NUMERIC
from gptc.engine.model import Model, StepResult
from gptc.engine.optim import AdamW, Muon
from gptc.errors import EngineError
from gptc.training.options import TrainOptions

MEASURES = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")

Numbers: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairLosses:
    """Results of B pairs: losses (B,), rewards (B, 2) of the chosen and the rejected answer."""

    losses: Numbers
    rewards: Numbers
    slopes: Numbers
    """The derivatives of each pair's loss by its two log-probabilities, (B, 2)."""

    def measures(self) -> dict[str, float]:
        """Means over the pairs: rewards, their margin, and the share with a positive margin."""
        chosen, rejected = self.rewards.T
        each = (chosen, rejected, chosen - rejected, chosen > rejected)
        return {name: float(values.mean()) for name, values in zip(MEASURES, each, strict=True)}


def pair_losses(logps: Numbers, reference: Numbers | FloatArray, beta: float) -> PairLosses:
    """The losses of pairs of log-probabilities (B, 2), and those of the reference (B, 2)."""
    rewards = beta * (logps - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    slope = beta * np.exp(-np.logaddexp(0, margin))  # beta sigmoid(-margin)
    return PairLosses(np.logaddexp(0, -margin), rewards, np.stack([-slope, slope], 1))


def joined(parts: Sequence[PairLosses]) -> PairLosses:
    """The results of several batches as those of one."""
    return PairLosses(
        np.concatenate([part.losses for part in parts]),
        np.concatenate([part.rewards for part in parts]),
        np.concatenate([part.slopes for part in parts]),
    )


def log_probabilities(losses: FloatArray) -> Numbers:
    """Of the answers (B, 2), from the losses (2 B, T): rows of the chosen ones come first."""
    return np.ascontiguousarray(-losses.sum(axis=1, dtype=np.float64).reshape(2, -1).T)


def backward(
    model: Model, rows: Rows, reference: Numbers | FloatArray, beta: float, n_pairs: int
) -> PairLosses:
    """Adds the gradient of the sum of the pairs' losses / n_pairs; `reference` is (B, 2)."""
    found: list[PairLosses] = []

    def weigh(losses: FloatArray) -> FloatArray:
        with np.errstate(all="ignore"):
            found.append(pair_losses(log_probabilities(losses), reference, beta))
        if not np.isfinite(found[0].losses).all():
            raise EngineError("the losses of pairs are not finite", GPT_ERR_NUMERIC)
        # The loss of a token is minus its log-probability.
        weights = -found[0].slopes.T.reshape(-1, 1) / n_pairs
        return np.broadcast_to(weights, losses.shape).astype(np.float32)

    model.backward_weighted(rows.inputs, rows.targets, weigh)
    return found[0]


class Preference:
    """The steps and evaluations of a run with --dpo; `references` (P, 2) are by split."""

    def __init__(
        self,
        model: Model,
        loader: PairLoader,
        val: Pairs,
        options: TrainOptions,
        references: Mapping[str, FloatArray],
    ) -> None:
        self._model, self._loader, self._val = model, loader, val
        self._beta, self._batch_size = options.dpo_beta, options.batch_size
        self._references = references

    def step(
        self,
        position: int,
        batches: Sequence[Rows],
        adamw: AdamW,
        muon: Muon,
        check: Callable[[], None],
    ) -> tuple[StepResult, dict[str, float]]:
        """One optimizer step on the batches at a position of the loader; its result and measures.

        As Model.train_step, an exception from `check` drops the step.
        """
        parts, size = [], self._batch_size
        try:
            for k, rows in enumerate(batches):
                check()
                reference = self._references["train"][self._loader.pairs(position + k * size)]
                n_pairs = size * len(batches)
                parts.append(backward(self._model, rows, reference, self._beta, n_pairs))
        except BaseException:
            self._model.zero_gradients()
            raise
        norm = self._model.update(adamw, muon)
        found = joined(parts)
        return StepResult(float(found.losses.mean()), norm), found.measures()

    def evaluate(self, n_batches: int | None) -> dict[str, float]:
        """The loss, margin and accuracy over all held-out pairs, or over that many batches."""
        n = None if n_batches is None else n_batches * self._batch_size
        parts = []
        for pairs, rows in self._val.batches(self._batch_size, n):
            logps = log_probabilities(self._model.losses(*rows[:2], training=True))
            parts.append(pair_losses(logps, self._references["val"][pairs], self._beta))
        found = joined(parts)
        measures = found.measures()
        return {
            "val_loss": float(found.losses.mean()),
            "val_margin": measures["reward_margin"],
            "val_accuracy": measures["reward_accuracy"],
        }


def reference_of(model: Model, pairs: Pairs, batch_size: int) -> FloatArray:
    """The log-probabilities (P, 2) of all pairs by the model as it is."""
    out = np.empty((len(pairs), 2), np.float32)
    for numbers, rows in pairs.batches(batch_size):
        out[numbers] = log_probabilities(model.losses(*rows[:2], training=True))
    return out
