"""Numbers are rounded to GGUF's blocks with little error, and read back as they were meant.

The class of fault: a bit packed at another place, a search that keeps a worse scale, a scale or
minimum that overflows, a tensor that gets another type than in llama.cpp's files.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gptc.convert.export_model import export_model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats import gguf, layout
from gptc.formats.blocks import Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, Blocks
from gptc.formats.families import of
from gptc.formats.gguf_types import MIXES, codec_of
from gptc.formats.numbers import Bytes, encoded
from small_models import make_checkpoint, make_config

KINDS = [Q8_0, Q4_0, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K]
# Numbers that share a scale, the steps between the ends of their range, and whether those are the
# least and the largest number, or the largest magnitude on both sides.
STEPS = {
    "Q8_0": (32, 254, False),
    "Q4_0": (32, 15, False),
    "Q5_0": (32, 31, False),
    "Q5_1": (32, 31, True),
    "Q4_K": (32, 15, True),
    "Q5_K": (32, 31, True),
    "Q6_K": (16, 63, False),
}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def stored(kind: Blocks, values: np.ndarray) -> Bytes:
    return np.frombuffer(encoded(kind, values, "w"), np.uint8)


def there_and_back(kind: Blocks, values: np.ndarray) -> np.ndarray:
    return kind.decode(stored(kind, values), values.shape)


@each_kind
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (3, 512), (7, 768), (259, 256)])
def test_errors_are_those_of_steps_of_a_range(kind: Blocks, rows: int, columns: int) -> None:
    """A step has errors of 1 / sqrt(12) of it; scales and minima are rounded too."""
    rng = np.random.default_rng(columns + rows)
    values = (rng.standard_normal((rows, columns)) * rng.uniform(0.01, 2)).astype(np.float32)
    values[:, ::5] += np.float32(0.02)
    n, steps, with_minima = STEPS[kind.name]
    groups = values.reshape(-1, n)
    span = np.ptp(groups, axis=1) if with_minima else 2 * np.abs(groups).max(axis=1)
    expected = np.sqrt(np.mean(np.square(span / steps)) / 12)
    off = there_and_back(kind, values) - values
    assert np.sqrt(np.mean(np.square(off))) < 1.1 * expected
    assert np.abs(off).max() < 2 * span.max() / steps


@pytest.mark.parametrize("kind", [Q4_K, Q5_K, Q6_K], ids=lambda kind: kind.name)
def test_a_search_is_better_than_the_ends_of_the_range(kind: Blocks) -> None:
    """Normal numbers have few near the ends. llama.cpp's own blocks: 7.1, 3.6 and 1.77 %."""
    values = np.random.default_rng(7).standard_normal((64, 1024)).astype(np.float32)
    off = np.linalg.norm(there_and_back(kind, values) - values) / np.linalg.norm(values)
    assert off < {"Q4_K": 0.072, "Q5_K": 0.037, "Q6_K": 0.018}[kind.name]


@each_kind
def test_blocks_are_read_as_by_the_package_gguf(kind: Blocks) -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    values = np.random.default_rng(3).standard_t(3, (5, 768)).astype(np.float32)
    raw = stored(kind, values)
    rows = raw.reshape(-1, kind.block_bytes)
    theirs = quants.dequantize(rows, constants.GGMLQuantizationType(kind.number))
    assert np.array_equal(theirs.reshape(values.shape), kind.decode(raw, values.shape))


@each_kind
def test_zeros_and_rows_of_one_number(kind: Blocks) -> None:
    values = np.zeros((5, 256), np.float32)
    values[1:] = np.float32([[0.5], [-0.5], [3e-39], [-1e-30]])
    back = there_and_back(kind, values)
    assert not back[0].any()
    assert np.abs(back[1:3] - values[1:3]).max() < 0.5 / 64
    assert np.abs(back[3:]).max() < 1e-6  # float16 has no such scale
    # A group of zeros, or of one number, among others of the same block.
    mixed = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    mixed[0, 32:64], mixed[0, 96:128] = 0, -1
    back = there_and_back(kind, mixed)
    assert np.abs(back[0, 32:64]).max() < 0.02
    assert np.abs(back[0, 96:128] + 1).max() < 0.04


