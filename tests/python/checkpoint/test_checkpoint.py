"""Checkpoints: what they hold, that they appear whole or not at all, and what damage says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import find_checkpoint, open_checkpoint
from gptc.checkpoint.names import checkpoint_name
from gptc.checkpoint.reader import Checkpoint
from gptc.checkpoint.writer import save
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.files.whole import discard
from gptc.formats import hf
from gptc.formats.safetensors import TensorFile, tensor_chunks
from gptc.tokenizer.registry import make_tokenizer

Config = Callable[..., GPTConfig]
FAMILIES = ("gpt2", "llama", "byte")
TRAINER = {"step": 3, "options": {}}


def make(config: GPTConfig, **options: Any) -> Model:
    """A model whose norms and biases are not what they begin as."""
    model = Model.create(config, **{"threads": 1, "max_batch": 2, "max_seq": 12, **options})
    rng = np.random.default_rng(7)
    for name, shape, decay in config.parameters():
        if not decay:
            model.set(name, rng.normal(1, 0.3, shape).astype(np.float32))
    return model


def train(model: Model, steps: int = 3) -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 12))
    for _ in range(steps):
        model.train_step(x, np.roll(x, -1, 1), lr=1e-3)


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Path:
    """A run folder with two checkpoints of a trained model."""
    with make(config()) as model:
        for step in (3, 6):
            train(model)
            path = tmp_path / "run" / checkpoint_name(step)
            save(path, model, tokenizer=make_tokenizer("bytes"), trainer={**TRAINER, "step": step})
    return tmp_path / "run"


# ---- what is in it ----


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_survives_bit_for_bit(config: Config, tmp_path: Path, family: str) -> None:
    tokenizer = make_tokenizer("bytes")
    with make(config(family)) as model, make(config(family), seed=5) as other:
        train(model)
        save(tmp_path / "saved", model, tokenizer=tokenizer, trainer=TRAINER)
        saved = Checkpoint(tmp_path / "saved")
        assert saved.config == config(family)
        assert saved.tokenizer().fingerprint() == tokenizer.fingerprint()
        assert saved.step == 3
        saved.load_into(other)
        saved.restore_optimizer(other)
        assert other.step == 3
        for name in model.parameters():
            for tensor in ("value", "moment1", "moment2"):
                assert np.array_equal(model.read(name, tensor), other.read(name, tensor)), name
        moments = load_file(saved.path / "optimizer.safetensors")
        assert set(moments) == {f"{m}.{name}" for name in model.parameters() for m in "mv"}
        assert np.array_equal(moments["v.wte.weight"], model.read("wte.weight", "moment2"))
        theirs = {"tokenizer.json", "tokenizer_config.json"}
        assert sorted({*saved.verify()} - theirs) == [
            "config.json",
            "gptc_tokenizer.json",
            "model.safetensors",
            "optimizer.safetensors",
            "trainer.json",
        ]
        assert (theirs <= {*saved.verify()}) == (family != "byte")
        assert sorted(f.name for f in saved.path.iterdir()) == sorted(
            [*saved.verify(), "checksums.json"]
        )


def test_a_gpt2_checkpoint_is_a_hugging_face_folder(config: Config, tmp_path: Path) -> None:
    with make(config("gpt2")) as model:
        model.save(tmp_path / "gpt2", make_tokenizer("bytes"))
        data = json.loads((tmp_path / "gpt2" / "config.json").read_text())
        assert data["architectures"] == ["GPT2LMHeadModel"]
        assert data["model_type"] == "gpt2"
        assert data["activation_function"] == "gelu_new"
        assert (data["n_positions"], data["n_embd"], data["n_inner"]) == (48, 32, 128)
        assert data["layer_norm_epsilon"] == 1e-5
        assert data["tie_word_embeddings"] is True
        tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
        qkv = tensors["transformer.h.1.attn.c_attn.weight"]
        assert qkv.shape == (32, 96)
        assert np.array_equal(qkv.T, model.get("h.1.attn.qkv.weight"))
        assert np.array_equal(
            tensors["transformer.h.0.mlp.c_proj.weight"].T, model.get("h.0.mlp.proj.weight")
        )
        assert "lm_head.weight" not in tensors


def test_a_llama_checkpoint_is_a_hugging_face_folder(config: Config, tmp_path: Path) -> None:
    with make(config("llama")) as model:
        model.save(tmp_path / "llama")
        data = json.loads((tmp_path / "llama" / "config.json").read_text())
        assert data["architectures"] == ["LlamaForCausalLM"]
        assert (data["num_attention_heads"], data["num_key_value_heads"]) == (4, 2)
        assert (data["hidden_act"], data["rms_norm_eps"], data["rope_theta"]) == ("silu", 1e-5, 1e4)
        assert data["attention_bias"] is data["mlp_bias"] is data["tie_word_embeddings"] is False
        tensors = load_file(tmp_path / "llama" / "model.safetensors")
        qkv, fc = model.get("h.0.attn.qkv.weight"), model.get("h.0.mlp.fc.weight")
        layer = "model.layers.0."
        assert np.array_equal(tensors[layer + "self_attn.q_proj.weight"], qkv[:32])
        assert np.array_equal(tensors[layer + "self_attn.k_proj.weight"], qkv[32:48])
        assert np.array_equal(tensors[layer + "self_attn.v_proj.weight"], qkv[48:])
        assert np.array_equal(tensors[layer + "mlp.gate_proj.weight"], fc[:40])
        assert np.array_equal(tensors[layer + "mlp.up_proj.weight"], fc[40:])
        assert np.array_equal(tensors["lm_head.weight"], model.get("lm_head.weight"))


def test_other_shapes_keep_our_own_names(config: Config, tmp_path: Path) -> None:
    for shape in (config("byte"), config("gpt2", bias=False)):
        folder = tmp_path / shape.family
        with make(shape) as model:
            model.save(folder)
            assert json.loads((folder / "config.json").read_text())["model_type"] == "gptc"
            assert set(load_file(folder / "model.safetensors")) == set(model.parameters())


def test_a_model_without_a_run_cannot_be_resumed(config: Config, tmp_path: Path) -> None:
    with make(config()) as model:
        model.save(tmp_path / "m")
        saved = Checkpoint(tmp_path / "m")
        assert saved.trainer() is None
        with pytest.raises(GptcError, match=r"holds no optimizer state; .* --init-from"):
            saved.restore_optimizer(model)
        with pytest.raises(GptcError, match=r"has no gptc_tokenizer\.json"):
            saved.tokenizer()


# ---- models from elsewhere ----


def published(folder: Path, config: GPTConfig, tensors: dict[str, Any], **changes: Any) -> Path:
    """A folder such as others publish."""
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
    with make(config("gpt2")) as model:
        tensors = {k.removeprefix("transformer."): v for k, v in exported(model).items()}
        tensors["h.0.attn.bias"] = np.ones((1, 1, 48, 48), np.float32)
        tensors["h.0.attn.masked_bias"] = np.float32([-1e4])
        tensors["lm_head.weight"] = model.get("wte.weight")
        folder = published(tmp_path / "bare", model.config, tensors, n_inner=None)
        with Model.load(folder, threads=1) as again:
            for name, values in model.parameters().items():
                assert np.array_equal(again.get(name), values), name


def test_half_precision_weights_are_widened(config: Config, tmp_path: Path) -> None:
    with make(config("llama")) as model:
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
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu' is not supported"),
        ("gpt2", {"model_type": "bert"}, "model_type 'bert' is not one of gpt2, llama, gptc"),
        ("gpt2", {"n_embd": None}, "lacks n_embd"),
        ("gpt2", {"n_head": 0}, "n_head is 0"),
        ("gpt2", {"n_layer": "12"}, "n_layer is '12', not a whole number"),
        ("gpt2", {"n_inner": "x"}, "n_ff is 'x', not a whole number"),
        ("gpt2", {"n_head": 5}, "n_head 5 does not divide n_embd 32"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("llama", {"rms_norm_eps": "tiny"}, "norm_eps is 'tiny', not a number"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling with .* is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias True is not supported"),
        ("llama", {"head_dim": 64}, "head_dim 64 is not supported, only 8"),
        ("byte", {"gptc_config_version": 2}, "has version 2, this gptc reads 1: upgrade"),
        ("byte", {"n_experts": 8}, "no field 'n_experts'"),
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
    with make(config("gpt2")) as model:
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
    with pytest.raises(GptcError, match=r"pickled weights \(pytorch_model\.bin\)"):
        Model.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(GptcError, match=r"index\.json: weight_map is no mapping"):
        Model.load(folder)


# ---- safetensors ----


def test_safetensors_files_are_read_by_the_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(3, 5)), "b.c": rng.normal(size=7), "d": rng.normal(size=())}
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    path = tmp_path / "x.safetensors"
    shapes = {name: values.shape for name, values in tensors.items()}
    path.write_bytes(b"".join(tensor_chunks(shapes, tensors.__getitem__)))
    theirs = load_file(path)
    ours = TensorFile(path)
    for name, values in tensors.items():
        assert np.array_equal(theirs[name], values)
        assert np.array_equal(ours.read(name), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\xff" * 64, "not a whole safetensors file"),
        ((20).to_bytes(8, "little") + b"{'not': 'json'}     ", "damaged safetensors header"),
        ((2).to_bytes(8, "little") + b"[]", "damaged safetensors header"),
    ],
)
def test_damaged_safetensors_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(GptcError, match=message):
        TensorFile(path)


@pytest.mark.parametrize("offsets", [[0, 40], [-4, 36], [40, 0], [0], "ab", [0, 2**62]])
def test_offsets_outside_the_file_are_refused(tmp_path: Path, offsets: Any) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": offsets}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(36))
    with pytest.raises(GptcError, match=r"x\.safetensors"):
        TensorFile(path)


# ---- damage ----


def load_all(folder: Path) -> None:
    """Reads all that a run needs to go on."""
    saved = Checkpoint(folder)
    saved.tokenizer()
    with load_model(saved, training=True, threads=1) as model:
        saved.restore_optimizer(model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", lambda b: b[:-10], "is truncated: {n} bytes expected, {m} found"),
        ("model.safetensors", lambda b: b + b"x", "has grown: {n} bytes expected"),
        ("model.safetensors", lambda b: b[:-1] + b"\x77", "was altered or damaged"),
        ("model.safetensors", lambda b: b"\xff" + b[1:], "was altered or damaged"),
        ("optimizer.safetensors", lambda b: b[:-1] + b"\x77", "was altered or damaged"),
        ("trainer.json", lambda b: b.replace(b"6", b"7", 1), "was altered or damaged"),
        ("gptc_tokenizer.json", lambda b: b.replace(b"bytes", b"chars"), "altered or damaged"),
        ("config.json", lambda b: b.replace(b"48", b"49"), "was altered or damaged"),
        ("model.safetensors", None, "is missing"),
        ("checksums.json", lambda b: b"{", "is damaged"),
        ("checksums.json", lambda b: b.replace(b'"version": 2', b'"version": 3'), "upgrade"),
        ("checksums.json", lambda b: b.replace(b"xxh3_128", b"xxh9_999"), "is damaged"),
    ],
)
def test_damage_names_the_file_and_the_way_out(
    run: Path, name: str, content: Callable[[bytes], bytes] | None, message: str
) -> None:
    folder = run / "ckpt-000006"
    before = (folder / name).read_bytes()
    if content is None:
        (folder / name).unlink()
    else:
        after = content(before)
        assert after != before
        (folder / name).write_bytes(after)
        message = message.format(n=f"{len(before):,}", m=f"{len(after):,}")
    with pytest.raises(GptcError) as caught:
        load_all(folder)
    assert message in str(caught.value)
    assert str(folder / name) in str(caught.value)
    if "upgrade" not in message:
        assert str(caught.value).endswith(f"; use {run / 'ckpt-000003'} instead")


def test_checkpoints_of_before_xxh3_are_still_checked(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    with make(config()) as model:
        save(folder, model, tokenizer=make_tokenizer("bytes"))
    sums = folder / "checksums.json"
    files = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
        if path != sums
    }
    sums.write_text(json.dumps({"version": 1, "files": files}))
    load_model(Checkpoint(folder), threads=1).close()
    assert Checkpoint(folder).verify() == list(files)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x77")
    with pytest.raises(GptcError, match="altered or damaged"):
        Checkpoint(folder).verify()
    with pytest.raises(GptcError, match="altered or damaged"):
        load_model(Checkpoint(folder))
    for record in ({"size": 1}, {"size": 1, "sha256": 5}, {"size": 1, "checksum": "md5:0"}, 7):
        sums.write_text(json.dumps({"version": 1, "files": {"config.json": record}}))
        with pytest.raises(GptcError, match="is damaged"):
            Checkpoint(folder).verify()


def test_a_run_falls_back_to_its_newest_whole_checkpoint(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_checkpoint(run).name == "ckpt-000006"
    assert not caplog.records
    weights = run / "ckpt-000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert find_checkpoint(run).name == "ckpt-000003"
    assert "ckpt-000006/model.safetensors is truncated" in caplog.text
    (run / "ckpt-000003" / "checksums.json").unlink()
    with pytest.raises(GptcError, match="holds no whole checkpoint"):
        find_checkpoint(run)


def test_finding(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint(run / "ckpt-000003") == run / "ckpt-000003"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GptcError, match=r"there is no checkpoint under runs/; .*gptc train"):
        find_checkpoint()
    newer = tmp_path / "runs" / "b"
    shutil.copytree(run, tmp_path / "runs" / "a")
    shutil.copytree(run, newer)
    os.utime(newer / "ckpt-000006", (2e9, 2e9))
    assert find_checkpoint() == Path("runs/b/ckpt-000006")
    assert open_checkpoint().step == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(GptcError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "empty")
    with pytest.raises(GptcError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(GptcError, match="is a file"):
        find_checkpoint(run / "ckpt-000003" / "config.json")


def test_a_later_trainer_version_is_refused(run: Path) -> None:
    folder = run / "ckpt-000006"
    data = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps({**data, "version": 9}))
    (folder / "checksums.json").unlink()
    with pytest.raises(GptcError, match=r"trainer\.json has version 9, .* up to 1: upgrade"):
        _ = Checkpoint(folder).step


# ---- whole or not at all ----


def no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("nth", range(9))
def test_a_full_disk_leaves_what_was_there(
    run: Path, config: Config, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Fails at the n-th flush to disk: there is one for each file and folder."""
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        if calls == nth:
            no_space()
        calls += 1
        real(descriptor)

    target = run / "ckpt-000009"
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    expected = (
        pytest.raises(GptcError, match=f"cannot save {target}: no space left on device")
        if nth < 8
        else contextlib.nullcontext()
    )
    with make(config()) as model, expected:
        monkeypatch.setattr("os.fsync", fsync)
        save(target, model, tokenizer=make_tokenizer("bytes"), trainer=TRAINER)
    # There are seven before the renaming: six files and their folder. The eighth is its parent's.
    if nth < 7:
        assert sorted(p.relative_to(run) for p in run.rglob("*")) == before
    else:
        Checkpoint(target).verify()
    Checkpoint(run / "ckpt-000006").verify()


