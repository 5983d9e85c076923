"""Published Hugging Face folders are read, in one file or several, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.verify import verify
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats import hf
from small_models import make_checkpoint, make_model

Config = Callable[..., GPTConfig]


# ---- published models ----


def published(folder: Path, config: GPTConfig, tensors: dict[str, Any], **changes: Any) -> Path:
    """A folder as other programs publish it: config.json and weights."""
    folder.mkdir()
    data = {**hf.config_to_json(config), **changes}
    (folder / "config.json").write_text(json.dumps(data))
    if tensors:
        save_file(tensors, folder / "model.safetensors")
    return folder


def exported(model: Model) -> dict[str, Any]:
    return {
        part.name: np.ascontiguousarray(hf.export_tensor(part, model.get(part.ours)))
        for part in hf.parts(model.config)
    }


def test_names_without_prefix_and_computed_buffers_are_understood(
    config: Config, tmp_path: Path
) -> None:
    with make_model(config("gpt2")) as model:
        tensors = {k.removeprefix("transformer."): v for k, v in exported(model).items()}
        tensors["h.0.attn.bias"] = np.ones((1, 1, 48, 48), np.float32)
        tensors["h.0.attn.masked_bias"] = np.float32([-1e4])
        tensors["lm_head.weight"] = model.get("wte.weight")
        folder = published(tmp_path / "bare", model.config, tensors, n_inner=None)
        with Model.load(folder, threads=1) as again:
            for name, values in model.parameters().items():
                assert np.array_equal(again.get(name), values), name


def test_half_precision_weights_are_widened(config: Config, tmp_path: Path) -> None:
    with make_model(config("llama")) as model:
        halves = {name: values.astype(np.float16) for name, values in exported(model).items()}
        with Model.load(published(tmp_path / "f16", model.config, halves), threads=1) as again:
            expected = model.get("h.0.attn.qkv.weight").astype(np.float16)
            assert np.array_equal(again.get("h.0.attn.qkv.weight"), expected)

        # NumPy has no bfloat16: the file is written by hand, from the upper halves of float32.
        shapes = {part.name: part.shape for part in hf.parts(model.config)}
        header: dict[str, Any] = {}
        blob = b""
        for name, values in exported(model).items():
            data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
            offsets = [len(blob), len(blob) + len(data)]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": offsets}
            blob += data
        text = json.dumps(header).encode()
        folder = published(tmp_path / "bf16", model.config, {})
        content = len(text).to_bytes(8, "little") + text + blob
        (folder / "model.safetensors").write_bytes(content)
        with Model.load(folder, threads=1) as again:
            exact = model.get("norm_f.weight")
            assert np.allclose(again.get("norm_f.weight"), exact, rtol=2**-7)
            kept = again.get("norm_f.weight").view(np.uint32)
            assert np.array_equal(kept, exact.view(np.uint32) & 0xFFFF0000)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {"activation_function": "silu"}, "activation_function 'silu' is not supported"),
        ("gpt2", {"model_type": "bert"}, "'bert' is not one of gpt2, llama, .*qwen3, .*, gptc$"),
        ("gpt2", {"n_embd": None}, "lacks n_embd"),
        ("gpt2", {"n_head": 0}, "n_head is 0"),
        ("gpt2", {"n_layer": "12"}, "n_layer is '12', not a whole number"),
        ("gpt2", {"n_inner": "x"}, "n_ff is 'x', not a whole number"),
        ("gpt2", {"n_head": 5}, "n_head 5 does not divide n_embd 32"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("llama", {"rms_norm_eps": "tiny"}, "norm_eps is 'tiny', not a number"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling with .* is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "ntk"}}, "rope_type 'ntk' is not supported"),
        ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes', not true or false"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}},
            "rope_parameters for full_attention alone are not supported",
        ),
        ("llama", {"head_dim": 7}, "head_size is 7; rotary positions turn pairs of channels"),
        ("byte", {"gptc_config_version": 2}, "has version 2, this gptc reads 1: upgrade"),
        ("byte", {"n_experts": 8}, "unknown model field 'n_experts'"),
    ],
)
def test_models_of_another_kind_are_refused(
    config: Config, tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    folder = published(tmp_path / "other", config(family), {}, **change)
    with pytest.raises(GptcError, match=message) as caught:
        Checkpoint(folder)
    assert "config.json" in str(caught.value)


def test_newer_llama_files_keep_the_base_elsewhere(config: Config, tmp_path: Path) -> None:
    data = hf.config_to_json(config("llama"))
    del data["rope_theta"]
    data["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert hf.config_from_json(data, "x").rope_theta == 5e5


def test_scaled_rotary_frequencies_are_read_and_written(config: Config) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = {**hf.config_to_json(config("llama")), "rope_scaling": scaling}
    shape = hf.config_from_json(old, "x")
    assert (shape.rope_scaling, shape.rope_factor, shape.rope_original) == ("llama3", 32.0, 8192)
    assert hf.config_to_json(shape)["rope_scaling"] == scaling
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    assert (
        hf.config_from_json({**new, "rope_parameters": {**scaling, "rope_theta": 1e4}}, "x")
        == shape
    )
    assert GPTConfig.from_dict(shape.to_dict()) == shape
    for name, value, message in [
        ("factor", 0.5, "rope_factor is 0.5; it must be at least 1"),
        ("high_freq_factor", 1.0, "must be above 0 and rise"),
        ("original_max_position_embeddings", 0, "rope_original is 0"),
    ]:
        with pytest.raises(GptcError, match=message):
            hf.config_from_json({**old, "rope_scaling": {**scaling, name: value}}, "x")
    del scaling["factor"]
    with pytest.raises(GptcError, match="rope_scaling lacks factor"):
        hf.config_from_json({**old, "rope_scaling": scaling}, "x")


def test_tensors_that_do_not_fit_are_refused(config: Config, tmp_path: Path) -> None:
    with make_model(config("gpt2")) as model:
        good = exported(model)
        name = "transformer.h.0.attn.c_attn.weight"
        cases = {
            "lacks": ({k: v for k, v in good.items() if k != name}, f"lacks the tensor {name}"),
            "shape": ({**good, name: good[name].T.copy()}, r"has the shape \(96, 32\), not"),
            "extra": ({**good, "transformer.h.2.ln_1.weight": good[name]}, r"holds .*h\.2\.ln_1"),
        }
        for case, (tensors, message) in cases.items():
            with pytest.raises(GptcError, match=message):
                Model.load(published(tmp_path / case, model.config, tensors))


def test_weights_of_other_formats_say_what_is_read(config: Config, tmp_path: Path) -> None:
    folder = published(tmp_path / "pickled", config("gpt2"), {})
    with pytest.raises(GptcError, match=r"has no model\.safetensors"):
        Model.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(GptcError, match=r"pytorch_model\.bin(:| is a pickle)"):
        Model.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(GptcError, match=r"index\.json: weight_map is not a mapping"):
        Model.load(folder)


# ---- weights in several files ----


def sharded(folder: Path, tensors: dict[str, Any], n_files: int = 3) -> None:
    """Splits a folder's weights as large models are published."""
    weight_map = {}
    for i in range(n_files):
        name = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
        part = dict(list(tensors.items())[i::n_files])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def in_shards(config: Config, tmp_path: Path) -> Path:
    """A Llama in three files, as published: without our checksums and tokenizer."""
    folder = tmp_path / "model"
    make_checkpoint(config("llama"), folder=folder)
    sharded(folder, load_file(folder / "model.safetensors"))
    for name in ("model.safetensors", "checksums.json"):
        (folder / name).rename(tmp_path / name)
    return folder


