"""The rotary frequencies of a GGUF file are checked before memory is taken for them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.errors import GptcError
from gptc.formats import gguf, gguf_rope, gguf_write
from gptc.formats.registry import open_model
from small_models import make_checkpoint, make_config


def write(path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], factor: float) -> Path:
    """A Llama with divisors of its frequencies, other metadata, and one divisor replaced."""
    values: dict[str, Any] = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 32}
    values |= {"rope_low_freq": 1.0, "rope_high_freq": 4.0}
    source = make_checkpoint(make_config("llama", **values), folder=path.with_name("source"))
    metadata, divisors = gguf_write._metadata, gguf_rope.divisors
    with monkeypatch.context() as patch:
        patch.setattr(gguf_write, "_metadata", lambda *given: {**metadata(*given), **keys})

        def changed(*given: Any, **named: Any) -> Any:
            found = divisors(*given, **named)
            found[1] = factor or found[1]
            return found

        patch.setattr(gguf_rope, "divisors", changed)
        path.write_bytes(b"".join(gguf.model_chunks(source, None)))
    return path


@pytest.mark.parametrize("bits", [20, 24, 28, 31])
def test_a_claimed_width_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    width = 1 << bits
    keys = {"llama.embedding_length": width, "llama.rope.dimension_count": width // 4}
    file = write(tmp_path / "m.gguf", monkeypatch, keys, 0)
    tracemalloc.start()
    try:
        with pytest.raises(GptcError, match=r"rope_freqs\.weight has the shape \(4,\), and a head"):
            open_model(file)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf, -1.0])
def test_divisors_are_finite_and_positive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    with pytest.raises(GptcError, match="have to be finite and positive"):
        open_model(write(tmp_path / "m.gguf", monkeypatch, {}, factor))
