"""Muon in the engine next to one in float64 that knows each matrix's singular values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from gptc import AdamW, Model, Muon
from gptc.engine.config import GPTConfig
from gptc.engine.options import Options, plan_for
from gptc.errors import EngineError, GptcError, UsageError
from small_models import batch

Config = Callable[..., GPTConfig]
Array = npt.NDArray[np.float64]
# Amsel et al. 2025, algorithm 1: five iterations from 1e-3, safety 2e-2.
POLYNOMIALS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
ADAMW = AdamW(lr=1e-2, weight_decay=0.1, grad_clip=0.5)
MUON = Muon(lr=1e-2, momentum=0.9, weight_decay=0.1, grad_clip=0.5)
STEPS = 10


def orthogonal(matrix: Array) -> Array:
    """The polynomials of the singular values, which products approximate elsewhere."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / (1.02 * np.linalg.norm(s))
    for a, b, c in POLYNOMIALS:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


def is_hidden(name: str) -> bool:
    return name.startswith("h.") and name.endswith(("qkv.weight", "proj.weight", "fc.weight"))


def pieces(config: GPTConfig, name: str) -> list[int]:
    """The rows at which one matrix ends and the next begins."""
    head = config.n_embd // config.n_head
    if "qkv" in name:
        return [config.n_head * head, (config.n_head + config.n_kv_head) * head]
    return [config.n_ff] if "fc" in name and config.activation == "swiglu" else []


class Plain:
    """Muon and AdamW in float64."""

    def __init__(self, model: Model, muon: Muon = MUON) -> None:
        self.config, self.step, self.muon = model.config, 0, muon
        self.rows: dict[str, Array] | None = None
        if model.options.muon_rows:
            self.rows = {p.name: np.zeros(p.shape[0]) for p in model.trained if is_hidden(p.name)}
        self.w = {name: w.astype(np.float64) for name, w in model.parameters().items()}
        self.m = {name: np.zeros_like(w) for name, w in self.w.items()}
        self.v = {name: np.zeros_like(w) for name, w in self.w.items()}

    def update(self, grads: dict[str, Array]) -> None:
        self.step += 1
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, ADAMW.grad_clip / (norm + 1e-6))
            (self._muon if is_hidden(name) else self._adamw)(name, g)

    def _muon(self, name: str, g: Array) -> None:
        mu, w = self.muon.momentum, self.w[name]
        m = self.m[name] = mu * self.m[name] + (1 - mu) * g
        split = pieces(self.config, name)
        steps = np.split((1 - mu) * g + mu * m, split)
        found = []
        for i, step in enumerate(map(orthogonal, steps)):
            if self.rows is not None:
                step = self._scaled(step, np.split(self.rows[name], split)[i])
            found.append(0.2 * np.sqrt(max(step.shape)) * step)
        step = np.concatenate(found)
        decays = step * w >= 0 if self.muon.cautious else np.ones_like(w)
        w -= self.muon.lr * (step + self.muon.weight_decay * decays * w)

    def _scaled(self, step: Array, v: Array) -> Array:
        """Li et al. 2025, algorithm 1, whose last line is 0.2 sqrt(m n) / |step|; v in place."""
        v *= self.muon.beta2
        v += (1 - self.muon.beta2) * (step**2).mean(axis=1)
        step = step / (np.sqrt(v) + 1e-8)[:, None]
        return step * np.sqrt(min(step.shape)) / np.linalg.norm(step)

    def _adamw(self, name: str, g: Array) -> None:
        m = self.m[name] = ADAMW.beta1 * self.m[name] + (1 - ADAMW.beta1) * g
        v = self.v[name] = ADAMW.beta2 * self.v[name] + (1 - ADAMW.beta2) * g**2
        m, v = m / (1 - ADAMW.beta1**self.step), v / (1 - ADAMW.beta2**self.step)
        decay = ADAMW.weight_decay if g.ndim == 2 else 0
        self.w[name] -= ADAMW.lr * (m / (np.sqrt(v) + ADAMW.eps) + decay * self.w[name])


