"""A model in Python checks its arguments, and its parts agree with each other."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.engine.optim import AdamW
from gptc.engine.options import Options, plan_for
from gptc.errors import EngineError, GptcError, UsageError
from small_models import batch

Config = Callable[..., GPTConfig]


def test_weights_are_a_function_of_the_seed(config: Config) -> None:
    options = {"threads": 1, "max_batch": 1, "training": False}
    a, b, c = (Model.create(config(), seed=seed, **options) for seed in (1, 1, 2))
    zero = Model.create(config(), init=False, **options)
    name = "h.0.attn.qkv.weight"
    assert np.array_equal(a.get(name), b.get(name))
    assert not np.array_equal(a.get(name), c.get(name))
    assert not zero.get(name).any()
    assert a.get(name).std() == pytest.approx(0.02, rel=0.1)


def test_parameters_can_be_read_and_replaced(model: Model) -> None:
    shapes = {name: shape for name, shape, _ in model.config.parameters()}
    assert {name: values.shape for name, values in model.parameters().items()} == shapes
    assert sum(values.size for values in model.parameters().values()) == model.plan.n_params
    new = np.random.default_rng(1).normal(size=(256, 32)).astype(np.float32)
    model.set("wte.weight", new)
    assert np.array_equal(model.get("wte.weight"), new)
    model.set("wte.weight", new.T.copy().T)  # not contiguous
    assert np.array_equal(model.get("wte.weight"), new)
    model.set("wte.weight", new.astype(np.float16))
    assert np.array_equal(model.get("wte.weight"), new.astype(np.float16))


def test_a_copy_stays_a_copy(model: Model) -> None:
    copy = model.get("wte.weight")
    before = copy.copy()
    copy[:] = 7
    assert np.array_equal(model.get("wte.weight"), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((256, 32)), "are float64; they must be float32"),
        (np.zeros((32, 256), np.float32), r"have the shape \(32, 256\); it must be \(256, 32\)"),
        (np.zeros(256 * 32, np.float32), r"have the shape \(8192,\)"),
    ],
)
def test_a_wrong_array_is_refused(model: Model, values: Any, message: str) -> None:
    before = model.get("wte.weight")
    with pytest.raises(GptcError, match=message):
        model.set("wte.weight", values)
    assert np.array_equal(model.get("wte.weight"), before)


def test_unknown_names_are_refused(model: Model) -> None:
    with pytest.raises(GptcError, match=r"unknown parameter 'wte'; .* wte.weight"):
        model.get("wte")
    with pytest.raises(GptcError, match="unknown tensor 'velocity'"):
        model.read("wte.weight", "velocity")


@pytest.mark.parametrize("family", ["gpt2", "llama", "byte"])
def test_training_learns_a_batch_by_heart(config: Config, family: str) -> None:
    x, y = batch()
    with Model.create(config(family), threads=1, max_batch=2, max_seq=12) as model:
        before = model.loss(x, y)
        assert before == pytest.approx(np.log(256), abs=0.2)
        first = model.train_step(x, y, lr=1e-2)
        assert first.loss == pytest.approx(before, abs=1e-5)
        assert first.grad_norm > 0
        for _ in range(30):
            model.train_step(x, y, lr=1e-2)
        assert model.step == 31
        assert model.loss(x, y) < before / 3


def test_loss_losses_and_logits_agree(model: Model) -> None:
    x, y = batch()
    y = y.copy()
    y[0, :3] = -1
    logits = model.logits(x).astype(np.float64)
    assert logits.shape == (2, 12, 256)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logp, np.maximum(y, 0)[..., None], -1)[..., 0]
    counted = y >= 0
    losses = model.losses(x, y)
    assert losses.shape == x.shape
    assert np.allclose(losses[counted], expected[counted], atol=1e-5)
    assert not losses[~counted].any()
    assert model.loss(x, y) == pytest.approx(expected[counted].mean(), abs=1e-5)


def test_micro_batches_average_to_the_whole_batch(config: Config) -> None:
    x, y = batch(B=4)
    options = {"threads": 1, "max_batch": 4, "max_seq": 12, "seed": 5}
    whole, parts = Model.create(config(), **options), Model.create(config(), **options)
    loss = whole.loss(x, y)
    a = whole.train_step(x, y, lr=1e-3)
    assert a.loss == pytest.approx(loss, rel=1e-6)
    b = parts.train_step([x[:2], x[2:]], [y[:2], y[2:]], lr=1e-3)
    assert b.loss == pytest.approx(a.loss, rel=1e-5)
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
    # Compare the moments: the update divides by tiny numbers.
    name = "h.1.mlp.fc.weight"
    first = whole.read(name, "moment1")
    assert np.allclose(first, parts.read(name, "moment1"), atol=1e-3 * np.abs(first).max())


def test_backward_adds_and_update_starts_afresh(model: Model) -> None:
    x, y = batch()
    model.backward(x, y)
    once = model.gradients()
    model.backward(x, y)
    for name, values in model.gradients().items():
        assert np.allclose(values, 2 * once[name], atol=1e-6), name
    model.zero_gradients()
    assert not any(values.any() for values in model.gradients().values())
    model.backward(x, y, scale=0.5)
    assert np.allclose(model.gradients()["wte.weight"], 0.5 * once["wte.weight"], atol=1e-7)
    norm = np.sqrt(sum(float((v.astype(np.float64) ** 2).sum()) for v in once.values()))
    assert model.update(AdamW(lr=0.0)) == pytest.approx(norm / 2, rel=1e-4)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, np.uint8])
def test_tokens_of_any_integer_type_mean_the_same(model: Model, kind: Any) -> None:
    x, y = batch()
    assert model.loss(x.astype(kind), y.astype(kind)) == model.loss(x, y)
    assert model.loss(x.tolist(), np.asfortranarray(y)) == model.loss(x, y)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 12)), "inputs are float64; they must be whole numbers"),
        (np.zeros(12, np.int32), r"inputs have the shape \(12,\); it must be \(B, T\)"),
        (np.zeros((2, 0), np.int32), r"have the shape \(2, 0\)"),
        (np.zeros(0), r"have the shape \(0,\); it must be \(B, T\), with one token at least"),
        (np.full((2, 12), 2**40), "inputs hold 1099511627776"),
        (np.full((2, 12), 256, np.int32), "token 0 is 256; the vocabulary is 0 to 255"),
        (np.full((2, 12), -1, np.int32), "token 0 is -1"),
        (np.zeros((5, 12), np.int32), "batch size 5; the model was created for 1 to 4"),
        (np.zeros((2, 17), np.int32), "sequence length 17; the model was created for 1 to 16"),
    ],
)
def test_wrong_tokens_are_refused(model: Model, x: Any, message: str) -> None:
    y = np.zeros(x.shape, np.int32)
    with pytest.raises(GptcError, match=message):
        model.loss(x, y)


def test_documents_of_a_sequence_do_not_see_each_other(config: Config) -> None:
    x, y = batch(2, 16)
    cut = np.array([5, 11])
    positions = np.arange(16) - cut[:, None] * (np.arange(16) >= cut[:, None])
    with Model.create(config(), threads=1, max_batch=2) as model:
        whole = model.losses(x, y)
        apart = model.losses(x, y, positions)
        assert np.array_equal(model.losses(x, y), whole)  # they are those of one call
        for row, at in enumerate(cut):
            assert np.allclose(apart[row, :at], whole[row, :at], atol=1e-6)
            alone = model.losses(x[row : row + 1, at:], y[row : row + 1, at:])
            assert np.allclose(apart[row, at:], alone, atol=1e-5)
            assert np.abs(apart[row, at:] - whole[row, at:]).max() > 1e-3
        assert model.loss(x, y, positions) == pytest.approx(float(apart.mean()), rel=1e-6)
        assert model.backward(x, y, positions=positions) == pytest.approx(apart.mean(), rel=1e-6)
        model.zero_gradients()
        step = model.train_step([x, x], [y, y], positions=[positions] * 2, lr=0.0)
        assert step.loss == pytest.approx(float(apart.mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.zeros((1, 16), int), r"positions have the shape \(1, 16\), inputs \(2, 16\)"),
        (
            np.ones((2, 16), int),
            "position 0 of sequence 0 is 1; it must be 0 where a document begins",
        ),
        (np.tile([0, 2], (2, 8)), "position 1 of sequence 0 is 2"),
        (np.zeros((2, 16)), "positions are float64; they must be whole numbers"),
    ],
)
def test_wrong_positions_are_refused(model: Model, positions: Any, message: str) -> None:
    x, y = batch(2, 16)
    before = model.loss(x, y)
    with pytest.raises(GptcError, match=message):
        model.loss(x, y, positions)
    assert model.loss(x, y) == before


def test_unequal_batches_are_refused(model: Model) -> None:
    x, y = batch()
    with pytest.raises(GptcError, match=r"inputs have the shape \(2, 12\), targets \(2, 11\)"):
        model.backward(x, y[:, :-1])
    with pytest.raises(GptcError, match="2 micro-batches of inputs, 1 of targets"):
        model.train_step([x, x], [y], lr=1e-3)
    with pytest.raises(GptcError, match="empty list; pass at least one micro-batch"):
        model.train_step([], [], lr=1e-3)


def test_training_needs_a_training_model(config: Config) -> None:
    x, y = batch()
    with Model.create(config(), training=False, threads=1) as model:
        with pytest.raises(EngineError, match="created without training"):
            model.train_step(x, y, lr=1e-3)
        with pytest.raises(EngineError, match="created without training"):
            model.gradients()


# ---- lifetimes ----


def test_closing_twice_is_harmless_and_use_afterwards_an_error(config: Config) -> None:
    model = Model.create(config(), threads=1, max_batch=1)
    session = model.session()
    model.close()
    model.close()
    session.close()
    assert "closed" in repr(model)
    for use in (
        lambda: model.get("wte.weight"),
        lambda: model.step,
        lambda: model.session(),
        lambda: session.decode([1]),
        lambda: session.length(),
    ):
        with pytest.raises(GptcError, match="is closed"):
            use()


def test_a_session_keeps_its_model_alive(config: Config) -> None:
    session = Model.create(config(), threads=1, max_batch=0, training=False).session()
    gc.collect()
    assert session.decode([1, 2]).shape == (256,)


def test_models_that_are_forgotten_give_their_memory_back(config: Config) -> None:
    from gptc.files.memory import resident_bytes

    def use() -> None:
        model = Model.create(config(n_embd=128), threads=1, max_batch=4)
        model.train_step(*batch(), lr=1e-3)
        model.session().decode([1])

    use()
    gc.collect()
    before = resident_bytes()
    for _ in range(20):
        use()
    gc.collect()
    size = plan_for(config(n_embd=128), Options(threads=1, max_batch=4)).total_bytes
    assert resident_bytes() - before < 5 * size


# ---- options and plans ----


def test_a_plan_is_what_a_model_gets(config: Config) -> None:
    options = Options(device="cpu", dtype="fp32", threads=1, max_batch=4, max_seq=16)
    plan = plan_for(config("gpt2"), options)
    with Model.create(config("gpt2"), device="cpu", threads=1, max_batch=4, max_seq=16) as model:
        assert model.plan == plan
        assert (model.device, model.dtype, model.threads) == ("cpu", "fp32", 1)
    assert plan.total_bytes == (
        plan.param_bytes
        + plan.grad_bytes
        + plan.optimizer_bytes
        + plan.activation_bytes
        + plan.workspace_bytes
    )
    assert plan.train_flops_per_token == pytest.approx(3 * plan.forward_flops_per_token)
    assert plan_for(config("gpt2"), Options(training=False)).grad_bytes == 0


def test_wrong_options_are_refused(config: Config) -> None:
    with pytest.raises(UsageError, match="'gpu' is unknown; it must be one of auto, cpu, cuda"):
        Model.create(config(), device="gpu")
    with pytest.raises(EngineError, match="dropout is 1"):
        Model.create(config(), dropout=1.0)
    with pytest.raises(GptcError, match="seed is -1"):
        Model.create(config(), seed=-1)
    with pytest.raises(UsageError, match="does not divide"):
        Model.create(config(n_head=3))


def test_a_session_that_does_not_fit(writer: Model) -> None:
    with pytest.raises(EngineError, match=r"needs .* GB, .* GB more than are free; take fewer"):
        writer.session(5_000_000)


def test_auto_falls_back_to_what_works(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = library.Gpu("there is none", "", "", 0, "", "13.0", "", 0, 0)
    monkeypatch.setattr(library, "gpu", lambda: gpu)
    fast = "bf16" if library.load().lib.gpt_cpu_has_bf16() else "fp32"
    assert Options().resolved() == Options(device="cpu", dtype="fp32")
    assert Options(dtype="auto").resolved() == Options(device="cpu", dtype=fast)
    reading = Options(dtype="auto", training=False)
    for level in ("portable", "avx2", "avx512"):
        monkeypatch.setattr(library, "cpu_level", lambda level=level: level)
        wanted = "bf16" if level == "avx2" else fast
        assert reading.resolved() == replace(reading, device="cpu", dtype=wanted)
        assert Options(dtype="auto").resolved().dtype == fast
    assert Options(dtype="bf16").resolved() == Options(device="cpu", dtype="bf16")
    with pytest.raises(EngineError, match="there is none"):
        Options("cuda").resolved()
    monkeypatch.setattr(library, "gpu", lambda: gpu._replace(problem=None))
    assert Options(dtype="auto").resolved() == Options(device="cuda", dtype="bf16")
    assert replace(reading).resolved() == replace(reading, device="cuda", dtype="bf16")
    assert Options().resolved() == Options(device="cuda", dtype="fp32")
    assert Options("cpu", "auto").resolved() == Options(device="cpu", dtype=fast)
    with pytest.raises(UsageError, match="optimizer_dtype 'int8' is for a CPU; use device 'cpu'"):
        Options(optimizer_dtype="int8").resolved()
    assert Options("cpu", optimizer_dtype="int8").resolved().device == "cpu"


def test_save_and_load(config: Config, tmp_path: Path) -> None:
    x, y = batch()
    with Model.create(config("llama"), threads=1, max_batch=2, max_seq=12, seed=9) as model:
        expected = model.loss(x, y)
        model.save(tmp_path / "saved")
        with pytest.raises(GptcError, match="exists already"):
            model.save(tmp_path / "saved")
    with Model.load(tmp_path / "saved", threads=1, max_batch=2) as again:
        assert again.config == config("llama")
        assert again.loss(x, y) == pytest.approx(expected, abs=1e-6)


def test_the_readme_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["result"].loss < 1
    assert found["logits"].shape == (8, 128, 256)
    assert Model.load("my-model").config.block_size == 128
