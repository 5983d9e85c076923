"""Wrong weights without a word: a head that is tied or not, scaled rotary frequencies, overflow.

A file decides about its weights; where gptc cannot tell, it refuses. The right values are
transformers' (heads) and llama.cpp's (frequencies), computed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.verify import verify
from gptc.errors import GptcError
from gptc.formats import gguf, gguf_write
from gptc.formats.nanogpt import NanogptModel
from gptc.formats.numbers import BF16, F16, encoded
from gptc.formats.pickled import PickledTensors
from gptc.formats.registry import open_model
from small_models import make_checkpoint, make_config

EMBEDDINGS = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}


def published(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    """A folder as others publish it; returns its tensors."""
    make_checkpoint(make_config(family, **changes), folder=folder)
    (folder / "checksums.json").unlink()
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    return tensors


# ---- heads ----


@pytest.mark.parametrize("family", EMBEDDINGS)
@pytest.mark.parametrize("prefixed", [True, False])
def test_a_head_that_differs_is_not_tied(tmp_path: Path, family: str, prefixed: bool) -> None:
    tensors = published(tmp_path / "m", family, tied=True)
    embedding = tensors[EMBEDDINGS[family]]
    tensors["lm_head.weight"] = embedding + np.float32(0.5)
    if not prefixed:
        tensors = {
            name.removeprefix("transformer.").removeprefix("model."): values
            for name, values in tensors.items()
        }
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    model = open_checkpoint(tmp_path / "m")
    assert model.config.tied is False
    assert np.array_equal(model.read("lm_head.weight"), embedding + np.float32(0.5))
    assert np.array_equal(model.read("wte.weight"), embedding)
    assert verify(tmp_path / "m")
    export_model(model, "gguf", tmp_path / "m.gguf")
    assert open_model(tmp_path / "m.gguf").config == model.config


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_a_head_that_is_the_embedding_stays_tied(tmp_path: Path, family: str) -> None:
    tensors = published(tmp_path / "m", family, tied=True)
    tensors["lm_head.weight"] = tensors[EMBEDDINGS[family]].copy()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert open_checkpoint(tmp_path / "m").config.tied is True


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_a_tied_matrix_may_be_stored_as_the_head_alone(tmp_path: Path, family: str) -> None:
    """As safetensors.torch.save_model does: one of two names for the same memory."""
    tensors = published(tmp_path / "m", family, tied=True)
    name = EMBEDDINGS[family]
    embedding = tensors["lm_head.weight"] = tensors.pop(name)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={name: "lm_head.weight"})
    with load_model(open_checkpoint(tmp_path / "m"), threads=1) as model:
        assert np.array_equal(model.get("wte.weight"), embedding)
    untied = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(untied | {"tie_word_embeddings": False}))
    with pytest.raises(GptcError, match=f"lacks the tensor {name}"):
        open_checkpoint(tmp_path / "m").check()


@pytest.mark.parametrize("tied", [True, False])
def test_an_index_may_list_a_tied_head_that_no_file_holds(tmp_path: Path, tied: bool) -> None:
    tensors = published(tmp_path / "m", "llama", tied=tied)
    tensors.pop("lm_head.weight", None)
    (tmp_path / "m" / "model.safetensors").unlink()
    weight_map = {}
    for i in range(2):
        part, file = dict(list(tensors.items())[i::2]), f"model-{i}.safetensors"
        save_file(part, tmp_path / "m" / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"weight_map": weight_map | {"lm_head.weight": "model-1.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    if not tied:
        with pytest.raises(GptcError, match=r"places lm_head\.weight in model-1.*, which lacks it"):
            open_checkpoint(tmp_path / "m").check()
        return
    model = open_checkpoint(tmp_path / "m")
    assert np.array_equal(model.read("wte.weight"), tensors["model.embed_tokens.weight"])
    assert model.check()


class _Torch:
    """A tensor with the methods of PyTorch's that gptc calls."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.shape = values.shape

    def numel(self) -> int:
        return int(self.values.size)

    def element_size(self) -> int:
        return int(self.values.itemsize)

    def detach(self) -> _Torch:
        return self

    def float(self) -> _Torch:
        return self

    def numpy(self) -> Any:
        return self.values


