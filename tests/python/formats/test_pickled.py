"""Weights of PyTorch's are read where PyTorch is, with weights_only; here it is a small stand-in.

The class: folders that an error called damaged or unknown, although others read them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.verify import verify
from gptc.errors import GptcError
from gptc.formats import hub
from small_models import make_checkpoint, make_config

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Tensor:
    """A tensor with the methods of PyTorch's that gptc calls."""

    def __init__(self, values: Any, learned: bool = False) -> None:
        self.values = values
        self.shape = values.shape
        self.n_stored = values.nbytes if values.base is None else values.base.nbytes
        self.learned = learned

    def numel(self) -> int:
        return int(self.values.size)

    def element_size(self) -> int:
        return int(self.values.itemsize)

    def detach(self) -> Tensor:
        return Tensor(self.values)

    def float(self) -> Tensor:
        return Tensor(self.values.astype(np.float32), self.learned)

    def numpy(self) -> Any:
        if self.learned:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.\nUse detach()")
        return self.values


class Sparse(Tensor):
    """A tensor that numpy has no array for."""

    def detach(self) -> Tensor:
        return self

    def float(self) -> Tensor:
        raise TypeError("no dense array\nfor it")


def _n_stored(found: Any) -> int:
    """Bytes of all tensors in nested dictionaries."""
    if isinstance(found, dict):
        return sum(map(_n_stored, found.values()))
    return getattr(found, "n_stored", 0)


class Torch(ModuleType):
    """The module `torch`, whose files hold names of what they stand for."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.files: dict[bytes, Any] = {}
        self.calls: list[dict[str, Any]] = []

    def save(self, found: Any, path: Path, archive: bool = True) -> None:
        content = (b"PK" if archive else b"\x80\x02") + str(len(self.files)).encode()
        content += bytes(_n_stored(found))
        self.files[content] = found
        path.write_bytes(content)

    def load(self, path: Path, **options: Any) -> Any:
        self.calls.append(options)
        if path.read_bytes() not in self.files:
            raise RuntimeError("not an archive\nof mine")
        return self.files[path.read_bytes()]


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Torch:
    stub = Torch()
    monkeypatch.setitem(sys.modules, "torch", stub)
    return stub


def pickled(folder: Path, family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A folder without weights, and the tensors that it had."""
    make_checkpoint(make_config(family, **changes), folder=folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.safetensors", "checksums.json"):
        (folder / name).unlink()
    return {name: Tensor(values.astype(np.float16)) for name, values in tensors.items()}


@pytest.mark.parametrize("archive", [True, False])
def test_one_file(tmp_path: Path, torch: Torch, archive: bool) -> None:
    tensors = pickled(tmp_path / "m")
    torch.save(tensors, tmp_path / "m" / BIN, archive)
    with load_model(open_checkpoint(tmp_path / "m"), threads=1) as model:
        expected = tensors["model.norm.weight"].values.astype(np.float32)
        assert np.array_equal(model.get("norm_f.weight"), expected)
    assert verify(tmp_path / "m")["checks"]
    for options in torch.calls:
        assert options == {"map_location": "cpu", "weights_only": True, "mmap": archive}


@pytest.mark.parametrize("tied", [True, False])
def test_several_files(tmp_path: Path, torch: Torch, tied: bool) -> None:
    tensors = pickled(tmp_path / "m", tied=tied)
    tensors.pop("lm_head.weight", None)
    weight_map = {"lm_head.weight": "pytorch_model-1.bin"}
    for i in range(2):
        part = dict(list(tensors.items())[i::2])
        torch.save(part, tmp_path / "m" / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    index = tmp_path / "m" / INDEX
    index.write_text(json.dumps({"weight_map": weight_map}))
    if tied:
        assert open_checkpoint(tmp_path / "m").check()
    else:
        with pytest.raises(GptcError, match=r"places lm_head\.weight in .*-1\.bin, which lacks it"):
            open_checkpoint(tmp_path / "m").check()
    for wrong in ({"a": "../x.bin"}, {"a": 1}, []):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(GptcError, match=r"index\.json: weight_map is not a mapping"):
            open_checkpoint(tmp_path / "m").check()


def test_a_head_that_differs_is_not_tied(tmp_path: Path, torch: Torch) -> None:
    tensors = pickled(tmp_path / "m", "gpt2", tied=True)
    embedding = tensors["transformer.wte.weight"]
    torch.save({**tensors, "lm_head.weight": embedding}, tmp_path / "m" / BIN)
    assert open_checkpoint(tmp_path / "m").config.tied is True
    torch.save({**tensors, "lm_head.weight": Tensor(embedding.values + 1)}, tmp_path / "m" / BIN)
    assert open_checkpoint(tmp_path / "m").config.tied is False
    alone = {k: v for k, v in tensors.items() if k != "transformer.wte.weight"}
    torch.save({**alone, "lm_head.weight": embedding}, tmp_path / "m" / BIN)
    ours = open_checkpoint(tmp_path / "m").read("wte.weight")
    assert np.array_equal(ours, embedding.values.astype(np.float32))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([1], "does not hold a dictionary of tensors"),
        ({"a": 1}, "holds more than tensors"),
        ({1: Tensor(np.zeros(2))}, "holds more than tensors"),
        (None, r"pytorch_model\.bin: PyTorch does not load it \(not an archive\)$"),
    ],
)
def test_other_content_is_an_error(tmp_path: Path, torch: Torch, saved: Any, message: str) -> None:
    pickled(tmp_path / "m")
    (tmp_path / "m" / BIN).write_bytes(b"PK?")
    if saved is not None:
        torch.save(saved, tmp_path / "m" / BIN)
    with pytest.raises(GptcError, match=message):
        open_checkpoint(tmp_path / "m").check()


