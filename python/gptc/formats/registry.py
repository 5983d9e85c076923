"""Models in the formats of other programs, each in a module of its own, behind one interface.

    source = open_model(Path("stories15M.bin"))    # whatever it is
    source.config, source.read("wte.weight"), source.tokenizer(), load_model(source)

A module reads its format with a class derived from `ModelFile` and writes it with `model_chunks`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from gptc.errors import GptcError
from gptc.formats.model_file import ModelFile

FORMATS = ("gguf", "llm.c", "llama2.c", "heimerl", "openai", "nanogpt")
"""What `detect` can find; a Hugging Face folder is a checkpoint of our own."""


def is_foreign(path: Path) -> bool:
    """Whether a model of another program may stand at `path`, rather than a folder of ours."""
    return path.is_file() or _is_openai(path)


def detect(path: Path) -> str:
    """The format of a model: one of FORMATS. GptcError when there is none, or of no known kind."""
    from gptc.formats import gguf, heimerl, llama2c, llmc
    from gptc.formats.binary import Binary

    if _is_openai(path):
        return "openai"
    file = Binary(path)
    begin = bytes(file.view[:8])
    if begin[:4] == gguf.MAGIC:
        return "gguf"
    if begin[:4] == b"PK\x03\x04" or begin[:2] == b"\x80\x02":
        return "nanogpt"
    number = struct.unpack("<i", begin[:4])[0] if len(begin) >= 4 else 0
    others = {llmc.STATE_MAGIC: "a debug state", llmc.TOKENIZER_MAGIC: "a tokenizer"}
    others |= {20240520: "a token shard", 20240801: "a token shard"}
    if number in others:
        raise GptcError(f"{path} is {others[number]} of llm.c, not a model; give its model file")
    if number == llmc.MODEL_MAGIC:
        return "llm.c"
    if number == llama2c.MAGIC or llama2c.looks_like(file):
        return "llama2.c"
    if heimerl.looks_like(file):
        return "heimerl"
    if path.suffix == ".safetensors":
        raise GptcError(f"{path} holds weights only; give its folder, with the config.json")
    raise GptcError(f"{path} {_what_else(path, file.size)}")


def _what_else(path: Path, size: int) -> str:
    """What can be said of a file that begins as no model does."""
    if not size:
        return "is empty: copy it again from its source"
    if path.suffix in (".json", ".jsonl", ".toml"):
        return f"describes what its folder holds: name the folder, {path.parent}"
    if path.name.endswith("tokenizer.bin"):
        return "is the tokenizer of a model: name the model's file, beside it"
    return (
        f"is no token shard and no model, or one that is damaged or cut off (it has {size:,} "
        f"bytes); known are folders of Hugging Face's and {', '.join(FORMATS)}"
    )


def open_model(path: Path, **assumed: Any) -> ModelFile:
    """The model of another program at `path`.

    `assumed` are n_head and block_size for the format that does not store them (heimerl).
    """
    kind = detect(path)
    if kind == "gguf":
        from gptc.formats.gguf import GgufModel

        return GgufModel(path)
    if kind == "llm.c":
        from gptc.formats.llmc import LlmcModel

        return LlmcModel(path)
    if kind == "llama2.c":
        from gptc.formats.llama2c import Llama2cModel

        return Llama2cModel(path)
    if kind == "heimerl":
        from gptc.formats.heimerl import HeimerlModel

        return HeimerlModel(path, **assumed)
    if kind == "openai":
        from gptc.formats.openai_tf import OpenaiModel

        return OpenaiModel(path)
    from gptc.formats.nanogpt import NanogptModel

    return NanogptModel(path)


def _is_openai(path: Path) -> bool:
    return (path / "hparams.json").is_file()
