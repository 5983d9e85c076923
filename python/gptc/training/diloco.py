"""DiLoCo: ranks train apart for some steps, then take one outer step together.

Douillard et al. 2023, algorithm 1. Every H steps each rank has moved from the common weights w to
its own; the mean of the differences is the outer gradient g. The outer optimizer is Nesterov's,
with PyTorch's conventions: m = momentum m + g, w = w - lr (g + momentum m). The moments of AdamW
are each rank's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gptc.checkpoint.names import MOMENTS, OUTER
from gptc.checkpoint.reader import Checkpoint
from gptc.engine.arrays import FloatArray
from gptc.engine.model import Model
from gptc.engine.world import World

MOST_NUMBERS = 1 << 21  # of tensors whose changes are added together, unless it is one tensor


def outer_bytes(n_trained: int) -> int:
    """The memory of a rank for its common weights and outer momentum, outside the engine."""
    return 2 * 4 * n_trained


class Diloco:
    """The outer optimizer of a run, with the common weights and its momentum.

    It is also what a checkpoint keeps in addition: the outer momentum, and the optimizer's state of
    ranks other than 0, by the names in `shapes`.
    """

    def __init__(self, model: Model, world: World, every: int, lr: float, momentum: float) -> None:
        """Begins with the model's weights, which all ranks have."""
        self._model, self._world, self._every = model, world, every
        self._lr, self._decay = np.float32(lr), np.float32(momentum)
        self._weights = {p.name: model.get(p.name) for p in model.trained}
        self._momentum = {name: np.zeros_like(w) for name, w in self._weights.items()}
        self._groups = list(_groups({name: w.size for name, w in self._weights.items()}))
        shapes = {name: w.shape for name, w in self._weights.items()}
        self.shapes: dict[str, tuple[int, ...]] = {f"{OUTER}.{n}": s for n, s in shapes.items()}
        self._places: dict[str, tuple[int, str, str]] = {}  # rank, parameter and state
        for rank in range(1, world.size):
            for name in shapes:
                for state in model.states(name):
                    stored, shape = _stored(rank, name, state), model.state_shape(name, state)
                    self.shapes[stored], self._places[stored] = shape, (rank, name, state)

    def due(self, step: int, last: int) -> bool:
        """Whether ranks have one model after this step, from 1 on; `last` is the run's."""
        return step % self._every == 0 or step == last

    def step(self) -> None:
        """The outer step. All ranks then have the same weights."""
        share = np.float32(1 / self._world.size)
        for names in self._groups:
            moved = [self._weights[name] - self._model.get(name) for name in names]
            gradients = np.concatenate([values.ravel() for values in moved])
            self._world.add(gradients)
            gradients *= share
            at = 0
            for name in names:
                weights, momentum = self._weights[name], self._momentum[name]
                gradient = gradients[at : at + weights.size].reshape(weights.shape)
                at += weights.size
                momentum *= self._decay
                momentum += gradient
                gradient += self._decay * momentum
                gradient *= self._lr
                weights -= gradient
                self._model.set(name, weights)

    def read(self, stored: str) -> FloatArray:
        """A part of the state by its name. Ranks call this together, in the order of `shapes`."""
        if stored not in self._places:
            return self._momentum[stored.partition(".")[2]]
        rank, name, state = self._places[stored]
        values = self._model.read(name, state)
        self._world.broadcast(values, rank)
        return values

    def restore(self, base: Checkpoint, n_ranks: int) -> None:
        """Takes the state of a checkpoint that `n_ranks` have made.

        A rank beyond those begins with the optimizer's state of another.
        """
        for name, weights in self._weights.items():
            found = base.state(f"{OUTER}.{name}", weights.shape)
            if found is not None:  # else the run had no outer step until now
                self._momentum[name] = found.copy()
        rank = self._world.rank % n_ranks
        for name in self._weights if rank else ():
            for state in self._model.states(name):
                shape = self._model.state_shape(name, state)
                found = base.state(_stored(rank, name, state), shape)
                if found is not None:
                    self._model.write(name, state, found)


def _groups(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Neighbours that are added together: each sum waits for the network's latency."""
    names: list[str] = []
    n_numbers = 0
    for name, size in sizes.items():
        if names and n_numbers + size > MOST_NUMBERS:
            yield names
            names, n_numbers = [], 0
        names.append(name)
        n_numbers += size
    if names:
        yield names


def _stored(rank: int, name: str, state: str) -> str:
    return f"rank{rank}.{MOMENTS[state]}.{name}"
