"""A checkpoint holds everything bit for bit, and appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from gptc import Model
from gptc.checkpoint.reader import Checkpoint
from gptc.checkpoint.writer import save
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.files import whole
from gptc.files.whole import discard
from gptc.tokenizer.native import BpeTokenizer
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_model, take_steps

Config = Callable[..., GPTConfig]

TRAINER = {"step": 3}
FAMILIES = ("gpt2", "llama", "byte")


# ---- content ----


def test_the_state_of_another_optimizer_is_refused(config: Config, tmp_path: Path) -> None:
    muon = Model.create(config(), threads=1, optimizer="muon")
    with muon, make_model(config()) as adamw:
        save(tmp_path / "adamw", adamw, trainer=TRAINER)
        save(tmp_path / "muon", muon, trainer=TRAINER)
        with pytest.raises(GptcError, match=r"lacks momentum\.h\.0.*state of another optimizer"):
            Checkpoint(tmp_path / "adamw").restore_optimizer(muon)
        with pytest.raises(GptcError, match=r"lacks m\.h\.0.*state of another optimizer"):
            Checkpoint(tmp_path / "muon").restore_optimizer(adamw)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_survives_bit_for_bit(config: Config, tmp_path: Path, family: str) -> None:
    tokenizer = make_tokenizer("bytes")
    with make_model(config(family)) as model, make_model(config(family), seed=5) as other:
        take_steps(model)
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


def test_a_model_saved_from_python_has_its_tokenizer(config: Config, tmp_path: Path) -> None:
    with make_model(config("llama")) as model:
        model.save(tmp_path / "with", make_tokenizer("bytes"))
        model.save(tmp_path / "without")
    assert Checkpoint(tmp_path / "with").tokenizer().kind == "bytes"
    with pytest.raises(
        GptcError, match=r"has no tokenizer: copy .*, model\.save\(path, tokenizer\)"
    ):
        Checkpoint(tmp_path / "without").tokenizer()


def test_a_tokenizer_larger_than_the_model_is_refused(config: Config, tmp_path: Path) -> None:
    """Its last tokens would have no rows, and those who read the folder would find no error."""
    with (
        make_model(config("llama")) as model,
        pytest.raises(GptcError, match="has 261 tokens, and the model 256; give the tokenizer"),
    ):
        save(tmp_path / "saved", model, tokenizer=BpeTokenizer([b"th", b"he", b"in", b"er"]))
    assert not list(tmp_path.iterdir())


def test_a_gpt2_checkpoint_is_a_hugging_face_folder(config: Config, tmp_path: Path) -> None:
    with make_model(config("gpt2")) as model:
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
    with make_model(config("llama")) as model:
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
        with make_model(shape) as model:
            model.save(folder)
            assert json.loads((folder / "config.json").read_text())["model_type"] == "gptc"
            assert set(load_file(folder / "model.safetensors")) == set(model.parameters())


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
    with make_model(config()) as model, expected:
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
        if ".tmp-" in self.parent.name:
            no_space()
        return real(self, target)

    monkeypatch.setattr(whole, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", rename)
    with make_model(config()) as model:
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
    """A file system of 256 kB; skips if this process may not mount one."""
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
    with make_model(config()) as model:  # 90 kB of weights, 270 kB with the moments
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
    dead, alive = run / ".ckpt-000007.tmp-99-0123abcd", run / ".ckpt-000008.tmp-98-0123abcd"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / whole._MARK).touch()
        (folder / "model.safetensors").write_bytes(b"half")
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with make_model(config()) as model:
            save(run / "ckpt-000009", model)
        assert not dead.exists()
        assert alive.exists()
    finally:
        os.close(descriptor)


def test_discarding_leaves_nothing(run: Path) -> None:
    discard(run / "ckpt-000003")
    assert [f.name for f in run.iterdir()] == ["ckpt-000006"]
