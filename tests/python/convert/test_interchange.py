"""Models out and back in: every format, bit for bit; and what the command line says of it."""

from __future__ import annotations

import json
import tracemalloc
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
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.convert.verify import verify
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.formats.model_file import ModelFile
from gptc.formats.registry import detect, open_model
from gptc.tokenizer.registry import make_tokenizer

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
    ("llm.c", "fp32", "gpt2", {}),
    ("llm.c", "bf16", "gpt2", {}),
    ("llama2.c", "fp32", "llama", {"version": 0}),
    ("llama2.c", "fp32", "llama", {"version": 1}),
    ("llama2.c", "int8", "llama", {}),
    ("heimerl", "fp32", "byte", {}),
]


def make(config: GPTConfig, tokenizer: str = "bytes", folder: Path | None = None) -> ModelFile:
    """A checkpoint of random weights; norms and biases are not what they begin as."""
    assert folder is not None
    rng = np.random.default_rng(11)
    with Model.create(config, threads=1) as model:
        for name, shape, decay in config.parameters():
            values = rng.normal(0, 0.2, shape) if decay else rng.normal(1, 0.3, shape)
            model.set(name, values.astype(np.float32))
        model.save(folder, make_tokenizer(tokenizer) if tokenizer else None)
    return Checkpoint(folder)


def rounded(source: ModelFile, dtype: str) -> dict[str, np.ndarray[Any, Any]]:
    """The parameters as a file of this dtype should give them back."""
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
    source = make(shape, folder=tmp_path / "source")
    report = export_model(source, to, tmp_path / "out", dtype=dtype, **options)
    assert report.prompt_tokens == 16
    if dtype == "fp32":
        assert report.largest_difference == 0
    else:
        most = {"fp16": 3e-3, "bf16": 3e-2, "q4_0": 0.5}.get(dtype, 0.1)
        assert 0 < report.relative_difference < most

    seq = {"block_size": shape.block_size, "n_head": 8} if to == "heimerl" else {}
    again = import_model(tmp_path / "out", tmp_path / "again", **seq)
    assert again.format == to
    back = Checkpoint(tmp_path / "again")
    assert back.config == shape
    assert back.tokenizer().fingerprint() == source.tokenizer().fingerprint()
    if dtype in ("q8_0", "q4_0", "int8"):
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
    source = make(shape, "", tmp_path / "source")
    assert export_model(source, to, tmp_path / "out.bin").largest_difference == 0
    again = open_model(tmp_path / "out.bin")
    assert again.config == shape
    with pytest.raises(GptcError, match=r"out\.bin comes without a tokenizer; import it with"):
        again.tokenizer()


