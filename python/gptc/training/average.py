"""A moving average of the weights of a run: evaluated, sampled from and saved in their place.

After step t (from 1) average += (1 - d) (weights - average). As in TensorFlow's
ExponentialMovingAverage, d = min(decay, (1 + t) / (10 + t)), so that the first weights are soon
forgotten. It is a function of the steps alone, so resuming is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.engine.model import Model


class Average:
    """The average of the parameters that training changes, in this process's memory."""

    def __init__(self, model: Model, decay: float) -> None:
        """Begins with the model's weights."""
        self._model, self._decay = model, decay
        self._weights = _weights(model)

    @property
    def weights(self) -> Mapping[str, FloatArray]:
        """The average; `update` changes its arrays."""
        return self._weights

    def update(self, step: int) -> None:
        """Takes the weights after a step in."""
        rate = np.float32(1 - min(self._decay, (1 + step) / (10 + step)))
        for name, average in self._weights.items():
            change = self._model.get(name)
            change -= average
            change *= rate
            average += change

    @contextmanager
    def applied(self) -> Iterator[dict[str, FloatArray]]:
        """The model has the average within; yields its own weights, which it has again after."""
        own = _weights(self._model)
        _give(self._model, self._weights)
        try:
            yield own
        finally:
            _give(self._model, own)


def _weights(model: Model) -> dict[str, FloatArray]:
    return {parameter.name: model.get(parameter.name) for parameter in model.trained}


def _give(model: Model, weights: dict[str, FloatArray]) -> None:
    for name, values in weights.items():
        model.set(name, values)
