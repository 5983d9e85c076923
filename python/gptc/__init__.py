"""gptc: train, fine-tune and run small GPTs without PyTorch.

import gptc

model = gptc.Model.load("runs/tiny-stories")
tokenizer = gptc.load_tokenizer("runs/tiny-stories")
for piece in gptc.stream(model, tokenizer, "Once upon a time"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptc.errors import EngineError, GptcError, UsageError

if TYPE_CHECKING:
    from gptc.checkpoint import load_tokenizer
    from gptc.config import GPTConfig
    from gptc.data import resolve_dataset
    from gptc.generation import generate, stream
    from gptc.model import AdamW, Model, Options, Plan, Session, StepResult
    from gptc.tokenizer import Tokenizer

__version__ = "0.1.0"

# Imported when first used, so that `gptc --help` does not wait for NumPy.
_LAZY = {
    "AdamW": "model",
    "GPTConfig": "config",
    "Model": "model",
    "Options": "model",
    "Plan": "model",
    "Session": "model",
    "StepResult": "model",
    "Tokenizer": "tokenizer",
    "generate": "generation",
    "load_tokenizer": "checkpoint",
    "resolve_dataset": "data",
    "stream": "generation",
}

__all__ = [
    "AdamW",
    "EngineError",
    "GPTConfig",
    "GptcError",
    "Model",
    "Options",
    "Plan",
    "Session",
    "StepResult",
    "Tokenizer",
    "UsageError",
    "__version__",
    "generate",
    "load_tokenizer",
    "resolve_dataset",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gptc' has no attribute {name!r}")
    value = getattr(import_module(f"gptc.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
