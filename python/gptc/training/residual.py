"""Gradients that rounding has kept from other ranks, with --wire: what a checkpoint has of them.

Each rank adds its own to its next gradients. All of them come to the sum in the end, whichever rank
has them, so another number of ranks shares them: rank r of N takes those of ranks r, r + N, ...
"""

from __future__ import annotations

import numpy as np

from gptc.checkpoint.names import RESIDUAL
from gptc.checkpoint.reader import Checkpoint
from gptc.engine.arrays import FloatArray
from gptc.engine.model import Model
from gptc.engine.world import World


class Residuals:
    """The residuals of all ranks, which a checkpoint keeps by the names in `shapes`."""

    def __init__(self, model: Model, world: World) -> None:
        self._model, self._world = model, world
        places = [(rank, p) for rank in range(world.size) for p in model.trained]
        self.shapes = {_stored(rank, p.name): p.shape for rank, p in places}
        self._places = {_stored(rank, p.name): (rank, p.name) for rank, p in places}

    def read(self, stored: str) -> FloatArray:
        """A residual by its name. Ranks call this together, in the order of `shapes`."""
        rank, name = self._places[stored]
        values = self._model.read(name, "residual")
        self._world.broadcast(values, rank)
        return values

    def restore(self, base: Checkpoint) -> None:
        """Takes this rank's share of a checkpoint's; zero where it has none.

        A run without rounding leaves none.
        """
        trainer = base.trainer()
        assert trainer is not None
        # The ranks that made the checkpoint; each left tensors.
        n_ranks = min(trainer.get("ranks", 1), base.n_states)
        for parameter in self._model.trained:
            total = np.zeros(parameter.shape, np.float32)
            for rank in range(self._world.rank, n_ranks, self._world.size):
                found = base.state(_stored(rank, parameter.name), parameter.shape)
                if found is not None:
                    total += found
            self._model.write(parameter.name, "residual", total)


def _stored(rank: int, name: str) -> str:
    return f"rank{rank}.{RESIDUAL}.{name}" if rank else f"{RESIDUAL}.{name}"
