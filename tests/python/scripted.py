"""A sampler that writes given bytes, whatever the model computes."""

from __future__ import annotations

from typing import Any

import pytest

from gptc.generation import request as generation_module
from gptc.generation.options import Sampling


class Script:
    """Replaces the sampler by one that repeats `text` after a prompt of `n_prompt` tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: bytes, n_prompt: int) -> None:
        def token(
            logits: Any, sampling: Sampling, position: int, vocab_size: int, history: Any
        ) -> int:
            return text[(position - n_prompt) % len(text)]

        monkeypatch.setattr(generation_module, "sample_token", token)
