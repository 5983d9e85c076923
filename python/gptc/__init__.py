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

from gptc._version import __version__
from gptc.errors import EngineError, GptcError, UsageError

if TYPE_CHECKING:
    from gptc.checkpoint.facade import Model
    from gptc.checkpoint.find import load_tokenizer
    from gptc.data.preparation import resolve_dataset
    from gptc.engine.config import GPTConfig
    from gptc.engine.model import StepResult
    from gptc.engine.optim import AdamW, Muon
    from gptc.engine.options import Options, Plan
    from gptc.engine.session import Session
    from gptc.generation.chat import chat
    from gptc.generation.decoder import Completion, generate, stream
    from gptc.generation.embedding import embed
    from gptc.tokenizer.base import Tokenizer
    from gptc.tokenizer.chat import chat_prompt
    from gptc.training.facade import train

# Imported when first used, so that `gptc --help` does not wait for NumPy.
_LAZY = {
    "AdamW": "engine.optim",
    "Completion": "generation.decoder",
    "GPTConfig": "engine.config",
    "Lora": "engine.lora",
    "Model": "checkpoint.facade",
    "Muon": "engine.optim",
    "Options": "engine.options",
    "Plan": "engine.options",
    "Session": "engine.session",
    "StepResult": "engine.model",
    "Tokenizer": "tokenizer.base",
    "chat": "generation.chat",
    "chat_prompt": "tokenizer.chat",
    "embed": "generation.embedding",
    "generate": "generation.decoder",
    "load_tokenizer": "checkpoint.find",
    "resolve_dataset": "data.preparation",
    "stream": "generation.decoder",
    "train": "training.facade",
}

__all__ = [
    "AdamW",
    "Completion",
    "EngineError",
    "GPTConfig",
    "GptcError",
    "Lora",
    "Model",
    "Muon",
    "Options",
    "Plan",
    "Session",
    "StepResult",
    "Tokenizer",
    "UsageError",
    "__version__",
    "chat",
    "chat_prompt",
    "embed",
    "generate",
    "load_tokenizer",
    "resolve_dataset",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gptc' has no attribute {name!r}")
    value = getattr(import_module(f"gptc.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
