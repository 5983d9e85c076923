"""Label smoothing and z-loss change the gradient, and no loss that is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.errors import GptcError

SMOOTHING, Z_LOSS = 0.125, 0.0625


def _loss(model: Model, x: np.ndarray, y: np.ndarray) -> float:
    """The regularised loss in float64, from the logits."""
    z = model.logits(x).astype(np.float64)
    top = z.max(axis=-1)
    log_sum = top + np.log(np.exp(z - top[..., None]).sum(axis=-1))
    at = np.take_along_axis(z, y[..., None], -1)[..., 0]
    smooth = (1 - SMOOTHING) * (log_sum - at) + SMOOTHING * (log_sum - z.mean(axis=-1))
    return float((smooth + Z_LOSS * log_sum**2).mean())


def test_the_gradient_is_that_of_the_regularised_loss(config: Callable[..., Any]) -> None:
    rng = np.random.default_rng(4)
    shape = config()
    x, y = rng.integers(0, shape.vocab_size, (2, 2, 7), dtype=np.int32)
    given = {"label_smoothing": SMOOTHING, "z_loss": Z_LOSS}
    with Model.create(shape, device="cpu", max_batch=2, max_seq=7, seed=1, **given) as model:
        plain = model.loss(x, y)
        assert model.backward(x, y) == pytest.approx(plain, rel=1e-5)
        for name in ("h.0.mlp.proj.weight", "wte.weight"):
            values, slope = model.get(name), model.read(name, "grad")
            way = rng.standard_normal(values.shape).astype(np.float32)
            step, found = 1e-3, []
            for sign in (1, -1):
                model.set(name, values + sign * step * way)
                found.append(_loss(model, x, y))
            model.set(name, values)
            want = (found[0] - found[1]) / (2 * step)
            assert float((slope * way).sum()) == pytest.approx(want, rel=5e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is 1; it must be at least 0 and below 1"),
        ({"label_smoothing": float("nan")}, "label_smoothing is nan"),
        ({"z_loss": -0.5}, "z_loss is -0.5; it must be 0 or above"),
        ({"z_loss": float("inf")}, "z_loss is inf"),
    ],
)
def test_wrong_values(config: Callable[..., Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(GptcError, match=message):
        Model.create(config(), device="cpu", **given)