def test_a_tensor_that_was_learned_is_read(tmp_path: Path, torch: Torch) -> None:
    tensors = pickled(tmp_path / "m")
    whole = tensors["model.norm.weight"].values
    tensors["model.norm.weight"] = Tensor(whole, learned=True)
    torch.save(tensors, tmp_path / "m" / BIN)
    assert np.array_equal(open_checkpoint(tmp_path / "m").read("norm_f.weight"), whole)


def test_a_tensor_without_an_array_is_named(tmp_path: Path, torch: Torch) -> None:
    tensors = pickled(tmp_path / "m")
    norm = "model.norm.weight"
    torch.save({**tensors, norm: Sparse(tensors[norm].values)}, tmp_path / "m" / BIN)
    with pytest.raises(GptcError, match=r"model\.norm\.weight is not a plain tensor \(no dense"):
        open_checkpoint(tmp_path / "m").check()


def test_tensors_that_are_larger_than_their_file_are_refused(tmp_path: Path, torch: Torch) -> None:
    """One number with strides of 0 may have any shape."""
    tensors = pickled(tmp_path / "m")
    shape = tensors["model.embed_tokens.weight"].shape
    wide = np.broadcast_to(np.zeros(1, np.float16), (50 * shape[0], *shape[1:]))
    torch.save({**tensors, "model.embed_tokens.weight": Tensor(wide)}, tmp_path / "m" / BIN)
    with pytest.raises(GptcError, match=r"its tensors have .* bytes, and the file"):
        open_checkpoint(tmp_path / "m").check()


def test_without_pytorch_the_shape_is_still_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    pickled(tmp_path / "m", "gpt2")
    (tmp_path / "m" / BIN).write_bytes(b"PK")
    model = open_checkpoint(tmp_path / "m")
    assert model.config.n_layer == 2
    with pytest.raises(
        GptcError, match=r"is a pickle, which only PyTorch reads safely: .*pip inst"
    ):
        model.check()


@pytest.mark.parametrize("here", [True, False])
def test_the_hub_is_asked_for_them_only_where_they_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    client = pytest.importorskip("huggingface_hub")
    monkeypatch.setitem(sys.modules, "torch", Torch() if here else None)
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(client, "snapshot_download", download)
    hub.fetch("a/b")
    assert not any("bin" in pattern for pattern in asked[0])
    wanted = {"vocab.json", "merges.txt", "added_tokens.json", "generation_config.json"}
    assert wanted | {"special_tokens_map.json", "chat_template.jinja"} <= set(asked[0])
    assert asked[1:] == ([["pytorch_model*.bin", INDEX]] if here else [])
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked.clear()
    hub.fetch("a/b")
    assert len(asked) == 1


# ---- folders of another sort ----


def test_quantized_weights_say_so(tmp_path: Path) -> None:
    pickled(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    for method in ("bitsandbytes", "gptq"):
        file.write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        with pytest.raises(GptcError, match=f"the weights are quantized by {method}, and gptc"):
            open_checkpoint(tmp_path / "m")
    file.write_text(json.dumps({**config, "quantization_config": None}))
    open_checkpoint(tmp_path / "m")


def test_an_adapter_says_so(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for read in (open_checkpoint, verify):
        with pytest.raises(
            GptcError,
            match="is an adapter of gpt2, which is not there",
        ):
            read(tmp_path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_nanogpts_checkpoint_of_a_compiled_model(tmp_path: Path, torch: Torch, prefix: str) -> None:
    """torch.compile puts a prefix before each name. test_nanogpt.py has PyTorch's own file."""
    source = make_checkpoint(make_config("gpt2", bias=False), folder=tmp_path / "source")
    weights = {}
    for name, _, _ in source.config.parameters():
        theirs = name.replace("attn.qkv", "attn.c_attn").replace("attn.proj", "attn.c_proj")
        theirs = theirs.replace("mlp.fc", "mlp.c_fc").replace("mlp.proj", "mlp.c_proj")
        weights[f"{prefix}transformer.{theirs.replace('norm_', 'ln_')}"] = Tensor(source.read(name))
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    arguments = {name: getattr(source.config, name) for name in sizes}
    torch.save({"model": weights, "model_args": arguments}, tmp_path / "ckpt.pt", archive=False)
    ours = open_checkpoint(tmp_path / "ckpt.pt")
    assert ours.config == source.config
    for name, _, _ in source.config.parameters():
        assert np.array_equal(ours.read(name), source.read(name)), name
