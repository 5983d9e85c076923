"""A quantized GGUF model keeps its blocks when it is imported, and when it is exported again.

The class of fault: a matrix that is widened unasked, rows of heads in another order, a folder whose
parts belong to different models, a command that does not know such a folder.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from gptc.checkpoint.facade import Model, load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.cli.info import describe
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.convert.verify import verify
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.formats.gguf import GgufModel
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.registry import make_tokenizer
from gptc.training.facade import train
from packed_models import MIXED, write_gguf
from small_models import make_checkpoint, make_config

SHAPE = {"n_embd": 256, "n_ff": 512, "n_layer": 2, "vocab_size": 256}
CONFIG = make_config("llama", **SHAPE, tied=True)
# Rows of biases have one number each, and those of queries and keys are in the order of heads, too.
BIASED = make_config("llama", **SHAPE, tied=False, qkv_bias=True, attn_proj_bias=True)


def imported(folder: Path, config: GPTConfig = CONFIG, tokenizer: str | None = "bytes") -> Path:
    """A checkpoint of a GGUF file, m.gguf, with matrices of three kinds of blocks."""
    write_gguf(folder / "m.gguf", {**MIXED, "attn_k": "F16"}, "Q4_K", config=config)
    made = None if tokenizer is None else make_tokenizer(tokenizer)
    import_model(folder / "m.gguf", folder / "imported", made)
    return folder / "imported"


def loss(file: ModelFile) -> float:
    tokens = np.random.default_rng(3).integers(0, 256, (1, 41)).astype(np.int32)
    with load_model(file) as model:
        assert model.dtype == "packed"
        return model.loss(tokens[:, :-1], tokens[:, 1:])


def stored(file: GgufModel) -> dict[str, bytes]:
    return {name: file.tensors.blocks(name).tobytes() for name in file.tensors.entries}


@pytest.mark.parametrize("config", [CONFIG, BIASED], ids=["plain", "biases"])
def test_blocks_are_the_same_bytes_in_a_checkpoint_and_in_its_export(
    tmp_path: Path, config: GPTConfig
) -> None:
    folder = imported(tmp_path, config)
    given, checkpoint = GgufModel(tmp_path / "m.gguf"), open_checkpoint(folder)
    report = export_model(checkpoint, "gguf", tmp_path / "again.gguf")
    again = GgufModel(tmp_path / "again.gguf")
    assert (report.dtype, report.largest_difference) == ("packed", 0.0)
    assert given.config == checkpoint.config == again.config
    assert checkpoint.types() == given.types()
    assert stored(given) == stored(GgufModel(folder / "model.gguf")) == stored(again)
    assert loss(given) == loss(checkpoint) == loss(again)
    assert not (folder / "model.safetensors").exists()


def test_another_dtype_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(imported(tmp_path))
    export_model(checkpoint, "gguf", tmp_path / "wide.gguf", dtype="fp32")
    export_model(checkpoint, "hf", tmp_path / "wide")
    for path in (tmp_path / "wide.gguf", tmp_path / "wide"):
        wide = open_checkpoint(path)
        assert not wide.packing()
        for name, _, _ in CONFIG.parameters():
            assert np.array_equal(wide.read(name), checkpoint.read(name)), name


def test_a_model_without_blocks_is_not_exported_as_packed(tmp_path: Path) -> None:
    source = make_checkpoint(make_config("llama"), folder=tmp_path / "m")
    with pytest.raises(UsageError, match="has no quantized matrices: choose another --dtype"):
        export_model(source, "gguf", tmp_path / "m.gguf", dtype="packed")


def test_commands_know_such_a_folder(tmp_path: Path) -> None:
    folder = imported(tmp_path)
    described = describe(folder)
    assert described["kind"] == "checkpoint"
    assert described["types"]["Q4_K"]["tensors"] == 8
    assert "bytes" in described["tokenizer"]
    assert "model.gguf: its checksum is right" in verify(folder)["checks"]
    text = tmp_path / "t.txt"
    text.write_text("to be or not to be, that is the question\n" * 40)
    base = loss(open_checkpoint(folder))
    options = {
        "data": str(text),
        "init_from": str(folder),
        "batch_size": 1,
        "seq_len": 24,
        "steps": 2,
    }
    summary = train(
        **options, lora_rank=2, out=str(tmp_path / "tuned"), device="cpu", warmup_steps=0
    )
    with Model.load(summary.out) as tuned:
        assert tuned.dtype == "packed"
        assert tuned.options.lora
    assert loss(open_checkpoint(folder)) == base


def test_the_tokenizer_in_the_gguf_file_is_read_where_the_folder_has_none(tmp_path: Path) -> None:
    """As in a folder that a person put together of a config.json and a GGUF file."""
    source = make_checkpoint(CONFIG, "bytes", folder=tmp_path / "m")
    export_model(source, "gguf", tmp_path / "q.gguf", dtype="q8_0")
    import_model(tmp_path / "q.gguf", tmp_path / "imported")
    for file in (tmp_path / "imported").iterdir():
        if file.name not in ("config.json", "model.gguf"):
            file.unlink()
    assert open_checkpoint(tmp_path / "imported").tokenizer().encode("ab").tolist() == [97, 98]


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = imported(tmp_path)
    (folder / "checksums.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    with pytest.raises(GptcError, match=r"config.json and model.gguf describe different models"):
        open_checkpoint(folder)


def test_a_damaged_block_is_found(tmp_path: Path) -> None:
    folder = imported(tmp_path)
    with (folder / "model.gguf").open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\xff")
    with pytest.raises(GptcError, match=r"model.gguf was altered or damaged: its checksum"):
        verify(folder)
    with pytest.raises(GptcError, match=r"model.gguf was altered or damaged: its checksum"):
        Model.load(folder)


def test_weights_in_safetensors_come_first(tmp_path: Path) -> None:
    """A folder of the hub may hold a GGUF file next to its weights."""
    source = make_checkpoint(CONFIG, folder=tmp_path / "m")
    (tmp_path / "m" / "model.gguf").write_bytes(b"not read")
    assert np.array_equal(
        open_checkpoint(source.path).read("wte.weight"), source.read("wte.weight")
    )


@pytest.mark.parity
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_transformers_reads_the_gguf_file_in_the_folder(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = imported(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()
    tokens = np.arange(30, dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    with Model.load(folder, dtype="fp32") as model:
        off = model.logits(tokens) - expected
    assert np.linalg.norm(off) < 1e-4 * np.linalg.norm(expected)