@each_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_refused(kind: Blocks, bad: float) -> None:
    values = np.ones((3, 256), np.float32)
    values[1, 70] = bad
    with pytest.raises(GptcError, match=rf"^w holds (nan|-?inf), which {kind.name} "):
        encoded(kind, values, "w")


@each_kind
def test_the_largest_numbers_have_finite_scales(kind: Blocks) -> None:
    rng = np.random.default_rng(2)
    most = 0.999 * kind.overflow
    hard = [rng.uniform(-1, 1, 256), rng.uniform(0.9, 1, 256), -rng.uniform(0.9, 1, 256)]
    hard += [rng.choice([-1, 1], 256), np.where(np.arange(256) == 40, 1, 0.0), -np.ones(256)]
    values = (most * np.array(hard) / np.abs(hard).max()).astype(np.float32)
    back = there_and_back(kind, values)  # whose scales are checked
    assert np.isfinite(back).all()
    assert np.linalg.norm(back - values) < 0.1 * np.linalg.norm(values)
    with pytest.raises(GptcError, match="cannot hold"):
        encoded(kind, np.full((1, 256), kind.overflow * 1.001, np.float32), "w")


# ---- the types of tensors ----


def types(config: GPTConfig, dtype: str) -> dict[str, str]:
    family = of(config)
    assert family is not None
    parts = layout.parts(config, gguf.naming(family))
    return {part.name: codec_of(part, MIXES[dtype], config).name for part in parts}


def test_types_are_those_of_llama_cpp() -> None:
    """SmolLM2-135M's, whose widths are no multiple of 256 but in its down projections."""
    shape = {"n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "n_ff": 1536}
    config = make_config("llama", vocab_size=49152, tied=True, **shape)
    counts = {dtype: Counter(types(config, dtype).values()) for dtype in MIXES}
    assert counts["q4_k_m"] == {"F32": 61, "Q5_0": 166, "Q8_0": 15, "Q4_K": 16, "Q6_K": 14}
    assert counts["q5_k_m"] == {"F32": 61, "Q5_1": 166, "Q8_0": 15, "Q5_K": 16, "Q6_K": 14}
    assert counts["q6_k"] == {"F32": 61, "Q8_0": 181, "Q6_K": 30}
    assert counts["q8_0"] == {"F32": 61, "Q8_0": 211}
    assert counts["q4_0"] == {"F32": 61, "Q4_0": 210, "Q8_0": 1}


def test_heads_and_joined_projections_have_finer_types() -> None:
    untied = types(make_config("llama", n_embd=256, n_ff=512), "q4_k_m")
    assert (untied["output.weight"], untied["token_embd.weight"]) == ("Q6_K", "Q4_K")
    assert untied["blk.0.attn_q.weight"] == untied["blk.0.ffn_up.weight"] == "Q4_K"
    gpt2 = types(make_config("gpt2", n_embd=256), "q4_k_m")
    assert gpt2["token_embd.weight"] == "Q6_K"
    assert gpt2["blk.0.attn_qkv.weight"] == "Q5_K"
    assert {gpt2[name] for name in ("position_embd.weight", "blk.1.attn_qkv.bias")} == {"F32"}
    odd = types(make_config("gpt2", n_embd=40), "q6_k")
    assert set(odd.values()) == {"F32", "Q8_0"}  # 40 columns, and 160 of the down projection
    assert odd["blk.0.ffn_down.weight"] == "Q8_0"


# ---- exports ----


@pytest.mark.parametrize("dtype", ["q4_k_m", "q5_k_m", "q6_k", "q8_0", "q4_0"])
def test_a_row_at_another_place_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    source = make_checkpoint(make_config("llama", n_embd=256, n_ff=512), folder=tmp_path / "m")
    export_model(source, "gguf", tmp_path / "good.gguf", dtype=dtype)
    true = layout.export_tensor

    def swapped(part: layout.Part, parameter: np.ndarray) -> np.ndarray:
        values = true(part, parameter).copy()
        if part.name == "blk.1.ffn_up.weight":
            values[[3, 5]] = values[[5, 3]]
        return values

    monkeypatch.setattr(layout, "export_tensor", swapped)
    with pytest.raises(GptcError, match=r"row 515 of h\.1\.mlp\.fc\.weight is 1\d\d% off"):
        export_model(source, "gguf", tmp_path / "bad.gguf", dtype=dtype)
    assert not (tmp_path / "bad.gguf").exists()
