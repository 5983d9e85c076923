"""Every format gives back the model that was exported, bit for bit if the dtype allows it.

The class: a model that a format cannot hold and is written nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.formats.model_file import ModelFile
from gptc.formats.registry import open_model
from small_models import make_checkpoint, make_config

Config = Callable[..., GPTConfig]
Gptc = Callable[..., Any]
# Formats, their dtypes, and the family that each holds.
EXPORTS = [
    ("hf", "fp32", "gpt2", {}),
    ("hf", "bf16", "llama", {}),
    ("hf", "fp16", "llama", {}),
    ("hf", "fp32", "byte", {}),
    ("gguf", "fp32", "gpt2", {}),
    ("gguf", "fp32", "llama", {}),
    ("gguf", "bf16", "llama", {}),
    ("gguf", "bf16", "gpt2", {}),
    ("gguf", "fp16", "gpt2", {}),
    ("gguf", "q8_0", "llama", {}),
    ("gguf", "q4_0", "gpt2", {}),
    ("gguf", "q4_k_m", "llama", {}),
    ("gguf", "q5_k_m", "gpt2", {}),
    ("gguf", "q6_k", "llama", {}),
    ("llm.c", "fp32", "gpt2", {}),
    ("llm.c", "bf16", "gpt2", {}),
    ("llama2.c", "fp32", "llama", {"version": 0}),
    ("llama2.c", "fp32", "llama", {"version": 1}),
    ("llama2.c", "int8", "llama", {}),
    ("heimerl", "fp32", "byte", {}),
    ("qgpt", "int8", "byte", {}),
]


def rounded(source: ModelFile, dtype: str) -> dict[str, np.ndarray[Any, Any]]:
    """The parameters, rounded to the dtype of a file."""
    out = {}
    for name, _, _ in source.config.parameters():
        values = source.read(name)
        if dtype == "fp16":
            values = values.astype(np.float16).astype(np.float32)
        if dtype == "bf16":
            torch_like = values.view(np.uint32) + 0x7FFF + (values.view(np.uint32) >> 16 & 1)
            values = (torch_like & 0xFFFF0000).astype(np.uint32).view(np.float32)
        out[name] = values
    return out


@pytest.mark.parametrize(("to", "dtype", "family", "options"), EXPORTS)
def test_there_and_back(
    config: Config, tmp_path: Path, to: str, dtype: str, family: str, options: dict[str, Any]
) -> None:
    shape = config(family, **({"n_head": 8} if family == "byte" else {}))
    source = make_checkpoint(shape, folder=tmp_path / "source")
    report = export_model(source, to, tmp_path / "out", dtype=dtype, **options)
    assert report.prompt_tokens == 16
    if dtype == "fp32":
        assert report.largest_difference == 0
    else:
        most = {"fp16": 3e-3, "bf16": 3e-2, "q4_0": 0.5, "q4_k_m": 0.3, "q5_k_m": 0.3}
        assert 0 < report.relative_difference < most.get(dtype, 0.1)

    seq = {"block_size": shape.block_size, "n_head": 8} if to in ("heimerl", "qgpt") else {}
    again = import_model(tmp_path / "out", tmp_path / "again", **seq)
    assert again.format == to
    back = Checkpoint(tmp_path / "again")
    assert back.config == shape
    assert back.tokenizer().fingerprint() == source.tokenizer().fingerprint()
    if dtype == "int8" or dtype.startswith("q"):
        return
    for name, expected in rounded(source, dtype).items():
        kept = (to == "gguf" and expected.ndim == 1) or (name == "wpe.weight" and to == "gguf")
        expected = source.read(name) if kept else expected
        assert np.array_equal(back.read(name), expected), name

    # Once rounded, nothing more is lost: the second export has the same bytes.
    export_model(back, to, tmp_path / "second", dtype=dtype, **options)
    if to != "hf":
        first, second = ((tmp_path / name).read_bytes() for name in ("out", "second"))
        if to == "gguf":  # which holds the name of its source
            first = first.replace(b"source", b"again")
            first, second = first[-source.config.n_embd * 4 :], second[-source.config.n_embd * 4 :]
        assert first == second


@pytest.mark.parametrize(("to", "family"), [("llm.c", "gpt2"), ("llama2.c", "llama")])
def test_vocabularies_of_any_size_are_padded_and_heads_untied(
    config: Config, tmp_path: Path, to: str, family: str
) -> None:
    shape = config(family, vocab_size=131, **({"tied": True} if family == "gpt2" else {}))
    source = make_checkpoint(shape, "", tmp_path / "source")
    assert export_model(source, to, tmp_path / "out.bin").largest_difference == 0
    again = open_model(tmp_path / "out.bin")
    assert again.config == shape
    with pytest.raises(GptcError, match=r"out\.bin comes without a tokenizer; import it with"):
        again.tokenizer()


def test_a_model_goes_only_where_it_can(config: Config, tmp_path: Path) -> None:
    gpt2 = make_checkpoint(config("gpt2"), folder=tmp_path / "gpt2")
    llama = make_checkpoint(config("llama", rope_theta=5e5), folder=tmp_path / "llama")
    byte = make_checkpoint(config("byte"), folder=tmp_path / "byte")
    heads = make_checkpoint(config("llama", head_dim=12), folder=tmp_path / "heads")
    refused = [
        (llama, "llm.c", "llm.c .*: this is a model of the llama family.*; .* --to hf or gguf$"),
        (gpt2, "llama2.c", "llama2.c computes Llama only: this is a model of the gpt2 family"),
        (llama, "llama2.c", "rope_theta is 500000, and llama2.c's 10000"),
        (heads, "llama2.c", "its heads have 12 channels, and llama2.c's n_embd / n_head"),
        (gpt2, "heimerl", "this is a model of the gpt2 family.*; .* --to hf or gguf$"),
        (byte, "llm.c", "this is a model of the byte family.*; .* --to hf$"),
        (byte, "gguf", "llama.cpp computes no model of the byte family"),
    ]
    for source, to, message in refused:
        with pytest.raises(GptcError, match=message):
            export_model(source, to, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["byte", "gpt2", "heads", "llama"]
    with pytest.raises(UsageError, match=r"heimerl holds fp32, not q8_0"):
        export_model(byte, "heimerl", tmp_path / "out", dtype="q8_0")


def test_an_export_keeps_the_tokenizer_of_another_model(config: Config, tmp_path: Path) -> None:
    """a.old and a.bin share a_tokenizer.bin."""
    first = make_checkpoint(config("llama"), folder=tmp_path / "first")
    other = make_checkpoint(config("llama", vocab_size=300), folder=tmp_path / "other")
    out, file = tmp_path / "out", tmp_path / "out" / "a_tokenizer.bin"
    export_model(first, "llama2.c", out / "a.old")
    kept = file.read_bytes()
    with pytest.raises(UsageError, match=r"a_tokenizer\.bin exists already, .* --force"):
        export_model(other, "llama2.c", out / "a.bin")
    assert file.read_bytes() == kept
    assert sorted(path.name for path in out.iterdir()) == ["a.old", "a_tokenizer.bin"]
    export_model(first, "llama2.c", out / "a.int8", dtype="int8")  # the same tokenizer
    export_model(other, "llama2.c", out / "a.bin", replace=True)
    assert file.read_bytes() != kept


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_of_another_size_than_width_by_heads(
    config: Config, tmp_path: Path, to: str, family: str
) -> None:
    source = make_checkpoint(config(family, head_dim=12), folder=tmp_path / "source")
    if (to, family) == ("gguf", "gpt2"):
        with pytest.raises(GptcError, match=r"llama\.cpp computes no model of the byte family"):
            export_model(source, to, tmp_path / "out")
        return
    assert export_model(source, to, tmp_path / "out").largest_difference == 0
    assert open_checkpoint(tmp_path / "out").config == source.config
    if to == "gguf":
        written: Any = open_model(tmp_path / "out")
        sizes = {written.metadata[f"llama.attention.{part}_length"] for part in ("key", "value")}
        assert sizes == {12}
        assert written.metadata["llama.rope.dimension_count"] == 12


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotary_frequencies_go_into_gguf(config: Config, tmp_path: Path, kind: str) -> None:
    values = {"rope_scaling": kind, "rope_factor": 8.0}
    if kind == "llama3":
        values |= {"rope_low_freq": 1.0, "rope_high_freq": 4.0, "rope_original": 32}
    source = make_checkpoint(config("llama", **values), folder=tmp_path / "source")
    plain = make_checkpoint(config("llama"), folder=tmp_path / "plain")
    assert export_model(source, "gguf", tmp_path / "m.gguf").largest_difference == 0
    assert open_model(tmp_path / "m.gguf").config == source.config
    tokens = np.arange(40)[None]
    with load_model(source, threads=1) as one, load_model(plain, threads=1) as other:
        assert np.abs(one.logits(tokens) - other.logits(tokens)).max() > 1e-3
    with pytest.raises(GptcError, match="its rotary frequencies are scaled"):
        export_model(source, "llama2.c", tmp_path / "m.bin")


# ---- tokenizers that are not there, or cannot be read ----


def test_a_tokenizer_that_cannot_be_read_ends_the_export(gptc: Gptc, tmp_path: Path) -> None:
    """Nothing is written, unless the weights alone are asked for."""
    model = make_checkpoint(make_config("llama"), "", tmp_path / "model")
    export_model(model, "llama2.c", tmp_path / "a.bin")
    (tmp_path / "a_tokenizer.bin").write_bytes(b"\x01\x00")
    for to in ("gguf", "llama2.c", "hf"):
        export = ["export", "-m", tmp_path / "a.bin", "--to", to, "--out", tmp_path / to]
        ran = gptc(*export)
        assert ran.code == 1
        assert "a_tokenizer.bin" in ran.err
        assert "or export the weights alone with --weights-only" in ran.err
        assert not (tmp_path / to).exists()
        ran = gptc(*export, "--weights-only")
        assert (ran.code, ran.err) == (0, "")
        assert (tmp_path / to).exists()


@pytest.mark.parametrize("to", ["llama2.c", "llm.c"])
def test_the_tokenizer_of_an_earlier_model_does_not_stay(
    gptc: Gptc, tmp_path: Path, to: str
) -> None:
    """Programs would read it with the new model."""
    family = "gpt2" if to == "llm.c" else "llama"
    with_one = make_checkpoint(make_config(family), "bytes", tmp_path / "with")
    without = make_checkpoint(make_config(family), "", tmp_path / "without")
    export = ["export", "-m", without.path, "--to", to, "--out", tmp_path / "x.bin"]
    export_model(with_one, to, tmp_path / "x.bin")
    old = tmp_path / "x_tokenizer.bin"
    ran = gptc(*export, "--force")
    assert ran.code == 0
    assert f"note: removed {old}, the tokenizer of an earlier model" in ran.err
    assert not old.exists()
    old.write_bytes(b"another")
    (tmp_path / "x.bin").unlink()
    ran = gptc(*export)
    assert ran.code == 2
    assert f"{old} exists already, and this model has no tokenizer" in ran.err
    assert old.exists()
    assert not (tmp_path / "x.bin").exists()