ROWS = replace(MUON, beta2=0.9)


@pytest.mark.parametrize(
    ("family", "muon", "muon_rows"),
    [
        ("gpt2", MUON, False),
        ("llama", MUON, False),
        ("llama", ROWS, True),
        ("gpt2", replace(ROWS, cautious=True, weight_decay=1.0), True),
        ("llama", replace(MUON, cautious=True, weight_decay=1.0), False),
    ],
)
def test_ten_steps_are_those_of_a_plain_muon(
    config: Config, family: str, muon: Muon, muon_rows: bool
) -> None:
    x, y = batch()
    settings = {"optimizer": "muon", "muon_rows": muon_rows}
    with Model.create(config(family), threads=2, max_batch=len(x), **settings) as model:
        before, plain = model.parameters(), Plain(model, muon)
        for _ in range(STEPS):
            model.backward(x, y)
            plain.update({n: g.astype(np.float64) for n, g in model.gradients().items()})
            model.update(ADAMW, muon)
        for name, want in plain.w.items():
            change = np.abs(want - before[name]).max()
            assert np.abs(model.get(name) - want).max() < 2e-3 * change, name
            own = ("momentum", "row_moment") if muon_rows else ("momentum",)
            states = own if is_hidden(name) else ("moment1", "moment2")
            assert model.states(name) == states
            if plain.rows is not None and name in plain.rows:
                rows = model.read(name, "row_moment")
                assert rows.shape == want.shape[:1]
                assert np.allclose(rows, plain.rows[name], rtol=1e-2, atol=0)
            first = plain.m[name]
            assert np.allclose(model.read(name, states[0]), first, atol=1e-4 * np.abs(first).max())


def test_the_plan_counts_products_and_one_state(config: Config) -> None:
    shape = config("llama")
    adamw = plan_for(shape, Options(threads=1))
    muon = plan_for(shape, Options(threads=1, optimizer="muon"))
    assert adamw.update_flops == 0
    flops, n_hidden = 0, 0
    for name, size, _ in shape.parameters():
        if not is_hidden(name):
            continue
        n_hidden += size[0] * size[1]
        for rows in np.diff([0, *pieces(shape, name), size[0]]):
            least, most = sorted((int(rows), size[1]))
            flops += 5 * 2 * (2 * least * least * most + least**3)
    assert muon.update_flops == flops
    assert adamw.optimizer_bytes - muon.optimizer_bytes == 4 * n_hidden
    rows = plan_for(shape, Options(threads=1, optimizer="muon", muon_rows=True))
    n_rows = sum(size[0] for name, size, _ in shape.parameters() if is_hidden(name))
    assert 0 <= rows.optimizer_bytes - muon.optimizer_bytes - 4 * n_rows < 64 * 4 * shape.n_layer


def test_wrong_settings_are_refused(config: Config) -> None:
    with pytest.raises(UsageError, match="optimizer 'lion' is unknown; it must be one of adamw"):
        Model.create(config(), optimizer="lion")
    x, y = batch()
    with Model.create(config(), threads=1, max_batch=len(x), optimizer="muon") as model:
        model.backward(x, y)
        with pytest.raises(EngineError, match=r"momentum is 1; it must be at least 0 and below 1"):
            model.update(ADAMW, Muon(lr=1e-3, momentum=1.0))
        with pytest.raises(EngineError, match=r"beta2 is 1; it must be at least 0 and below 1"):
            model.update(ADAMW, Muon(lr=1e-3, beta2=1.0))
        with pytest.raises(GptcError, match="has no state slot 1"):
            model.read("h.0.attn.qkv.weight", "moment2")
    refused = pytest.raises(GptcError, match=r"state slot 1 of parameter .* has \d+ numbers, not")
    with Model.create(config(), optimizer="muon", muon_rows=True) as model, refused:
        model.read("h.0.attn.qkv.weight", "moment2")
