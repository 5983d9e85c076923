"""Valid small adapters of each format, and the functions that read all of them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import mutate
from gptc.checkpoint.adapter import save_adapter
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.merged import adapted, open_adapters
from gptc.engine.lora import Lora, targets_named
from gptc.files.whole import write_file
from gptc.formats import gguf_lora, peft
from gptc.tokenizer.registry import make_tokenizer
from model_files import Target, bare_model

_RANK = 2


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each sort, made in `folder`."""
    found: dict[str, Target] = {}
    for family, chosen in (("llama", "all"), ("gpt2", "qkv,mlp_proj")):
        base = bare_model(folder / "base", family)
        ours = _save(base, folder / f"{family}-ours", chosen)
        _of_ours(base, ours, family, found)
        _of_peft(base, ours, folder / f"{family}-peft", family, found)
        _of_gguf(base, ours, folder / f"{family}.gguf", family, found)
    return found


def _save(base: Path, path: Path, chosen: str) -> Path:
    """A checkpoint of adapters as training writes it."""
    file = open_checkpoint(base)
    lora = Lora(_RANK, 4.0, targets_named(file.config, chosen), kind="rslora")
    with load_model(file, lora=lora, threads=1) as model:
        save_adapter(path, model, file, tokenizer=make_tokenizer("bytes"))
    return path


def _of_ours(base: Path, path: Path, family: str, found: dict[str, Target]) -> None:
    structures = {
        "adapter_config.json": mutate.json_value,
        "adapter_model.safetensors": mutate.safetensors,
        "base.json": mutate.json_value,
        "checksums.json": mutate.json_value,
    }
    for name, structure in structures.items():
        copy = path.with_name(f"{path.name}-{name}")
        shutil.copytree(path, copy)
        if name != "checksums.json":
            (copy / "checksums.json").unlink()
        read = partial(read_adapter, base, copy)
        found[f"adapter-{family}-{name}"] = Target(copy / name, read, structure)


def _of_peft(base: Path, ours: Path, path: Path, family: str, found: dict[str, Target]) -> None:
    """The two files that peft writes, without ours next to them."""
    path.mkdir()
    for name in (peft.CONFIG, peft.WEIGHTS):
        shutil.copy(ours / name, path)
    config = open_checkpoint(base).config

    def read() -> None:
        file = peft.AdapterFile(path, config)
        file.check()
        for name, _, _ in file.lora.parameters(config):
            file.read(name)

    for name, structure in (
        (peft.CONFIG, mutate.json_value), (peft.WEIGHTS, mutate.safetensors)
    ):  # fmt: skip
        found[f"peft-{family}-{name}"] = Target(path / name, read, structure)


def _of_gguf(base: Path, ours: Path, path: Path, family: str, found: dict[str, Target]) -> None:
    file = open_checkpoint(base)
    adapters = open_adapters(ours, file)
    write_file(path, gguf_lora.chunks(file.config, adapters.lora, adapters.read))
    found[f"gguf-lora-{family}"] = Target(path, partial(read_adapter, base, path), mutate.gguf)


def read_adapter(base: Path, path: Path) -> None:
    """Reads all of an adapter, alone and merged into its base."""
    file = open_checkpoint(base)
    _, adapters = adapted(file, path)
    assert adapters is not None
    for name, _, _ in adapters.lora.parameters(file.config):
        adapters.read(name)
    adapters.lora.to_c()
    if path.is_dir():
        peft.base_of(path)
        adapters.check()  # type: ignore[attr-defined]
        adapters.tokenizer()  # type: ignore[attr-defined]
