"""The fixture `run`: a run folder with two checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptc.checkpoint.names import checkpoint_name
from gptc.checkpoint.writer import save
from gptc.engine.config import GPTConfig
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_model, take_steps

Config = Callable[..., GPTConfig]


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Path:
    """A run folder with two checkpoints of a trained model."""
    with make_model(config()) as model:
        for step in (3, 6):
            take_steps(model)
            path = tmp_path / "run" / checkpoint_name(step)
            trainer = {"step": step}
            save(path, model, tokenizer=make_tokenizer("bytes"), trainer=trainer)
    return tmp_path / "run"
