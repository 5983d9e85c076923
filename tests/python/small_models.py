"""Small models and checkpoints with random weights, batches for them, and a softmax in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gptc import Lora, Model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.engine.config import GPTConfig
from gptc.engine.lora import targets_named
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.registry import make_tokenizer

_RNG = np.random.default_rng(5)
# One of each family, with its special features: GPT-2's Conv1D and biases, Llama's grouped
# queries and untied head, and a shape that no Hugging Face class describes.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32},
    "llama": {
        "preset": "llama-15m",
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
        "n_ff": 40,
        "tied": False,
    },
    "byte": {"preset": "byte", "n_layer": 2, "n_head": 2, "n_embd": 32},
}


def make_config(family: str = "byte", **changes: Any) -> GPTConfig:
    """A small shape of a family, with a vocabulary of bytes and a context of 48."""
    shape = {"vocab_size": 256, "block_size": 48, **SHAPES[family], **changes}
    return GPTConfig.preset(shape.pop("preset"), **shape)


def varied(config: GPTConfig, seed: int = 3, dtype: str = "fp32", kv_dtype: str = "auto") -> Model:
    """A model whose text is varied: weights larger than at the start of training."""
    model = Model.create(
        config, dtype=dtype, threads=1, training=False, max_batch=1, seed=2, kv_dtype=kv_dtype
    )
    rng = np.random.default_rng(seed)
    for name, shape, _ in config.parameters():
        model.set(name, rng.normal(0, 0.3, shape).astype(np.float32))
    return model


def make_model(config: GPTConfig, **options: Any) -> Model:
    """A model whose norms and biases differ from their initial values."""
    model = Model.create(config, **{"threads": 1, "max_batch": 2, "max_seq": 12, **options})
    rng = np.random.default_rng(7)
    for name, shape, decay in config.parameters():
        if not decay:
            model.set(name, rng.normal(1, 0.3, shape).astype(np.float32))
    return model


def take_steps(model: Model, steps: int = 3) -> None:
    """Trains a model of make_model on one batch."""
    x = np.random.default_rng(0).integers(0, 256, (2, 12))
    for _ in range(steps):
        model.train_step(x, np.roll(x, -1, 1), lr=1e-3)


def make_checkpoint(
    config: GPTConfig, tokenizer: str = "bytes", folder: Path | None = None
) -> ModelFile:
    """A checkpoint of random weights; norms and biases differ from their initial values."""
    assert folder is not None
    rng = np.random.default_rng(11)
    with Model.create(config, threads=1) as model:
        for name, shape, decay in config.parameters():
            values = rng.normal(0, 0.2, shape) if decay else rng.normal(1, 0.3, shape)
            model.set(name, values.astype(np.float32))
        model.save(folder, make_tokenizer(tokenizer) if tokenizer else None)
    return Checkpoint(folder)


def make_adapter(folder: Path, base: Path, targets: str, rank: int, **changes: Any) -> Path:
    """An adapter with random numbers."""
    config = open_checkpoint(base).config
    lora = Lora(rank, 2.5 * rank, targets_named(config, targets), **changes)
    rng = np.random.default_rng(rank)
    with Model.load(base, lora=lora, threads=1) as model:
        for name, shape, _ in model.trained:
            model.set(name, rng.normal(0, 0.4 / np.sqrt(shape[-1]), shape).astype(np.float32))
        model.save_adapter(folder, base)
    return folder


def random_values(*shape: int) -> np.ndarray[Any, Any]:
    """Normal float32 numbers, different at every call."""
    return _RNG.normal(0, 0.3, shape).astype(np.float32)


def softmax(logits: Any) -> Any:
    """Probabilities in float64."""
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return e / e.sum()


def batch(B: int = 2, T: int = 12, seed: int = 0) -> tuple[Any, Any]:
    """Random inputs and targets (B, T)."""
    tokens = np.random.default_rng(seed).integers(0, 256, (B, T + 1), dtype=np.int32)
    return tokens[:, :-1], tokens[:, 1:]
