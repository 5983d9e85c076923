"""The size of a step's update relative to the weights, of each kind of matrix.

A healthy rate is about 1e-3: far above it training is unstable, far below it the weights hardly
move.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.engine.model import Model

PREFIX = "update_ratio/"  # of the keys in metrics.jsonl

_MOST = 4096  # numbers of a matrix that are compared


class UpdateRatios:
    """A sample of each trained matrix, taken before a step and compared after it."""

    def __init__(self, model: Model) -> None:
        """Reads up to 4,096 numbers of each matrix, spread evenly."""
        self._model = model
        self._before = {p.name: _sampled(model, p.name) for p in model.trained if p.decay}

    def measure(self) -> dict[str, float]:
        """The ratios since then: |change| / |weights|, over the layers, by kind of matrix.

        A kind whose weights were all zero has none.
        """
        changes: defaultdict[str, float] = defaultdict(float)
        sizes: defaultdict[str, float] = defaultdict(float)
        for name, before in self._before.items():
            kind = kind_of(name)
            changes[kind] += float(((_sampled(self._model, name) - before) ** 2).sum())
            sizes[kind] += float((before**2).sum())
        return {
            PREFIX + kind: math.sqrt(changes[kind] / size) for kind, size in sizes.items() if size
        }


def kind_of(name: str) -> str:
    """The name of a parameter without its layer, such as attn.qkv."""
    return re.sub(r"^h\.\d+\.|(?<=experts\.)\d+\.", "", name).removesuffix(".weight")


def _sampled(model: Model, name: str) -> FloatArray:
    """Numbers of a parameter at equal distances, as float32; the whole is read for a moment."""
    values = model.get(name).reshape(-1)
    every = -(-values.size // _MOST)
    return np.ascontiguousarray(values[::every])