def test_weights_in_several_files(in_shards: Path, tmp_path: Path) -> None:
    whole = load_file(tmp_path / "model.safetensors")
    source = open_checkpoint(in_shards)
    assert np.array_equal(source.read("lm_head.weight"), whole["lm_head.weight"])
    assert "every number finite" in " ".join(verify(in_shards)["checks"])
    with load_model(source, threads=1) as model:
        q = whole["model.layers.1.self_attn.q_proj.weight"]
        assert np.array_equal(model.get("h.1.attn.qkv.weight")[:32], q)


def test_the_hubs_cache_links_files(in_shards: Path, tmp_path: Path) -> None:
    """In the cache, the files of a snapshot are links into a folder of blobs."""
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(in_shards.iterdir()):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert open_checkpoint(snapshot).check()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model.safetensors", "is not a plain file name"),
        ("/etc/passwd", "is not a plain file name"),
        ("..", "is not a plain file name"),
        ("", "is not a plain file name"),
        ("link.safetensors", "a link that leads out of the folder"),
        ("missing.safetensors", "cannot read .*missing.safetensors"),
        ("model-00002-of-00003.safetensors", "which lacks it"),
    ],
)
def test_an_index_stays_within_its_folder(
    in_shards: Path, tmp_path: Path, name: str, message: str
) -> None:
    (in_shards / "link.safetensors").symlink_to(tmp_path / "model.safetensors")
    path = in_shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(GptcError, match=message) as caught:
        open_checkpoint(in_shards).check()
    assert "model.safetensors.index.json" in str(caught.value) or "cannot read" in message


def test_a_tensor_that_no_index_lists(in_shards: Path) -> None:
    path = in_shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(GptcError, match=r"weight_map does not list lm_head\.weight of model-"):
        open_checkpoint(in_shards).check()