def test_replacing_failed_brings_the_old_one_back(
    run: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if "tmp" in self.name and "old" not in self.name:
            no_space()
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with make(config()) as model:
        with pytest.raises(GptcError, match="no space left"):
            save(run / "ckpt-000006", model, replace=True)
        monkeypatch.undo()
        assert Checkpoint(run / "ckpt-000006").step == 6
        assert sorted(f.name for f in run.iterdir()) == ["ckpt-000003", "ckpt-000006"]
        save(run / "ckpt-000006", model, replace=True)
    assert Checkpoint(run / "ckpt-000006").trainer() is None
    assert sorted(f.name for f in run.iterdir()) == ["ckpt-000003", "ckpt-000006"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, config: Config) -> None:
    with make(config()) as model:  # 90 kB of weights, 270 kB with the moments
        save(small_disk / "ckpt-000001", model)
        with pytest.raises(
            GptcError, match=r"no space left on device \(it takes .*, .* are free\)"
        ):
            save(small_disk / "ckpt-000002", model, trainer=TRAINER)
    assert [f.name for f in small_disk.iterdir()] == ["ckpt-000001"]
    Checkpoint(small_disk / "ckpt-000001").verify()


def test_temporary_folders_of_dead_writers_are_removed_and_of_live_ones_kept(
    run: Path, config: Config
) -> None:
    dead, alive = run / ".ckpt-000007.tmp-99", run / ".ckpt-000008.tmp-98"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with make(config()) as model:
            save(run / "ckpt-000009", model)
        assert not dead.exists()
        assert alive.exists()
    finally:
        os.close(descriptor)


def test_discarding_leaves_nothing(run: Path) -> None:
    discard(run / "ckpt-000003")
    assert [f.name for f in run.iterdir()] == ["ckpt-000006"]
