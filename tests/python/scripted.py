"""A sampler that writes given bytes, whatever the model computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from gptc.generation import batch
from gptc.generation.sampling import Draw, draw_tokens


class Script:
    """Replaces the sampler by one that repeats `text` after a prompt of `n_prompt` tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: bytes, n_prompt: int) -> None:
        def scripted(*step: Any) -> list[tuple[int, None]]:
            draw_tokens(*step)
            draws: Sequence[Draw] = step[-1]
            return [(text[(draw.position - n_prompt) % len(text)], None) for draw in draws]

        monkeypatch.setattr(batch, "draw_tokens", scripted)