def test_a_model_goes_only_where_it_can(config: Config, tmp_path: Path) -> None:
    gpt2 = make(config("gpt2"), folder=tmp_path / "gpt2")
    llama = make(config("llama", rope_theta=5e5), folder=tmp_path / "llama")
    byte = make(config("byte"), folder=tmp_path / "byte")
    refused = [
        (llama, "llm.c", "llm.c .*: this is a model of the llama family.*; .* --to hf or gguf$"),
        (gpt2, "llama2.c", "llama2.c computes Llama only: this is a model of the gpt2 family"),
        (llama, "llama2.c", "rope_theta is 500000, and llama2.c's 10000"),
        (gpt2, "heimerl", "this is a model of the gpt2 family.*; .* --to hf or gguf$"),
        (byte, "llm.c", "this is a model of the byte family.*; .* --to hf$"),
        (byte, "gguf", "llama.cpp computes no model of the byte family"),
    ]
    for source, to, message in refused:
        with pytest.raises(GptcError, match=message):
            export_model(source, to, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["byte", "gpt2", "llama"]
    with pytest.raises(UsageError, match=r"heimerl holds fp32, not q8_0"):
        export_model(byte, "heimerl", tmp_path / "out", dtype="q8_0")


def test_an_export_keeps_the_tokenizer_of_another_model(config: Config, tmp_path: Path) -> None:
    """a.old and a.bin share a_tokenizer.bin."""
    first = make(config("llama"), folder=tmp_path / "first")
    other = make(config("llama", vocab_size=300), folder=tmp_path / "other")
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


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotary_frequencies_go_into_gguf(config: Config, tmp_path: Path, kind: str) -> None:
    values = {"rope_scaling": kind, "rope_factor": 8.0}
    if kind == "llama3":
        values |= {"rope_low_freq": 1.0, "rope_high_freq": 4.0, "rope_original": 32}
    source = make(config("llama", **values), folder=tmp_path / "source")
    plain = make(config("llama"), folder=tmp_path / "plain")
    assert export_model(source, "gguf", tmp_path / "m.gguf").largest_difference == 0
    assert open_model(tmp_path / "m.gguf").config == source.config
    tokens = np.arange(40)[None]
    with load_model(source, threads=1) as one, load_model(plain, threads=1) as other:
        assert np.abs(one.logits(tokens) - other.logits(tokens)).max() > 1e-3
    with pytest.raises(GptcError, match="its rotary frequencies are scaled"):
        export_model(source, "llama2.c", tmp_path / "m.bin")


# ---- Hugging Face folders in several files ----


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
    make(config("llama"), folder=folder)
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
    """There, a snapshot's files are links into a folder of contents."""
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
        ("../model.safetensors", "is no plain file name"),
        ("/etc/passwd", "is no plain file name"),
        ("..", "is no plain file name"),
        ("", "is no plain file name"),
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


@pytest.mark.parametrize(("to", "dtype"), [("llm.c", "fp32"), ("llm.c", "bf16"), ("gguf", "bf16")])
def test_importing_takes_little_more_than_its_largest_tensor(
    config: Config, tmp_path: Path, to: str, dtype: str
) -> None:
    shape = config("gpt2", vocab_size=20_000, n_embd=64)
    source = make(shape, "", tmp_path / "source")
    export_model(source, to, tmp_path / "model.bin", dtype=dtype)
    tracemalloc.start()
    import_model(tmp_path / "model.bin", tmp_path / "again")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * 20_000 * 64
    assert peak < 1.2 * largest + 1_000_000


# ---- the optimizer's state ----


def test_moments_travel(config: Config, tmp_path: Path) -> None:
    shape = config("byte", n_head=8)
    with Model.create(shape, threads=1, max_batch=2, max_seq=12) as model:
        x = np.random.default_rng(0).integers(0, 256, (2, 12))
        for _ in range(3):
            model.train_step(x, np.roll(x, -1, 1), lr=1e-3)
        from gptc.checkpoint.writer import save

        save(tmp_path / "a", model, trainer={"step": 3, "options": {}})
        moments = {name: model.read(name, "moment2") for name in model.parameters()}
    export_model(Checkpoint(tmp_path / "a"), "heimerl", tmp_path / "_gpt.bin")
    source = import_model(tmp_path / "_gpt.bin", tmp_path / "b", n_head=8, block_size=48)
    assert source.optimizer_step == 3
    again = Checkpoint(tmp_path / "b")
    assert again.optimizer_step == 3
    with load_model(again, training=True, threads=1) as model:
        again.restore_optimizer(model)
        assert model.step == 3
        for name, expected in moments.items():
            assert np.array_equal(model.read(name, "moment2"), expected), name


# ---- the command line ----


def test_the_three_commands(config: Config, tmp_path: Path, gptc: Gptc) -> None:
    make(config("llama"), folder=tmp_path / "source")
    file = tmp_path / "model.gguf"
    ran = gptc("export", "-m", tmp_path / "source", "--to", "gguf", "--out", file)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"wrote {file}\nread back: logits of 16 tokens are the same\n"
    ran = gptc("export", "-m", tmp_path / "source", "--to", "gguf", "--out", file)
    assert ran.code == 2
    assert "--force" in ran.err
    args = ("--to", "gguf", "--dtype", "bf16", "--out", file, "--force", "--json")
    report = json.loads(gptc("export", "-m", tmp_path / "source", *args).out)
    assert report["files"] == [str(file)]
    assert 0 < report["relative_difference"] < 1e-2

    ran = gptc("verify", file)
    assert ran.code == 0
    assert ran.out.startswith(f"{file}: gguf, nothing wrong\n  21 tensors, every number finite\n")
    assert json.loads(gptc("verify", file, "--json").out)["format"] == "gguf"

    ran = gptc("import", file, "--out", tmp_path / "again")
    assert (ran.code, ran.out) == (0, f"{file} (gguf) is now the checkpoint {tmp_path / 'again'}\n")
    assert "checksum" in gptc("verify", tmp_path / "again").out
    assert "a file of gguf" in gptc("info", file).out
    assert json.loads(gptc("info", file, "--json").out)["parameters"] == 30_368
    assert gptc("infer", "-m", file, "-p", "x", "--max-tokens", 3).out.startswith("x")

    data = bytearray(file.read_bytes())
    data[-400:-396] = b"\xff\xff\xff\x7f"
    file.write_bytes(data)
    ran = gptc("verify", file)
    assert ran.code == 1
    assert "holds nan at index" in ran.err


def test_a_run_can_begin_from_a_file(
    config: Config, tmp_path: Path, gptc: Gptc, dataset_folder: Path
) -> None:
    source = make(config("byte", n_head=8), folder=tmp_path / "source")
    export_model(source, "heimerl", tmp_path / "_gpt.bin")
    out = tmp_path / "run"
    sizes = ("--steps", 2, "--batch-size", 2, "--seq-len", 16, "--eval-batches", 1)
    where = ("--data", dataset_folder, "--out", out)
    ran = gptc("train", "--init-from", tmp_path / "_gpt.bin", *where, *sizes)
    assert ran.code == 0, ran.err
    assert Checkpoint(out / "ckpt-000002").config.n_embd == 32


def test_verify_looks_at_datasets_and_runs(dataset_folder: Path, gptc: Gptc) -> None:
    assert "every token in the vocabulary" in gptc("verify", dataset_folder).out
    shard = next(dataset_folder.glob("*.bin"))
    assert verify(shard)["format"] == "shard"
    ran = gptc("verify", dataset_folder.parent / "nowhere")
    assert (ran.code, ran.out) == (1, "")


def test_verify_looks_at_every_checkpoint_of_a_run(config: Config, tmp_path: Path) -> None:
    for step in (3, 6):
        make(config(), folder=tmp_path / "run" / f"ckpt-{step:06}")
    found = verify(tmp_path / "run")
    assert found["format"] == "run"
    assert "ckpt-000003: model.safetensors: its checksum is right" in found["checks"]
    weights = tmp_path / "run" / "ckpt-000003" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    message = r"ckpt-000003/model\.safetensors was altered or damaged: .*; whole are: ckpt-000006$"
    with pytest.raises(GptcError, match=message):
        verify(tmp_path / "run")
    (tmp_path / "run" / "ckpt-000006" / "config.json").write_text("{}")
    with pytest.raises(GptcError, match=r"ckpt-000003/.*ckpt-000006/.*; whole are: none$"):
        verify(tmp_path / "run")


def test_detection_names_what_is_no_model(config: Config, tmp_path: Path) -> None:
    source = make(config("gpt2"), folder=tmp_path / "source")
    export_model(source, "llm.c", tmp_path / "m.bin")
    with pytest.raises(GptcError, match=r"m_tokenizer\.bin is a tokenizer of llm\.c, not a model"):
        detect(tmp_path / "m_tokenizer.bin")
    (tmp_path / "text").write_text("Once upon a time there was a file that is no model")
    with pytest.raises(GptcError, match=r"text is no token shard and no model, or one that is"):
        detect(tmp_path / "text")
    for name, content, words in (
        ("empty.bin", "", "empty.bin is empty"),
        ("gptc_tokenizer.json", "{}", f"name the folder, {tmp_path}"),
        ("metrics.jsonl", "{}", f"name the folder, {tmp_path}"),
        ("ll_tokenizer.bin", "abcdefgh", "is the tokenizer of a model: name the model's file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(GptcError, match=words):
            detect(tmp_path / name)
    with pytest.raises(GptcError, match=r"holds weights only; give its folder"):
        detect(tmp_path / "source" / "model.safetensors")
