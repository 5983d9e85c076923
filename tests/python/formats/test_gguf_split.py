"""A GGUF model in several files is opened by any of them; files of other sorts say what they are.

The class: errors that asked to copy a file again although it was whole. The files are written by
the package gguf.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.convert.export_model import export_model
from gptc.convert.verify import verify
from gptc.errors import GptcError
from gptc.formats.gguf import GgufModel
from gptc.formats.registry import open_model
from small_models import make_checkpoint, make_config

gguf = pytest.importorskip("gguf")


@pytest.fixture
def whole(tmp_path: Path) -> GgufModel:
    """A small Llama in one file."""
    source = make_checkpoint(make_config("llama"), folder=tmp_path / "source")
    export_model(source, "gguf", tmp_path / "whole.gguf")
    model = open_model(tmp_path / "whole.gguf")
    assert isinstance(model, GgufModel)
    return model


def written(path: Path, whole: GgufModel, **options: Any) -> Path:
    """The same model by the package gguf; `options` are those of its writer."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, value in whole.metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[bool] = writer.add_bool
        if type(value) in add and key not in ("general.architecture", "general.alignment"):
            add[type(value)](key, value)
        elif key.startswith("tokenizer.") and type(value) not in add:
            values = whole._strings_or_numbers(value, key, True)
            if values:
                writer.add_array(key, values)
    for name in whole.tensors.shapes:
        writer.add_tensor(name, whole.tensors.read(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def parts(tmp_path: Path, whole: GgufModel) -> list[Path]:
    """The model in three files."""
    (tmp_path / "parts").mkdir()
    written(tmp_path / "parts" / "m.gguf", whole, split_max_tensors=8)
    found = sorted((tmp_path / "parts").iterdir())
    assert [path.name for path in found] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_any_part_is_the_whole_model(parts: list[Path], whole: GgufModel) -> None:
    for path in parts:
        model = open_model(path)
        assert model.config == whole.config
        assert model.tokenizer().fingerprint() == whole.tokenizer().fingerprint()
        for name, _, _ in whole.config.parameters():
            assert np.array_equal(model.read(name), whole.read(name)), name
        assert "every number finite" in " ".join(verify(path)["checks"])


@pytest.mark.parametrize("lost", range(3))
def test_a_missing_part_is_named(parts: list[Path], lost: int) -> None:
    parts[lost].unlink()
    for path in parts:
        if path.exists():
            with pytest.raises(GptcError, match=rf"m-0000{lost + 1}-of-00003\.gguf is missing"):
                open_model(path)


def test_parts_that_contradict_each_other_are_refused(parts: list[Path], tmp_path: Path) -> None:
    shutil.copy(parts[1], tmp_path / "second.gguf")
    with pytest.raises(GptcError, match=r"is a part of a model in 3 files, and is not named as"):
        open_model(tmp_path / "second.gguf")
    shutil.copy(parts[1], parts[2])
    with pytest.raises(GptcError, match=r"split\.no and split\.count are \[1, 3\], not \[2, 3\]"):
        open_model(parts[0])
    data = parts[1].read_bytes()
    at = data.index(b"split.no") + len(b"split.no") + 4
    parts[2].write_bytes(data[:at] + b"\2\0" + data[at + 2 :])
    with pytest.raises(GptcError, match="is also in another part"):
        open_model(parts[0])


# ---- whole files that gptc does not read ----


def test_a_big_endian_file_says_so(tmp_path: Path, whole: GgufModel) -> None:
    path = written(tmp_path / "big.gguf", whole, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(
        GptcError, match=r"is that of a big-endian file; .* gguf-convert-endian .*little"
    ):
        open_model(path)


@pytest.mark.parametrize("version", [1, 4])
def test_another_version_says_so(tmp_path: Path, whole: GgufModel, version: int) -> None:
    data = bytearray(whole.path.read_bytes())
    data[4] = version
    (tmp_path / "other.gguf").write_bytes(data)
    with pytest.raises(
        GptcError, match=f"version at byte 4 is {version}, and gptc reads 2 and 3: "
    ):
        open_model(tmp_path / "other.gguf")


def test_another_number_format_has_its_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    kind = gguf.GGMLQuantizationType.IQ3_S
    writer.add_tensor("token_embd.weight", np.zeros((4, 110), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GptcError, match=r"is 21 \(IQ3_S\); gptc reads F32"):
        open_model(tmp_path / "m.gguf")
    for number, name in ((k.value, k.name) for k in gguf.GGMLQuantizationType):
        data = (tmp_path / "m.gguf").read_bytes()
        at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
        changed = data[:at] + number.to_bytes(4, "little") + data[at + 4 :]
        (tmp_path / "n.gguf").write_bytes(changed)
        with pytest.raises(GptcError) as caught:
            open_model(tmp_path / "n.gguf")
        assert "(unknown)" not in str(caught.value) or number > 35, name