def test_nanogpts_head_is_its_embedding_or_refused(tmp_path: Path) -> None:
    source = make_checkpoint(make_config("gpt2"), folder=tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for name in list(tensors):
        if tensors[name].ndim == 2 and ".h." in name:
            tensors[name] = tensors[name].T
    model = NanogptModel.__new__(NanogptModel)
    model.path, model.config = tmp_path / "ckpt.pt", source.config
    model.path.write_bytes(bytes(1 << 20))  # no tensor may be larger than twice its file
    head = tensors["transformer.wte.weight"]

    def placed(found: dict[str, Any]) -> Any:
        model.__dict__.pop("placement", None)
        model._tensors = PickledTensors(
            model.path, {name: _Torch(values) for name, values in found.items()}
        )
        return model.read("wte.weight")

    assert np.array_equal(placed({**tensors, "lm_head.weight": head}), head)
    alone = {k: v for k, v in tensors.items() if k != "transformer.wte.weight"}
    assert np.array_equal(placed({**alone, "lm_head.weight": head}), head)
    with pytest.raises(GptcError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        placed({**tensors, "lm_head.weight": head + 1})


# ---- rotary frequencies ----

TYPE, FACTOR, OLD = (
    f"llama.rope.{key}" for key in ("scaling.type", "scaling.factor", "scale_linear")
)


def with_keys(path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> Path:
    """A small Llama as GGUF, with these keys."""
    written = gguf_write._metadata
    with monkeypatch.context() as patch:
        patch.setattr(gguf_write, "_metadata", lambda *given: {**written(*given), **keys})
        source = make_checkpoint(make_config("llama"), folder=path.with_suffix(".source"))
        path.write_bytes(b"".join(gguf.model_chunks(source, None)))
    return path


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({FACTOR: 4.0}, ("linear", 4.0)),
        ({OLD: 4.0}, ("linear", 4.0)),
        ({TYPE: "linear", OLD: 4.0}, ("linear", 4.0)),
        ({FACTOR: 2.0, OLD: 4.0}, ("linear", 2.0)),
        ({TYPE: "none", FACTOR: 4.0}, ("none", 1.0)),
        ({TYPE: "linear"}, ("none", 1.0)),
        ({FACTOR: 0.0}, ("none", 1.0)),
    ],
)
def test_linear_scaling_may_be_untyped_or_have_its_old_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    expected: tuple[str, float],
) -> None:
    config = open_model(with_keys(tmp_path / "m.gguf", monkeypatch, keys)).config
    assert config.rope_scaling == expected[0]
    assert config.rope_scaling == "none" or config.rope_factor == expected[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({TYPE: "longrope", FACTOR: 4.0}, r"scaling\.type 'longrope' is not supported"),
        ({"llama.rope.scaling.attn_factor": 1.5}, r"attn_factor is 1\.5, and only 1\.0"),
        ({"llama.attention.causal": False}, r"attention\.causal is False, and only True"),
        ({"llama.expert_count": 8}, "expert_used_count is None"),
        ({"llama.attention.key_length": 14}, "keys of 14 and values of "),
        ({"llama.attention.value_length": 10}, "and values of 10 channels are not supported"),
        ({"llama.attention.key_length": 0}, "key_length is 0, not a whole number above 0"),
    ],
)
def test_keys_that_make_another_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(GptcError, match=message) as caught:
        open_model(with_keys(tmp_path / "m.gguf", monkeypatch, keys))
    assert "\n" not in str(caught.value)


def test_two_scalings_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 32}
    values |= {"rope_low_freq": 1.0, "rope_high_freq": 4.0}
    source = make_checkpoint(make_config("llama", **values), folder=tmp_path / "source")
    written = gguf_write._metadata
    monkeypatch.setattr(gguf_write, "_metadata", lambda *given: {**written(*given), FACTOR: 4.0})
    (tmp_path / "m.gguf").write_bytes(b"".join(gguf.model_chunks(source, None)))
    with pytest.raises(GptcError, match=r"by rope_freqs\.weight and by a factor of 4; only one"):
        open_model(tmp_path / "m.gguf")


def test_a_part_of_the_head_is_not_rotated(tmp_path: Path) -> None:
    published(tmp_path / "m", "llama")
    file = tmp_path / "m" / "config.json"
    whole = json.loads(file.read_text())
    part = {"partial_rotary_factor": 0.5}
    for given in (part, {"rope_parameters": {"rope_type": "default", **part}}):
        file.write_text(json.dumps(whole | given))
        with pytest.raises(GptcError, match=r"partial_rotary_factor 0\.5 is not supported"):
            open_checkpoint(tmp_path / "m")


# ---- numbers beyond a dtype's range ----


@pytest.mark.parametrize(
    ("to", "dtype", "family", "value"),
    [
        ("hf", "fp16", "llama", 65520.0),
        ("hf", "bf16", "gpt2", 3.4e38),
        ("gguf", "fp16", "gpt2", -1e5),
        ("gguf", "q8_0", "llama", 1e7),
        ("gguf", "q4_0", "llama", -6e5),
        ("gguf", "q4_k_m", "llama", 1.1e6),
        ("llm.c", "bf16", "gpt2", 3.4e38),
    ],
)
def test_an_overflow_is_an_error(
    tmp_path: Path, to: str, dtype: str, family: str, value: float
) -> None:
    make_checkpoint(make_config(family), folder=tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = next(n for n in tensors if n.endswith(("c_fc.weight", "up_proj.weight")))
    tensors[name][3, 5] = value
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "checksums.json").unlink()
    with pytest.raises(GptcError, match=r"holds .*, which (F16|BF16|Q8_0|Q4_0|Q5_0) cannot hold: "):
        export_model(open_checkpoint(tmp_path / "m"), to, tmp_path / "out", dtype=dtype)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]


def test_the_largest_numbers_are_kept() -> None:
    for codec, largest in ((F16, 65519.0), (BF16, 3.39e38)):
        stored = np.frombuffer(encoded(codec, np.float32([largest]), "w"), np.uint8)
        assert np.isfinite(codec.decode(stored, (1,))).all()


def test_an_export_without_finite_logits_is_refused(tmp_path: Path) -> None:
    tensors = published(tmp_path / "m", "llama")
    tensors["model.norm.weight"][0] = np.inf
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(GptcError, match=r"are not finite; look for the cause with: gptc verify"):
        export_model(open_checkpoint(tmp_path / "m"), "hf", tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_of_a_wrapped_model_are_named(tmp_path: Path, prefix: str) -> None:
    """As torch.compile, DistributedDataParallel and peft wrap a model."""
    tensors = published(tmp_path / "model", "llama")
    wrapped = {prefix + name: values for name, values in tensors.items()}
    save_file(wrapped, tmp_path / "model" / "model.safetensors")
    with pytest.raises(GptcError) as caught:
        _ = open_checkpoint(tmp_path / "model").placement
    assert f"it holds {prefix}model.embed_tokens.weight, so save" in str(caught.value)
    assert str(caught.value).endswith(f" without {prefix} before the names")
