"""A copy of what training changes, in this process's memory, from which a checkpoint is written."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.engine.model import Model
from gptc.files.memory import available_bytes


class Snapshot:
    """The weights of a model that are trained, and their optimizer's state, as at the last `take`.

    Its arrays are made once, so that later copies cost only the time of the copy.
    """

    def __init__(self, model: Model, averaged: bool = False) -> None:
        """Makes the arrays; `averaged`: also those of an average of the weights."""
        self.config, self.options, self.trained = model.config, model.options, model.trained
        shapes = {p.name: p.shape for p in model.trained}
        self._states = {name: model.states(name) for name in shapes}
        self._tensors = {
            (name, tensor): np.empty(model.state_shape(name, tensor), np.float32)
            for name in shapes
            for tensor in ("value", *self._states[name])
        }
        self.own: dict[str, FloatArray] = {}
        """The model's weights where `get` gives their average; else empty."""
        if averaged:
            self.own = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}

    def take(self, model: Model, average: Mapping[str, FloatArray] | None = None) -> None:
        """Copies the model, and the average of its weights if it has one."""
        for (name, tensor), out in self._tensors.items():
            if average is not None and tensor == "value":
                model.read(name, tensor, self.own[name])
                np.copyto(out, average[name])
            else:
                model.read(name, tensor, out)

    def get(self, name: str) -> FloatArray:
        """A weight; the array itself, not a copy."""
        return self.read(name, "value")

    def read(self, name: str, tensor: str) -> FloatArray:
        """A weight's "value" or one of `states`; the array itself, not a copy."""
        return self._tensors[name, tensor]

    def states(self, name: str) -> tuple[str, ...]:
        """The names of the state of a weight's optimizer, as in `Model.states`."""
        return self._states[name]


def snapshot_bytes(model: Model, averaged: bool) -> int:
    """The memory of a `Snapshot`."""
    weights = sum(math.prod(p.shape) * (1 + averaged) for p in model.trained)
    states = ((p.name, state) for p in model.trained for state in model.states(p.name))
    return 4 * (weights + sum(math.prod(model.state_shape(*one)) for one in states))


def fits(n_bytes: int) -> bool:
    """Whether so much memory is free, or it is not known how much is."""
    free = available_bytes()
    return free is None or n_bytes <= free
