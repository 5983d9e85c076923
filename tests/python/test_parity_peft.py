"""Adapters agree with peft's: their gradients, and their files in both directions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.data.loader import Rows
from gptc.engine.config import GPTConfig
from gptc.engine.lora import Lora, targets_named
from gptc.formats import hf
from gptc.formats import peft as ours
from gptc.training.preference import backward, log_probabilities
from gptc.training.reference import without_adapters
from small_models import batch, make_checkpoint, make_config

Array = npt.NDArray[Any]

HAVE_PEFT = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not HAVE_PEFT, reason="needs torch, transformers and peft"),
]
TOLERANCE = 1e-4  # norm-wise
CONFIGS = {
    "gpt2": make_config("gpt2"),
    "llama": make_config("llama"),
    "qwen3": make_config("llama", head_dim=12, qk_norm=True, tied=True),
}
TARGETS = {"all": "all", "some": "qkv,mlp_proj"}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> GPTConfig:
    """A small model of a family."""
    assert hf.model_type(CONFIGS[request.param]) == request.param
    return CONFIGS[request.param]


@pytest.fixture
def base(config: GPTConfig, tmp_path: Path) -> Path:
    """Its checkpoint."""
    return make_checkpoint(config, folder=tmp_path / "base").path


def error(got: Array, want: Array) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def theirs(base: Path) -> Any:
    """The base model in transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def logits_of(model: Any, x: Array) -> Array:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor(x.astype(np.int64))).logits.numpy())


def randomized(model: Model) -> None:
    """Gives adapters numbers that matter."""
    rng = np.random.default_rng(3)
    for name, shape, _ in model.trained:
        spread = 0.5 / np.sqrt(shape[1]) if len(shape) == 2 else 0.1
        mean = model.get(name) if len(shape) == 1 else 0  # lengths, of the base
        model.set(name, (mean + rng.normal(0, spread, shape)).astype(np.float32))


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("targets", TARGETS)
def test_our_adapters_load_in_peft_with_the_same_logits_and_gradients(
    config: GPTConfig, base: Path, tmp_path: Path, targets: str, kind: str
) -> None:
    import torch
    from peft import PeftModel

    dora = kind == "dora"
    scaled = "plain" if dora else kind
    lora = Lora(5, 7.0, targets_named(config, TARGETS[targets]), kind=scaled, dora=dora)
    x, y = batch()
    with Model.load(base, lora=lora, training=True, max_batch=2, dtype="fp32", threads=2) as model:
        model.init_adapters(0)
        randomized(model)
        model.save_adapter(tmp_path / "adapter", base)
        got, loss = model.logits(x), model.backward(x, y)
        grads = model.gradients()
    peft = PeftModel.from_pretrained(theirs(base), str(tmp_path / "adapter"), is_trainable=True)
    peft.eval()
    assert error(got, logits_of(peft, x)) < TOLERANCE
    logits = peft(torch.tensor(x.astype(np.int64))).logits
    wanted_loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(y.astype(np.int64)).flatten()
    )
    wanted_loss.backward()
    assert loss == pytest.approx(float(wanted_loss), rel=TOLERANCE)
    found = {
        tensor_name(name): parameter.grad.numpy()
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    read = ours.tensor_reader(config, lora, grads.__getitem__)
    assert found.keys() == ours.tensor_shapes(config, lora).keys()
    for name, want in found.items():
        assert error(read(name), want) < TOLERANCE, name


def tensor_name(name: str) -> str:
    """A parameter of peft's model as its file names it."""
    name = name.replace(".default", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


@pytest.mark.parametrize(("rslora", "dora"), [(False, False), (True, False), (False, True)])
def test_their_adapters_load_here_with_the_same_logits(
    config: GPTConfig, base: Path, tmp_path: Path, rslora: bool, dora: bool
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    names = ["c_attn", "c_fc"] if config.family == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    settings = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=names,
        use_rslora=rslora,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(theirs(base), settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.randn(parameter.shape)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    x, _ = batch(B=1)
    file = open_checkpoint(tmp_path / "adapter")
    assert file.lora is not None
    assert file.lora.kind == ("rslora" if rslora else "plain")
    assert file.lora.dora == dora
    with Model.load(tmp_path / "adapter", dtype="fp32") as loaded:
        assert error(loaded.logits(x), logits_of(model, x)) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_of_dpo_is_that_of_trls_formula(family: str, tmp_path: Path) -> None:
    """Loss, rewards and gradients; the formula is that of trl (loss_type "sigmoid")."""
    import torch
    from peft import PeftModel

    config, beta = CONFIGS[family], 0.1
    base = make_checkpoint(config, folder=tmp_path / "base").path
    lora = Lora(5, 7.0, targets_named(config, "all"))
    x, y = (np.concatenate([part, part[::-1]]) for part in batch())  # two pairs
    y[2:] = (y[2:] + 1) % config.vocab_size  # rejected answers
    y[:, :5] = -1  # the prompt
    y[1, -3:] = y[2, -6:] = -1  # padding
    rows = Rows(x, y)
    with Model.load(base, lora=lora, training=True, max_batch=4, dtype="fp32", threads=2) as model:
        randomized(model)
        model.save_adapter(tmp_path / "adapter", base)
        with without_adapters(model):
            reference = log_probabilities(model.losses(x, y, training=True))
        found = backward(model, rows, reference, beta, 2)
        grads = model.gradients()
    peft = PeftModel.from_pretrained(theirs(base), str(tmp_path / "adapter"), is_trainable=True)
    peft.eval()
    labels = torch.tensor(y.astype(np.int64))

    def logps() -> Any:
        each = peft(torch.tensor(x.astype(np.int64))).logits.log_softmax(-1)
        picked = each.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
        return (picked * (labels >= 0)).sum(1)

    with torch.no_grad(), peft.disable_adapter():
        ref = logps()
    ratios = (logps() - ref).chunk(2)
    loss = -torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1])).mean()
    loss.backward()
    rewards = np.stack([beta * part.detach().numpy() for part in ratios], 1)
    assert error(reference.T.ravel(), ref.numpy()) < TOLERANCE
    assert found.losses.mean() == pytest.approx(float(loss.detach()), rel=TOLERANCE)
    assert error(found.rewards, rewards) < TOLERANCE
    read = ours.tensor_reader(config, lora, grads.__getitem__)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            name = name.replace(".default", "")
            assert error(read(name), parameter.grad.numpy()) < TOLERANCE, name
