"""Valid small models in PyTorch's pickles, and what reads them; none where PyTorch is missing."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import mutate
from gptc.checkpoint.find import open_checkpoint
from gptc.formats import pickled
from gptc.formats.safetensors import TensorFile
from model_files import Target, bare_model, read_model

_HALVES = 2


def targets(folder: Path) -> dict[str, Target]:
    """A small valid file of each sort, made in `folder`."""
    found: dict[str, Target] = {}
    if not pickled.is_available():
        return found
    _of_nanogpt(folder, found)
    _of_hugging_face(folder, found)
    return found


def _of_nanogpt(folder: Path, found: dict[str, Target]) -> None:
    """ckpt.pt as an archive, and as the older file of pickles one after the other."""
    source = open_checkpoint(bare_model(folder / "gpt2", "gpt2"))
    renamed = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "norm_": "ln_"}
    renamed |= {"mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
    weights = {}
    for name, _, _ in source.config.parameters():
        theirs = name
        for ours, other in renamed.items():
            theirs = theirs.replace(ours, other)
        weights[f"transformer.{theirs}"] = _tensor(source.read(name))
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    sizes = {name: getattr(source.config, name) for name in ("vocab_size", "block_size", "n_layer")}
    sizes |= {"n_head": source.config.n_head, "n_embd": source.config.n_embd, "bias": True}
    saved = {"model": weights, "model_args": sizes, "iter_num": 3, "best_val_loss": 1.5}
    for name, is_archive in (("nanogpt", True), ("nanogpt-old", False)):
        file = folder / f"{name}.pt"
        _save(saved, file, is_archive)
        structure = archive if is_archive else None
        found[name] = Target(file, partial(read_model, file, False), structure)


def _of_hugging_face(folder: Path, found: dict[str, Target]) -> None:
    """pytorch_model.bin alone, and in two files with an index."""
    for name in ("alone", "several"):
        path = bare_model(folder / name)
        weights = TensorFile(path / "model.safetensors")
        tensors = {key: _tensor(weights.read(key)) for key in weights.shapes}
        (path / "model.safetensors").unlink()
        read = partial(read_model, path)
        if name == "alone":
            _save(tensors, path / pickled.WEIGHTS)
            found[pickled.WEIGHTS] = Target(path / pickled.WEIGHTS, read, archive)
            continue
        places = {}
        for i in range(_HALVES):
            file = f"pytorch_model-{i + 1:05}-of-{_HALVES:05}.bin"
            part = dict(list(tensors.items())[i::_HALVES])
            _save(part, path / file)
            places |= dict.fromkeys(part, file)
        (path / pickled.INDEX).write_text(json.dumps({"weight_map": places}))
        found[pickled.INDEX] = Target(path / pickled.INDEX, read, mutate.json_value)


def _tensor(values: Any) -> Any:
    import torch

    return torch.from_numpy(values.copy())


def _save(saved: Any, path: Path, is_archive: bool = True) -> None:
    import torch

    torch.save(saved, path, _use_new_zipfile_serialization=is_archive)


def archive(data: bytes) -> mutate.Mutate:
    """Changes to the pickle of an archive and to what else it holds; its lengths stay right."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    assert any(name.endswith("data.pkl") for name in members)
    (program,) = (name for name in members if name.endswith("data.pkl"))

    def change(random: Random) -> bytes:
        new = dict(members)
        name = program if random.random() < 0.7 else random.choice(list(new))
        kind = random.random()
        if name == program and kind < 0.5:
            new[name] = _changed_numbers(random, new[name])
        elif kind < 0.9:
            new[name] = mutate.damage(random, new[name])
        else:
            del new[name]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as written:
            for name, content in new.items():
                written.writestr(zipfile.ZipInfo(name), content)
        return out.getvalue()

    return change


_EDGES = (0, 1, 255, 256, 65535, 2**31 - 1, -(2**31), -1)


def _changed_numbers(random: Random, program: bytes) -> bytes:
    """A pickle with another size, stride or offset of a tensor."""
    codes = {"BININT": 4, "BININT1": 1, "BININT2": 2}
    places = [(at, codes[op.name]) for op, _, at in pickletools.genops(program) if op.name in codes]
    out = bytearray(program)
    for at, size in random.sample(places, 1):
        value = random.choice(_EDGES) & (1 << 8 * size) - 1
        out[at + 1 : at + 1 + size] = value.to_bytes(size, "little")
    return bytes(out)
